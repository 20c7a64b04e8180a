"""Sampling: seeds, records, steps over pieces, errors, and the reference's trajectories."""

import numpy as np
import pytest
import torch
from torch import Tensor

import lwd
from gaussian import TWO_GROUPS, normal, random_gaussian, unequal_spec
from lwd import CascadedSchedule, Group, LatentSpec, OffsetSchedule, PolynomialSchedule, SynchronousSchedule
from lwd.sampling import share_steps
from lwd.solvers import SOLVERS

DATA = random_gaussian(unequal_spec(2), positions=2)
NOISE = normal(3, 3, 1, 2)
LABELS = torch.zeros(3, dtype=torch.long)


# Values


def test_euler_by_hand():
    """One step of dz_g/dtau = t_g' v_g on each piece of a cascade: the semantic moves first, then the texture."""
    seen: list[tuple[list[float], list[float]]] = []

    def denoiser(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        seen.append((t[0].tolist(), z[0].flatten().tolist()))
        return torch.tensor([10.0, 1.0]).view(1, 2, 1, 1) + z

    noise = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1)
    result = lwd.sample(denoiser, CascadedSchedule(), noise, LABELS[:1], solver="euler", steps=2)
    assert seen == [([0.0, 0.0], [1.0, 2.0]), ([0.0, 1.0], [1.0, 5.0])]
    assert result.latents.flatten().tolist() == [12.0, 5.0]
    assert result.evaluations == 2


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_resting_group_does_not_move(solver):
    result = lwd.sample(DATA, OffsetSchedule(0.3), NOISE, LABELS, solver=solver, record=[0.1, 0.3 / 1.3, 0.9, 1.0])
    early, start, late, end = result.states
    assert torch.equal(early[:, :2], NOISE[:, :2])  # texture before t = 0
    assert torch.equal(start[:, :2], NOISE[:, :2])
    assert not torch.equal(early[:, 2], NOISE[:, 2])
    assert torch.equal(late[:, 2], end[:, 2])  # semantic after t = 1
    assert not torch.equal(late[:, :2], end[:, :2])


def test_only_the_path_matters_not_its_clock():
    """The same curve in (t_tex, t_sem), run at another speed, ends in the same samples."""

    class Squared(lwd.Schedule):
        def local_times(self, tau: Tensor) -> lwd.LocalTimes:
            t, dt = TWO_GROUPS["polynomial"].local_times(tau**2)
            return lwd.LocalTimes(t, dt * 2 * tau[:, None])

        def parameters_dict(self):
            raise NotImplementedError

    options = {"atol": 1e-10, "rtol": 1e-10}
    ends = [lwd.sample(DATA, s, NOISE, LABELS, **options).latents for s in (TWO_GROUPS["polynomial"], Squared(2))]
    torch.testing.assert_close(*ends, rtol=1e-7, atol=1e-7)


def test_records_are_states_on_the_way():
    schedule, taus = TWO_GROUPS["polynomial"], (0.75, 0.0, 0.25, 1.0)
    tight = {"atol": 1e-9, "rtol": 1e-9}
    recorded = lwd.sample(DATA, schedule, NOISE, LABELS, record=taus, **tight)
    assert recorded.times == taus
    assert torch.equal(recorded.states[1], NOISE)
    assert torch.equal(recorded.states[3], recorded.latents)
    plain = lwd.sample(DATA, schedule, NOISE, LABELS, **tight)
    assert plain.times == plain.states == ()
    torch.testing.assert_close(recorded.latents, plain.latents, rtol=1e-7, atol=1e-7)
    nothing_else = lwd.sample(DATA, schedule, NOISE, LABELS, record=[0.25], **tight)
    torch.testing.assert_close(nothing_else.states[0], recorded.states[2], rtol=1e-7, atol=1e-7)


def test_noise_is_not_written_to():
    before = NOISE.clone()
    for solver in SOLVERS:
        lwd.sample(DATA, TWO_GROUPS["offset"], NOISE, LABELS, solver=solver)
    assert torch.equal(NOISE, before)


def test_no_gradient_graph_is_kept():
    schedule = PolynomialSchedule()
    assert not lwd.sample(DATA, schedule, NOISE, LABELS, solver="euler", steps=2).latents.requires_grad


# Seeds


def test_noise_of_a_seed_does_not_depend_on_the_others():
    noise = lwd.seeded_noise([5, 2**40 + 1, 7], (3, 2, 2))
    assert torch.equal(noise[1:2], lwd.seeded_noise([2**40 + 1], (3, 2, 2)))
    assert torch.equal(noise[2], torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(7)))
    assert torch.equal(noise, lwd.seeded_noise(torch.tensor([5, 2**40 + 1, 7]), (3, 2, 2)))
    many = lwd.seeded_noise(range(2000), (8,))
    assert many.mean().item() == pytest.approx(0, abs=0.03)
    assert many.std().item() == pytest.approx(1, abs=0.03)


