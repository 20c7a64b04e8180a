"""Schedules: their curves, properties for random parameters, files, errors."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import BPoly

import lwd
from gaussian import SCHEDULES, curve, polynomial
from lwd import (
    BernsteinSchedule,
    CascadedSchedule,
    IndependentTimes,
    OffsetSchedule,
    PiecewiseLinearSchedule,
    PolynomialSchedule,
    Schedule,
    ShiftedSchedule,
    SynchronousSchedule,
    load_schedule,
)
from lwd.schedules import FORMAT, KINDS, schedule_from_dict

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
GRID = torch.linspace(0, 1, 257)


@st.composite
def polynomials(draw) -> PolynomialSchedule:
    """Any degree and number of groups, rho up to the extremes of -30 and 30."""
    groups, degree = draw(st.integers(2, 4)), draw(st.integers(1, 7))
    value = st.one_of(st.floats(-30, 30, width=32), st.sampled_from([-30.0, 30.0]))
    row = st.lists(value, min_size=degree + 1, max_size=degree + 1)
    return PolynomialSchedule(degree, draw(st.lists(row, min_size=groups - 1, max_size=groups - 1)), groups=groups)


@st.composite
def piecewise(draw) -> PiecewiseLinearSchedule:
    inner, groups = draw(st.integers(0, 5)), draw(st.integers(1, 4))
    times = draw(st.lists(st.floats(0.001, 0.999), min_size=inner, max_size=inner, unique=True))
    column = st.lists(st.floats(0, 1), min_size=inner, max_size=inner).map(lambda x: [0.0, *sorted(x), 1.0])
    columns = draw(st.lists(column, min_size=groups, max_size=groups))
    return PiecewiseLinearSchedule([0.0, *sorted(times), 1.0], list(zip(*columns, strict=True)))


@st.composite
def bernsteins(draw) -> BernsteinSchedule:
    inner, groups = draw(st.integers(0, 14)), draw(st.integers(1, 4))
    column = st.lists(st.floats(0, 1), min_size=inner, max_size=inner).map(lambda x: [0.0, *sorted(x), 1.0])
    return BernsteinSchedule(list(zip(*draw(st.lists(column, min_size=groups, max_size=groups)), strict=True)))


anything = st.one_of(
    polynomials(),
    piecewise(),
    bernsteins(),
    st.builds(OffsetSchedule, st.floats(0, 5), st.integers(1, 4)),
    st.builds(CascadedSchedule, st.integers(1, 4)),
    st.builds(SynchronousSchedule, st.integers(1, 4)),
    st.lists(st.floats(0.01, 100), min_size=1, max_size=4).map(ShiftedSchedule),
)


# Properties


@given(anything)
def test_ends_are_exact_and_curves_never_run_backwards(schedule: Schedule):
    for dtype in (torch.float32, torch.float64):
        with torch.no_grad():
            t, dt = schedule(GRID.to(dtype))
        assert t.dtype == dt.dtype == dtype
        assert (t[0] == 0).all()
        assert (t[-1] == 1).all()
        assert ((t >= 0) & (t <= 1)).all()
        assert (dt >= 0).all()
        # Exactly monotone where the form guarantees it; a quotient or lerp may wobble in the last bit.
        tolerance = 0 if isinstance(schedule, PolynomialSchedule) else 2 * torch.finfo(dtype).eps
        assert (t.diff(dim=0) >= -tolerance).all()


@given(polynomials())
def test_polynomial_is_semantic_leading_in_order_and_convex(schedule: PolynomialSchedule):
    with torch.no_grad():
        t, dt = schedule(GRID)
        exact = schedule(GRID.double())
    assert torch.equal(t[:, -1], GRID)  # Eq. 17: the last group is the clock
    assert (t.diff(dim=1) >= 0).all()  # t_1 <= ... <= t_G = tau, not up to rounding
    assert (exact.t.diff(dim=0).diff(dim=0) >= -1e-14).all()
    assert (dt.diff(dim=0) >= -1e-5 * dt[1:].abs()).all()
    assert (exact.dt[-1] >= 1 - 1e-12).all()
    assert (exact.dt[0] <= 1 + 1e-12).all()


@given(anything, st.integers(0, 3))
def test_inverse(schedule: Schedule, group: int):
    group = group % schedule.groups
    s = torch.linspace(0, 1, 41, dtype=torch.float64)
    with torch.no_grad():
        tau = schedule.inverse(s, group)
        t, dt = schedule(tau)
    # The nearest tau in float64 gives s up to the slope times the spacing of tau.
    torch.testing.assert_close(t[:, group], s, rtol=0, atol=4e-16 * max(4.0, dt[:, group].max().item()))
    assert (tau.diff() >= 0).all()
    assert tau.min() >= 0
    assert tau.max() <= 1


@given(anything)
def test_derivative_is_that_of_autograd(schedule: Schedule):
    tau = (torch.arange(50, dtype=torch.float64) + 0.4321) / 50
    away = [(tau - kink).abs() > 1e-6 for kink in schedule.kinks]
    tau = tau[torch.stack(away).all(dim=0)] if away else tau
    tau.requires_grad_()
    t, dt = schedule(tau)
    for group in range(schedule.groups):
        (slope,) = torch.autograd.grad(t[:, group].sum(), tau, retain_graph=True)
        torch.testing.assert_close(slope, dt[:, group], rtol=1e-9, atol=1e-9)


@given(anything)
def test_files_read_back_bit_for_bit(tmp_path_factory, schedule: Schedule):
    path = tmp_path_factory.mktemp("schedule") / "s.json"
    schedule.provenance = {"probe": {"lambda": 0.04, "steps": 10_000}}
    loaded = load_schedule(schedule.save(path))
    assert type(loaded) is type(schedule)
    assert (loaded.names, loaded.kinks) == (schedule.names, schedule.kinks)
    assert loaded.provenance == schedule.provenance
    for before, after in zip(schedule(GRID), loaded(GRID), strict=True):
        assert torch.equal(before, after)
    assert loaded.to_dict() == schedule.to_dict()


@given(st.floats(0, 5), st.integers(2, 4))
def test_resting_groups_of_an_offset_rest_exactly(delta, groups):
    schedule = OffsetSchedule(delta, groups)
    total = 1 + (groups - 1) * delta
    tau = (torch.arange(40, dtype=torch.float64) + 0.4321) / 40
    t, dt = schedule(tau)
    for group in range(groups):
        begins = (groups - 1 - group) * delta / total
        before, after = tau < begins - 1e-12, tau > begins + 1 / total + 1e-12
        assert (t[before, group] == 0).all()
        assert (t[after, group] == 1).all()
        assert (dt[before | after, group] == 0).all()


# Values


def test_synchronous_is_the_identity_in_every_bit():
    t, dt = SynchronousSchedule(3)(GRID)
    assert torch.equal(t, GRID[:, None].expand(-1, 3))
    assert torch.equal(dt, torch.ones_like(t))


def test_offset_is_that_of_semantic_first_diffusion():
    tau = torch.linspace(0, 1, 101, dtype=torch.float64)
    schedule = OffsetSchedule(0.3)
    t, dt = schedule(tau)
    torch.testing.assert_close(t[:, 0], (1.3 * tau - 0.3).clamp(min=0), rtol=0, atol=1e-15)
    torch.testing.assert_close(t[:, 1], (1.3 * tau).clamp(max=1), rtol=0, atol=1e-15)
    assert schedule.kinks == pytest.approx((0.3 / 1.3, 1 / 1.3), abs=1e-15)
    moving = torch.stack([tau > 0.3 / 1.3, tau < 1 / 1.3], 1)
    torch.testing.assert_close(dt, 1.3 * moving.double(), rtol=1e-12, atol=0)
    assert OffsetSchedule(0.0).kinks == ()
    assert torch.equal(OffsetSchedule(0.0)(GRID).t[:, 0], GRID)


def test_offset_of_a_vanishing_delta_is_finite_in_float32():
    """Knots that coincide in float32 once made t(1) NaN."""
    t, dt = OffsetSchedule(1e-9)(GRID)
    assert t.isfinite().all()
    assert dt.isfinite().all()
    torch.testing.assert_close(t[:, 0], GRID, rtol=0, atol=1e-6)


def test_offset_of_three_groups():
    t = OffsetSchedule(0.5, groups=3)(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).t
    torch.testing.assert_close(t, torch.tensor([[0, 0, 0.5], [0, 0.5, 1], [0.5, 1, 1]], dtype=torch.float64))


def test_cascaded_runs_one_group_after_the_other_and_the_last_first():
    schedule = CascadedSchedule(3)
    t, dt = schedule(torch.tensor([1 / 6, 1 / 2, 5 / 6], dtype=torch.float64))
    torch.testing.assert_close(t, torch.tensor([[0, 0, 0.5], [0, 0.5, 1], [0.5, 1, 1]], dtype=torch.float64))
    torch.testing.assert_close(dt, 3.0 * torch.eye(3, dtype=torch.float64).flip(0))
    assert schedule.kinks == pytest.approx((1 / 3, 2 / 3))


def test_shifted_is_the_formula():
    tau = torch.linspace(0, 1, 11, dtype=torch.float64)
    t, dt = ShiftedSchedule((0.5, 3.0))(tau)
    for group, a in enumerate((0.5, 3.0)):
        torch.testing.assert_close(t[:, group], a * tau / (1 + (a - 1) * tau), rtol=1e-15, atol=1e-16)
        torch.testing.assert_close(dt[:, group], a / (1 + (a - 1) * tau) ** 2, rtol=1e-14, atol=0)


def test_polynomial_is_eq_40_and_41():
    rho, tau = np.array([0.3, -1.0, 2.0, 0.1, -3.0]), np.linspace(0, 1, 11)
    t, dt, _, _ = curve(rho, tau)
    times = polynomial(rho)(torch.from_numpy(tau))
    np.testing.assert_allclose(times.t[:, 0].detach(), t, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(times.dt[:, 0].detach(), dt, rtol=1e-13)


def test_polynomial_starts_near_the_identity_and_ends_at_tau_to_the_m_plus_1():
    half = torch.tensor([0.5])
    assert PolynomialSchedule()(half).t[0, 0].item() == pytest.approx(0.492, abs=5e-4)
    extreme = PolynomialSchedule(rho=[-30.0] * 4 + [30.0])
    torch.testing.assert_close(extreme(GRID).t[:, 0], GRID**5)
    torch.testing.assert_close(extreme(GRID).dt[:, 0], 5 * GRID**4)


def test_chain_of_three_is_the_composition_of_its_curves():
    first, second = [0.1, -2.0, 1.0], [-1.0, 0.5, -3.0]
    tau = torch.linspace(0, 1, 9, dtype=torch.float64)
    t, dt = polynomial([first, second], groups=3)(tau)
    middle = polynomial(second)(tau)
    outer = polynomial(first)(middle.t[:, 0])
    torch.testing.assert_close(t[:, 1], middle.t[:, 0])
    torch.testing.assert_close(t[:, 0], outer.t[:, 0])
    torch.testing.assert_close(dt[:, 0], outer.dt[:, 0] * middle.dt[:, 0])


def test_gradient_reaches_rho_of_every_curve_and_freezing_stops_it():
    schedule = PolynomialSchedule(2, groups=3)
    schedule(torch.tensor([0.3, 0.8])).t.sum().backward()
    assert (schedule.rho.grad != 0).all()
    frozen = schedule.frozen()
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert torch.equal(frozen(GRID).t, schedule(GRID).t)
    frozen.rho.data.add_(1)
    assert not torch.equal(frozen.rho, schedule.rho)


def test_very_negative_rho_stays_finite():
    """softplus(-200) is 0 in float32, and 0 / 0 was NaN."""
    t, dt = PolynomialSchedule(rho=[-200.0] * 5)(GRID)
    assert t.isfinite().all()
    assert dt.isfinite().all()


@pytest.mark.parametrize("degree", [1, 2, 12])
def test_bernstein_polynomials_are_scipys(degree):
    inner = np.sort(np.random.default_rng(degree).random((degree - 1, 2)), axis=0)
    c = np.concatenate([np.zeros((1, 2)), inner, np.ones((1, 2))])
    schedule, expected, x = BernsteinSchedule(c.tolist()), BPoly(c[:, None], [0, 1]), np.linspace(0, 1, 101)
    found = schedule(torch.from_numpy(x))
    np.testing.assert_allclose(found.t.numpy(), expected(x), rtol=0, atol=1e-13)
    np.testing.assert_allclose(found.dt.numpy(), expected.derivative()(x), rtol=0, atol=1e-12)
    assert schedule.kinks == ()


def test_bernstein_coefficients_of_the_learned_family():
    """tau^5 has one coefficient, the identity those of a straight line."""
    extreme = BernsteinSchedule([[0.0, k / 5] for k in range(5)] + [[1.0, 1.0]])
    tau = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(extreme(tau).t, torch.stack([tau**5, tau], dim=1))
    with pytest.raises(ValueError, match="coefficients of 'texture' must run from 0 to 1 and never decrease"):
        BernsteinSchedule([[0.0, 0.0], [0.5, 0.5], [0.4, 0.6], [1.0, 1.0]])
    with pytest.raises(ValueError, match=r"of shape \[n \+ 1, G\]"):
        BernsteinSchedule([[0.0, 0.0]])


def test_independent_times_are_their_own_local_times_and_no_path():
    schedule = IndependentTimes(3)
    tau = torch.rand(5, 3)
    t, dt = schedule(tau)
    assert torch.equal(t, tau)
    assert torch.equal(dt, torch.ones(5, 3))
    assert schedule.clocks == 3
    assert schedule.path().to_dict() == SynchronousSchedule(3).to_dict()
    assert schedule_from_dict(schedule.to_dict()).to_dict() == schedule.to_dict()
    with pytest.raises(ValueError, match="no path: choose a schedule to go along"):
        schedule(torch.rand(5))
    with pytest.raises(ValueError, match=r"floating-point tensor \[B, 3\]"):
        schedule(torch.rand(5, 2))
    with pytest.raises(ValueError, match="at least two groups"):
        IndependentTimes(1)
    curve = polynomial([0.1, -2.0, 1.0])
    assert (curve.clocks, curve.path()) == (1, curve)


def test_derivative_at_a_kink_is_the_one_to_the_right():
    schedule = PiecewiseLinearSchedule([0.0, 0.5, 1.0], [[0.0], [0.25], [1.0]])
    assert schedule(torch.tensor([0.0, 0.5, 1.0])).dt[:, 0].tolist() == [0.5, 1.5, 1.5]
    assert schedule.kinks == (0.5,)


def test_knots_on_a_straight_line_are_no_kinks():
    assert PiecewiseLinearSchedule([0.0, 0.25, 1.0], [[0.0], [0.25], [1.0]]).kinks == ()


def test_inverse_is_exact_at_the_ends():
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert polynomial([0.1, -2.0, 2.0]).inverse(ends, 0).tolist() == [0.0, 1.0]
    assert SynchronousSchedule().inverse(ends, 1).tolist() == [0.0, 1.0]


def test_inverse_of_a_resting_group_is_when_it_starts_and_arrives():
    schedule = OffsetSchedule(0.3)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert schedule.inverse(ends, 0).tolist() == pytest.approx([0.3 / 1.3, 1.0], abs=1e-15)
    assert schedule.inverse(ends, 1).tolist() == pytest.approx([0.0, 1 / 1.3], abs=1e-15)


# Files and errors


def test_file_is_readable_json(tmp_path):
    schedule = PolynomialSchedule(rho=[0.5, -1.0, 0.25], degree=2, names=("pixels", "dino"))
    schedule.provenance = {"lambda": 0.04}
    assert json.loads(schedule.save(tmp_path / "s.json").read_text()) == {
        "format": "lwd-schedule/1",
        "kind": "polynomial",
        "groups": ["pixels", "dino"],
        "parameters": {"degree": 2, "rho": [[0.5, -1.0, 0.25]]},
        "provenance": {"lambda": 0.04},
    }


def described(kind: str, parameters: dict, groups=("texture", "semantic")) -> dict:
    return {"format": FORMAT, "kind": kind, "groups": list(groups), "parameters": parameters}


KNOTS = [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (described("polynomal", {}), "did you mean 'polynomial'"),
        (described("zzz", {}), "unknown kind 'zzz'. Known kinds: bernstein, cascaded"),
        (described(["offset"], {}), "unknown kind"),
        (described("polynomial", {"degree": 2, "rho": [[0, 0, 0]]}, ("a", "b", "c")), "3 groups and degree 2 need"),
        (described("polynomial", {"degree": 2, "rho": [[0] * 2] * 3}, ("a", "b", "c")), r"need \[2, 3\]"),
        (described("polynomial", {"degree": 2, "rho": [0, math.nan, 0]}), "NaN"),
        (described("polynomial", {"degree": 0, "rho": [0]}), "degree must be at least 1"),
        (described("polynomial", {"degree": 4}), "'rho'.* missing"),
        (described("polynomial", {"degree": 1, "rho": [0, 0], "delta": 1}), "delta"),
        (described("polynomial", {"degree": 1, "rho": [0, None]}), "must be real number"),
        (described("offset", {"delta": -0.1}), "delta"),
        (described("offset", {}), "'delta'.* missing"),
        (described("offset", []), "mapping"),
        (described("offset", {"delta": 0.3}, ("a", "a")), "group names must differ"),
        (described("shifted", {"shifts": [1.0, 2.0, 3.0]}), "3 group|3 shifts"),
        (described("shifted", {"shifts": [1.0, -2.0]}), "positive"),
        (described("piecewise_linear", {"tau": KNOTS, "t": [[0], [0.5], [1]]}), "group"),
        (described("piecewise_linear", {"tau": KNOTS, "t": [[0, 0], [0.6, 0.5], [0.5, 1]]}), "'texture' must run"),
        (
            described("piecewise_linear", {"tau": [0, 0.2, 0.5, 1], "t": [[0, 0], [0.1, 0.6], [0.5, 0.4], [1, 1]]}),
            "'semantic' runs backwards: 0.6 at tau = 0.2, then 0.4 at tau = 0.5",
        ),
        (described("piecewise_linear", {"tau": [0, 0.5, 0.5, 1], "t": [[0, 0]] * 3 + [[1, 1]]}), "strictly"),
        (described("piecewise_linear", {"tau": KNOTS, "t": [[0, 0], [math.nan, 0.5], [1, 1]]}), "'texture'"),
        (described("piecewise_linear", {"tau": [0, 1], "t": [[0, 0], [0.5, 0.5], [1, 1]]}), "shape"),
        ({"kind": "offset"}, "not a schedule file"),
        ([1, 2], "not a schedule file"),
        ({"format": FORMAT, "kind": "offset"}, "'groups', 'parameters'"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, data, message):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as error:
        load_schedule(path)
    assert str(path) in str(error.value)


def test_truncated_and_missing_files(tmp_path):
    path = OffsetSchedule().save(tmp_path / "s.json")
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match="truncated"):
        load_schedule(path)
    with pytest.raises(FileNotFoundError):
        load_schedule(tmp_path / "none.json")


def test_group_names_of_a_file_are_compared_with_the_latents(tmp_path):
    path = OffsetSchedule().save(tmp_path / "s.json")
    assert load_schedule(path, groups=["texture", "semantic"]).delta == 0.3
    with pytest.raises(ValueError, match=r"2 groups \('texture', 'semantic'\), but the latents have 3 groups"):
        load_schedule(path, groups=["texture", "semantic", "depth"])


def test_global_time_is_checked():
    schedule = SynchronousSchedule()
    for tau in ([-0.01, 0.5], [0.5, 1.01], [0.5, math.nan]):
        with pytest.raises(ValueError, match=r"lies in \[0, 1\]"):
            schedule(torch.tensor(tau))
    for tau in (torch.tensor([0, 1]), torch.tensor(0.5), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match=r"floating-point tensor \[B\]"):
            schedule(tau)
    with pytest.raises(ValueError, match=r"lies in \[0, 1\]"):
        schedule.inverse(torch.tensor([1.5]), 0)


def test_constructors_refuse_nonsense():
    with pytest.raises(ValueError, match="at least one group"):
        SynchronousSchedule(0)
    with pytest.raises(ValueError, match="two groups"):
        PolynomialSchedule(groups=1)
    with pytest.raises(ValueError, match="1 group names"):
        SynchronousSchedule(2, names=["only"])
    with pytest.raises(ValueError, match="NaN"):
        PolynomialSchedule(rho=[math.inf, 0, 0, 0, 0])


def test_a_new_kind_needs_one_class(tmp_path):
    """What docs promise to somebody who adds a schedule: a subclass with a `kind` is saved and loaded."""

    class Squared(Schedule):
        kind = "squared"

        def __init__(self, groups: int = 1, names=None) -> None:
            super().__init__(groups, names)

        def local_times(self, tau):
            return lwd.LocalTimes(tau[:, None] ** 2, 2 * tau[:, None])

        def parameters_dict(self):
            return {}

    try:
        assert isinstance(load_schedule(Squared().save(tmp_path / "s.json")), Squared)
        assert isinstance(schedule_from_dict(Squared().to_dict()), Squared)
    finally:
        del KINDS["squared"]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_schedule_follows_the_device_of_its_times(kind):
    """The meta device stands for any other."""
    made = {
        "polynomial": PolynomialSchedule(),
        "bernstein": BernsteinSchedule([[0.0, 0.0], [0.2, 0.6], [1.0, 1.0]]),
        "piecewise_linear": PiecewiseLinearSchedule([0.0, 0.5, 1.0], [[0.0, 0.0], [0.2, 0.7], [1.0, 1.0]]),
        "shifted": ShiftedSchedule(),
        "offset": OffsetSchedule(),
        "cascaded": CascadedSchedule(),
        "synchronous": SynchronousSchedule(),
        "independent": IndependentTimes(),
    }[kind]
    shape = (3,) if made.clocks == 1 else (3, made.clocks)
    there = made(torch.zeros(shape, device="meta"))
    assert there.t.device.type == there.dt.device.type == "meta"
    here = made(torch.full(shape, 0.25))
    again = made(torch.full(shape, 0.25))
    assert torch.equal(here.t, again.t)


@pytest.mark.parametrize(
    "schedule",
    [
        PolynomialSchedule(),
        BernsteinSchedule([[0.0, 0.0], [0.1, 0.5], [0.3, 0.9], [1.0, 1.0]]),
        OffsetSchedule(0.3),
        ShiftedSchedule(),
    ],
)
def test_autocast_does_not_round_times(schedule):
    tau = torch.linspace(0, 1, 101)
    plain = schedule(tau)
    with torch.autocast("cpu", torch.bfloat16):
        cast = schedule(tau)
    assert torch.equal(cast.t, plain.t)
    assert torch.equal(cast.dt, plain.dt)


def test_what_a_schedule_keeps_under_inference_mode_serves_training_too():
    schedule = OffsetSchedule(0.3)
    with torch.inference_mode():
        schedule(torch.tensor([0.4]))
    tau = torch.tensor([0.4], requires_grad=True)
    schedule(tau).t.sum().backward()
    assert tau.grad is not None
    torch.testing.assert_close(tau.grad, torch.tensor([2.6]))
