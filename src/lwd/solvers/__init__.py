"""Solvers over global time, one family a file.

dopri5: Dormand-Prince 5(4), one step size per image. The others take the steps they are given: euler, midpoint and heun
(Runge-Kutta), and with one evaluation a step ab2, ab3 (Adams-Bashforth) and dpmpp2m, dpmpp3m (DPM-Solver++ multistep,
every group on its own log-SNR clock).
"""

from __future__ import annotations

from lwd.solvers.dormand_prince import Dopri5
from lwd.solvers.flow import FixedSteps, Flow, Velocity
from lwd.solvers.multistep import AdamsBashforth, ExponentialMultistep
from lwd.solvers.runge_kutta import EULER, HEUN, MIDPOINT, RungeKutta

__all__ = [
    "SOLVERS",
    "AdamsBashforth",
    "Dopri5",
    "ExponentialMultistep",
    "FixedSteps",
    "Flow",
    "RungeKutta",
    "Velocity",
]

SOLVERS: dict[str, FixedSteps | Dopri5] = {
    "dopri5": Dopri5(),
    "ab2": AdamsBashforth(2),
    "ab3": AdamsBashforth(3),
    "dpmpp2m": ExponentialMultistep(2),
    "dpmpp3m": ExponentialMultistep(3),
    "heun": HEUN,
    "midpoint": MIDPOINT,
    "euler": EULER,
}