def test_image_of_a_seed_does_not_depend_on_the_batch_size(semantic_first):
    """With a network and in float32: equal to rounding, and to the number of evaluations."""
    model, _ = semantic_first
    noise, labels = lwd.seeded_noise([1, 2, 3], (12, 8, 8)), torch.tensor([1, 2, 3])
    together = lwd.sample(model, OffsetSchedule(0.3), noise, labels)
    alone = lwd.sample(model, OffsetSchedule(0.3), noise[1:2], labels[1:2])
    torch.testing.assert_close(alone.latents[0], together.latents[1], rtol=1e-4, atol=1e-4)
    assert alone.evaluations == together.evaluations_per_image[1]


# Steps and progress


def test_steps_are_shared_out_by_length():
    assert share_steps([(0.0, 0.25), (0.25, 1.0)], 8) == [2, 6]
    assert share_steps([(0.0, 1e-9), (1e-9, 1.0)], 5) == [1, 4]
    for n in range(3, 40):
        assert sum(share_steps([(0.0, 0.1), (0.1, 0.3), (0.3, 1.0)], n)) == n


def test_fifty_steps_by_default():
    assert lwd.sample(DATA, TWO_GROUPS["offset"], NOISE, LABELS, solver="heun").evaluations == 100


def test_times_of_the_steps_may_be_given():
    """Uniform times given one by one are the count; other times give the steps asked for, on either side of a stop."""
    schedule, options = OffsetSchedule(0.3), {"solver": "heun"}
    a, b = schedule.kinks
    counted = lwd.sample(DATA, schedule, NOISE, LABELS, steps=13, **options)
    uniform = [*np.linspace(0, a, 4)[:-1], *np.linspace(a, b, 8)[:-1], *np.linspace(b, 1, 4)]
    given = lwd.sample(DATA, schedule, NOISE, LABELS, steps=uniform, **options)
    torch.testing.assert_close(given.latents, counted.latents, rtol=1e-13, atol=1e-13)
    assert given.evaluations == 2 * 13

    seen: list[float] = []
    lwd.sample(DATA, schedule, NOISE, LABELS, solver="euler", steps=[0.0, a, 0.3, b, 1.0], on_evaluation=seen.append)
    assert seen == [0.0, a, 0.3, b]


def test_recorded_times_join_the_given_ones():
    times, more = [0.0, 0.4, 1.0], [0.0, 0.4, 0.5, 1.0]
    schedule, options = TWO_GROUPS["polynomial"], {"solver": "midpoint", "record": [0.4, 0.5]}
    joined = lwd.sample(DATA, schedule, NOISE, LABELS, steps=times, **options)
    written = lwd.sample(DATA, schedule, NOISE, LABELS, steps=more, **options)
    assert joined.evaluations == written.evaluations == 6
    assert all(torch.equal(*states) for states in zip(joined.states, written.states, strict=True))
    assert torch.equal(joined.latents, written.latents)


class AlongGlobalTime:
    """A denoiser whose velocity is the global time itself."""

    needs_tau, spec = True, DATA.spec

    def __init__(self) -> None:
        self.taus: list[Tensor] = []

    def __call__(self, z: Tensor, t: Tensor, labels: Tensor, *, tau: Tensor) -> Tensor:
        assert tau.shape == labels.shape
        assert tau.dtype == z.dtype
        self.taus.append(tau)
        return tau[:, None, None, None].expand_as(z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_denoiser_may_ask_for_global_time(dtype):
    """dz/dtau = tau: the state grows by 1/2, whatever the solver; a resting group of a cascade by less."""
    noise = NOISE.to(dtype)
    for solver in ("dopri5", "midpoint"):
        result = lwd.sample(AlongGlobalTime(), SynchronousSchedule(), noise, LABELS, solver=solver)
        torch.testing.assert_close(result.latents, noise + 0.5, rtol=1e-5, atol=1e-5)
    denoiser = AlongGlobalTime()
    result = lwd.sample(denoiser, CascadedSchedule(), noise, LABELS, solver="midpoint", steps=2)
    # t' = 2 in the half in which a group moves: integral of 2 tau over it.
    torch.testing.assert_close(result.latents[:, :2], noise[:, :2] + 0.75, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.latents[:, 2], noise[:, 2] + 0.25, rtol=1e-6, atol=1e-6)
    assert [tau[0].item() for tau in denoiser.taus] == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("solver", ["dopri5", "heun", "ab3"])
def test_progress_runs_from_0_to_1(solver):
    times: list[float] = []
    result = lwd.sample(DATA, TWO_GROUPS["offset"], NOISE[:1], LABELS[:1], solver=solver, on_evaluation=times.append)
    assert len(times) == result.evaluations
    assert times[0] == 0
    assert times[-1] == pytest.approx(0.98 if solver == "ab3" else 1, abs=2e-3)
    assert all(0 <= time <= 1 for time in times)


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "rk4"}, "unknown solver 'rk4'; choose one of dopri5, ab2, ab3"),
        ({"steps": 50}, "chooses its own steps"),
        ({"solver": "euler", "steps": 2}, "2 steps for a path of 3 pieces"),
        ({"solver": "euler", "steps": 0}, "at least one each"),
        ({"solver": "euler", "steps": [0.0, 0.5, 1.0]}, r"lack \[0\.23\d+, 0\.76\d+\]"),
        ({"solver": "euler", "steps": [0.0, 0.3 / 1.3, 0.5, 1.0]}, r"lack \[0\.76\d+\], where a group starts"),
        ({"solver": "euler", "steps": [0.0, 0.5, 0.5, 1.0]}, "increase strictly from 0 to 1"),
        ({"solver": "euler", "steps": [0.1, 1.0]}, "increase strictly from 0 to 1"),
        ({"solver": "euler", "steps": []}, "increase strictly from 0 to 1"),
        ({"solver": "euler", "steps": [0.0, float("nan"), 1.0]}, "increase strictly from 0 to 1"),
        ({"steps": [0.0, 1.0]}, "chooses its own steps"),
        ({"record": [0.5, 1.5]}, r"lie in \[0, 1\]"),
        ({"record": [float("nan")]}, r"lie in \[0, 1\]"),
    ],
)
def test_contradictory_settings(options, message):
    with pytest.raises(ValueError, match=message):
        lwd.sample(DATA, OffsetSchedule(0.3), NOISE, LABELS, **options)


