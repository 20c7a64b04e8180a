"""Schedules: one global time tau -> the local time of every group, and its derivative (LWD Eq. 8, 17-19, 40-42).

A schedule is called with tau [B] in [0, 1] and returns `LocalTimes(t, dt)`, both [B, G] in the order of the
groups. Local times run from 0 (noise) to 1 (data), never backwards, and reach both ends exactly in floating
point. The probe, the losses, the sampler and the report all share this one object; on disk it is a small JSON
file (`Schedule.save`, `load_schedule`).

At a kink the derivative is the one to the right (to the left at tau = 1).
"""

from lwd.schedules.base import FORMAT, KINDS, LocalTimes, Schedule, load_schedule, schedule_from_dict
from lwd.schedules.bernstein import BernsteinSchedule
from lwd.schedules.independent import IndependentTimes
from lwd.schedules.piecewise import (
    CascadedSchedule,
    OffsetSchedule,
    PiecewiseLinearSchedule,
    SynchronousSchedule,
)
from lwd.schedules.polynomial import PolynomialSchedule
from lwd.schedules.shifted import ShiftedSchedule

__all__ = [
    "FORMAT",
    "KINDS",
    "BernsteinSchedule",
    "CascadedSchedule",
    "IndependentTimes",
    "LocalTimes",
    "OffsetSchedule",
    "PiecewiseLinearSchedule",
    "PolynomialSchedule",
    "Schedule",
    "ShiftedSchedule",
    "SynchronousSchedule",
    "load_schedule",
    "schedule_from_dict",
]