def test_shapes_that_do_not_match():
    with pytest.raises(ValueError, match=r"labels have shape \(2,\), expected \[3\]"):
        lwd.sample(DATA, OffsetSchedule(), NOISE, LABELS[:2])
    with pytest.raises(ValueError, match="3 channels, the tensor 2"):
        lwd.sample(DATA, OffsetSchedule(), NOISE[:, :2], LABELS)
    with pytest.raises(ValueError, match=r"2 groups \('group0', 'group1'\), the schedule 3"):
        lwd.sample(DATA, SynchronousSchedule(3), NOISE, LABELS)
    with pytest.raises(ValueError, match=r"the denoiser returned \(3, 1, 1, 2\)"):
        lwd.sample(lambda z, t, labels: z[:, :1], OffsetSchedule(), NOISE, LABELS, spec=DATA.spec)
    with pytest.raises(ValueError, match="cannot tell how 3 channels divide into 2 groups"):
        lwd.sample(lambda z, t, labels: z, OffsetSchedule(), NOISE, LABELS)
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        lwd.sample(DATA, OffsetSchedule(), NOISE[..., 0], LABELS)


def test_spec_is_inferred_where_only_one_fits():
    noise = NOISE[:, :2]
    result = lwd.sample(lambda z, t, labels: z, OffsetSchedule(), noise, LABELS, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(result.latents, noise * torch.e, rtol=1e-7, atol=1e-7)
    one = lwd.sample(lambda z, t, labels: -z, SynchronousSchedule(1), NOISE, LABELS, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(one.latents, NOISE / torch.e, rtol=1e-7, atol=1e-7)
    spec = LatentSpec([Group("a", 1), Group("b", 2)])
    options = {"solver": "euler", "steps": 5}
    given = lwd.sample(DATA, OffsetSchedule(), NOISE, LABELS, spec=spec, **options).latents
    assert not torch.equal(given, lwd.sample(DATA, OffsetSchedule(), NOISE, LABELS, **options).latents)


# The reference's trajectories


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_offset_path_of_semantic_first_diffusion(semantic_first):
    model, values = semantic_first
    noise, labels, exact = values["x0"], values["y"], values["ode_tight"]
    result = lwd.sample(model, OffsetSchedule(0.3), noise, labels, atol=1e-7, rtol=1e-5)
    assert relative(result.latents, exact) < 1e-4
    # At the tolerances of the paper, without stepping over the kinks, we are closer than the reference's own solver.
    ours = lwd.sample(model, OffsetSchedule(0.3), noise, labels)
    theirs = relative(values["ode_dopri5"], exact)
    assert theirs > 0.01
    assert relative(ours.latents, exact) < 1e-4


def test_synchronous_path_of_lightningdit(one_clock):
    model, values = one_clock
    exact = lwd.sample(model, SynchronousSchedule(1), values["x0"], values["y"], atol=1e-8, rtol=1e-6).latents
    assert relative(values["ode_dopri5"], exact) < 2e-3
    ours = lwd.sample(model, SynchronousSchedule(1), values["x0"], values["y"]).latents
    assert relative(ours, exact) < 2e-3
