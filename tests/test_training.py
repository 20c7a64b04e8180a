"""Stage I and stage II: exact resume, averages, streams, stops on NaN."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from lwd.batches import Batches
from lwd.checkpoints import Checkpoints
from lwd.data import TensorLatents
from lwd.latents import Group, LatentSpec
from lwd.loop import NonFiniteLossError
from lwd.probe import (
    COLLAPSE_DELAY,
    LearnedSchedule,
    ProbeConfig,
    delay,
    learn_schedule,
)
from lwd.randomness import stream
from lwd.schedules import IndependentTimes, OffsetSchedule, PolynomialSchedule, SynchronousSchedule, load_schedule
from lwd.steps import OptimizerConfig
from lwd.sweep import Sweep, bisect_kinetic, sweep_kinetic, weakest_stable
from lwd.training import TrainConfig, train

SPEC = LatentSpec([Group("texture", 3, 1.0), Group("semantic", 2, 1.5)])


class TinyDenoiser(nn.Module):
    """Small, nonlinear, aware of times and labels; has a null label."""

    def __init__(self) -> None:
        super().__init__()
        self.spec, self.null_label = SPEC, 4
        self.label = nn.Embedding(5, 8)
        self.time = nn.Linear(2, 8)
        self.into, self.out = nn.Conv2d(5, 8, 1), nn.Conv2d(8, 5, 1)

    def forward(self, z: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        condition = self.time(t) + self.label(labels)
        return self.out(torch.tanh(self.into(z) + condition[:, :, None, None]))


def tiny() -> TinyDenoiser:
    torch.manual_seed(0)
    return TinyDenoiser()


@pytest.fixture
def data() -> TensorLatents:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(30, 5, 4, 4, generator=generator)
    latents[:, 3:] = 0.8 * latents[:, :2] + 0.6 * latents[:, 3:]
    return TensorLatents(SPEC, latents, torch.arange(30) % 4)


PROBE = ProbeConfig(
    steps=12, burn_in=5, batch_size=8, precision="float32", log_every=3, rho_lr=0.05, save_seconds=0, kinetic=0.02
)
TRAIN = TrainConfig(
    steps=12, batch_size=8, precision="float32", log_every=3, save_seconds=0, repa=0.0, ema=0.9, snapshots=(4, 12),
    optimizer=OptimizerConfig(lr=1e-2, warmup_steps=3, decay="cosine"),
)  # fmt: skip


class StoppedError(Exception):
    pass


class StopsAt(TensorLatents):
    """Data that break off a run like a power failure, at the given batch."""

    calls = 0
    stop = 10**9

    def gather(self, indices, flip=None):
        self.calls += 1
        if self.calls > self.stop:
            raise StoppedError
        return super().gather(indices, flip)


def interrupted(data: TensorLatents, stop: int) -> StopsAt:
    broken = StopsAt(SPEC, data.latents, data.labels)
    broken.stop = stop
    return broken


def weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def log_without_speed(path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("images_per_second", "waited_for_data")} for row in rows]


def newest(directory) -> tuple[int, dict]:
    """Step and contents of the newest checkpoint, as torch reads it without knowing what is in it."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    step = Checkpoints(directory).steps()[-1]
    dcp_to_torch_save(Checkpoints(directory).path(step), directory / "read.pt")
    return step, torch.load(directory / "read.pt")


def flat(state, prefix="") -> dict:
    if not isinstance(state, dict):
        return {prefix: state}
    return {k: v for name, value in state.items() for k, v in flat(value, f"{prefix}/{name}").items()}


@pytest.mark.parametrize("stop", [1, 4, 8, 11])
def test_interrupted_probe_equals_the_uninterrupted_one_bit_for_bit(tmp_path, data, stop):
    whole_net, broken_net = tiny(), tiny()
    whole = learn_schedule(whole_net, data, PROBE, directory=tmp_path / "whole")
    with pytest.raises(StoppedError):
        learn_schedule(tiny(), interrupted(data, stop), PROBE, directory=tmp_path / "broken")
    resumed = learn_schedule(broken_net, data, PROBE, directory=tmp_path / "broken")
    assert torch.equal(whole.schedule.rho, resumed.schedule.rho)
    assert torch.equal(weights(whole_net), weights(broken_net))
    assert log_without_speed(tmp_path / "whole/metrics.jsonl") == log_without_speed(tmp_path / "broken/metrics.jsonl")
    (_, a), (_, b) = (newest(tmp_path / d) for d in ("whole", "broken"))
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    assert any("exp_avg_sq" in name for name in a)
    for name, value in a.items():
        assert torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name], name


@pytest.mark.parametrize(
    ("stop", "schedule"), [(2, OffsetSchedule(0.3)), (7, OffsetSchedule(0.3)), (7, IndependentTimes())]
)
def test_interrupted_training_equals_the_uninterrupted_one_bit_for_bit(tmp_path, data, stop, schedule):
    whole = train(tiny(), schedule, data, TRAIN, directory=tmp_path / "whole")
    with pytest.raises(StoppedError):
        train(tiny(), schedule, interrupted(data, stop), TRAIN, directory=tmp_path / "broken")
    resumed = train(tiny(), schedule, data, TRAIN, directory=tmp_path / "broken")
    assert torch.equal(weights(whole.denoiser), weights(resumed.denoiser))
    assert log_without_speed(tmp_path / "whole/metrics.jsonl") == log_without_speed(tmp_path / "broken/metrics.jsonl")
    for snapshot in ("00000004.safetensors", "00000012.safetensors"):
        assert (tmp_path / "whole/snapshots" / snapshot).read_bytes() == (
            tmp_path / "broken/snapshots" / snapshot
        ).read_bytes()


def test_probe_averages_rho_after_the_burn_in(data):
    """The mean of rho over the steps after the burn-in, from a probe that logs each of them."""
    learned = learn_schedule(tiny(), data, replace(PROBE, log_every=1))
    rhos = torch.tensor([row["rho"] for row in learned.history], dtype=torch.float64)
    torch.testing.assert_close(learned.schedule.rho.double(), rhos[PROBE.burn_in :].mean(dim=0), rtol=1e-6, atol=1e-6)
    assert [row["step"] for row in learned.history] == list(range(1, 13))
    assert not learned.schedule.rho.requires_grad
    assert learned.schedule.provenance["probe"]["kinetic"] == 0.02


def test_probe_moves_rho_by_its_own_learning_rate(data):
    """AdamW's first step has the size of the learning rate in every component: 0.05 for rho, 1e-4 for the denoiser."""
    net = tiny()
    before = weights(net)
    learned = learn_schedule(net, data, replace(PROBE, steps=1, burn_in=0, log_every=1))
    moved = (learned.schedule.rho - PolynomialSchedule().rho).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.05), rtol=1e-2, atol=0)
    assert (weights(net) - before).abs().max().item() == pytest.approx(1e-4, rel=1e-2)


def test_probe_starts_where_it_is_told(data):
    start = (0.5, -1.0, 0.0, 1.0, 2.0)
    learned = learn_schedule(tiny(), data, replace(PROBE, rho=start, steps=1, burn_in=0))
    moved = (learned.schedule.rho[0] - torch.tensor(start)).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.05), rtol=1e-2, atol=0)
    with pytest.raises(ValueError, match="rho has 2 values; a curve of degree 4 needs 5"):
        replace(PROBE, rho=(0.0, 1.0))


def test_average_is_the_exponential_moving_average(data):
    """With decay 0 the result is the last iterate; with 0.9 it is the recursion over the iterates."""
    iterates = [
        weights(train(tiny(), SynchronousSchedule(), data, replace(TRAIN, ema=0.0, steps=n, snapshots=(),
                optimizer=OptimizerConfig(lr=1e-2))).denoiser)
        for n in (1, 2, 3)
    ]  # fmt: skip
    expected = weights(tiny())
    for iterate in iterates:
        expected = 0.9 * expected + 0.1 * iterate
    config = replace(TRAIN, steps=3, snapshots=(), optimizer=OptimizerConfig(lr=1e-2))
    result = train(tiny(), SynchronousSchedule(), data, config)
    torch.testing.assert_close(weights(result.denoiser), expected, rtol=1e-6, atol=1e-7)


def test_learning_rate_schedules():
    linear = OptimizerConfig(warmup_steps=4, decay="linear")
    assert [linear.factor(s, 14) for s in (0, 3, 4, 9, 13)] == pytest.approx([0.25, 1.0, 1.0, 0.5, 0.1])
    assert OptimizerConfig(decay="cosine").factor(5, 10) == pytest.approx(0.5)
    assert OptimizerConfig().factor(999, 1000) == 1.0


def test_training_loss_falls(data):
    config = replace(TRAIN, steps=200, log_every=20, snapshots=(), optimizer=OptimizerConfig(lr=1e-2))
    history = train(tiny(), SynchronousSchedule(), data, config).history
    assert history[-1]["flow"] < 0.9 * history[0]["flow"]


def test_training_on_independent_times_sees_every_combination(data):
    """The loss of a zero network by bands of local time is that of the target alone, in every band of either group."""
    zero = tiny()
    nn.init.zeros_(zero.out.weight)
    nn.init.zeros_(zero.out.bias)
    config = replace(TRAIN, steps=1, batch_size=30 * 40, optimizer=OptimizerConfig(lr=0.0), label_dropout=0.0)
    row = train(zero, IndependentTimes(), data, config).history[-1]
    for name in SPEC.names:
        by_time = torch.tensor(row[f"loss_{name}_by_time"])
        assert len(by_time) == 10
        torch.testing.assert_close(by_time, torch.full_like(by_time, 2.0), rtol=0.1, atol=0)
    # Without a Jacobian: w_g d_g / D of l_g = 2 for each.
    assert row["flow"] == pytest.approx((3 * 1 + 2 * 1.5) / 5 * 2, rel=0.03)


def test_batches_are_functions_of_the_step(data):
    first = Batches(data, TRAIN, tiny(), torch.device("cpu"))
    second = Batches(data, TRAIN, tiny(), torch.device("cpu"))
    for step in (0, 1):
        second.draw(step)
    a, b = first.draw(7), second.draw(7)
    assert torch.equal(a.x0, b.x0)
    assert torch.equal(a.tau, b.tau)
    assert torch.equal(a.labels, b.labels)
    assert not torch.equal(a.x0, first.draw(8).x0)
    many = Batches(data, replace(TRAIN, batch_size=4000, label_dropout=0.25), tiny(), torch.device("cpu"))
    independent = many.draw(0, clocks=2)
    assert torch.equal(independent.x0, many.draw(0).x0)
    assert independent.tau.shape == (4000, 2)
    assert abs(torch.corrcoef(independent.tau.T)[0, 1].item()) < 0.05
    dropped = many.draw(0).labels
    assert (dropped == 4).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_streams_of_different_purposes_differ():
    draws = {torch.randn(1, generator=stream(0, p, s)).item() for p in ("noise", "order") for s in range(50)}
    assert len(draws) == 100


def test_nan_in_the_data_stops_with_step_and_image_and_keeps_the_checkpoint(tmp_path, data):
    train(tiny(), SynchronousSchedule(), data, replace(TRAIN, steps=6, snapshots=()), directory=tmp_path)
    assert Checkpoints(tmp_path).steps() == [3, 6]
    poisoned = TensorLatents(SPEC, data.latents.clone(), data.labels, normalization=data.normalization)
    poisoned.latents[:] = float("nan")
    with pytest.raises(ValueError, match=r"train.steps: 6 in the checkpoint, 12 now"):
        train(tiny(), SynchronousSchedule(), poisoned, replace(TRAIN, snapshots=()), directory=tmp_path)
    assert Checkpoints(tmp_path).steps() == [3, 6]

    class TurnsBad(TensorLatents):
        def gather(self, indices, flip=None):
            batch = super().gather(indices, flip)
            if 17 in indices.tolist() and Checkpoints(tmp_path / "late").steps():
                batch.latents[indices == 17] = float("nan")
            return batch

    with pytest.raises(NonFiniteLossError, match=r"not finite at step \d+ .*images \[17\]"):
        train(
            tiny(),
            SynchronousSchedule(),
            TurnsBad(SPEC, data.latents, data.labels),
            TRAIN,
            directory=tmp_path / "late",
        )
    _, state = newest(tmp_path / "late")
    assert all(v.isfinite().all() for v in state["network"].values())


def test_diverged_update_is_told_from_bad_data(data):
    config = replace(TRAIN, optimizer=OptimizerConfig(lr=1e38), snapshots=())
    with pytest.raises(NonFiniteLossError, match="the update diverged"):
        train(tiny(), SynchronousSchedule(), data, config)


def test_resuming_with_other_settings_lists_the_differences(tmp_path, data):
    learn_schedule(tiny(), data, PROBE, directory=tmp_path)
    with pytest.raises(ValueError, match=r"probe.kinetic: 0.02 in the checkpoint, 0.5 now"):
        learn_schedule(tiny(), data, replace(PROBE, kinetic=0.5), directory=tmp_path)


def test_truncated_checkpoint_is_named(tmp_path, data):
    learn_schedule(tiny(), data, PROBE, directory=tmp_path)
    (path,) = (tmp_path / "checkpoints" / "step-00000012").glob("*.distcp")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"step-00000012 is damaged .*; delete it to go on from step 9"):
        learn_schedule(tiny(), data, PROBE, directory=tmp_path)


def test_half_written_log_line_is_dropped_on_resume(tmp_path, data):
    with pytest.raises(StoppedError):
        learn_schedule(tiny(), interrupted(data, 8), PROBE, directory=tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as log:
        log.write('{"step": 9, "lo')
    learn_schedule(tiny(), data, PROBE, directory=tmp_path)
    assert [row["step"] for row in log_without_speed(tmp_path / "metrics.jsonl")] == [3, 6, 9, 12]


def test_groups_that_differ_are_refused(data):
    with pytest.raises(ValueError, match=r"groups \('texture', 'depth'\)"):
        train(tiny(), SynchronousSchedule(names=("texture", "depth")), data, TRAIN)
    other = TensorLatents(LatentSpec([Group("texture", 2), Group("semantic", 3)]), data.latents, data.labels)
    with pytest.raises(ValueError, match=r"\(3, 2\) channels, the latents have \(2, 3\)"):
        train(tiny(), SynchronousSchedule(), other, TRAIN)


def test_burn_in_must_leave_something_to_average():
    with pytest.raises(ValueError, match="rho is averaged after it"):
        ProbeConfig(steps=10, burn_in=10)


# --- collapse and selection --------------------------------------------------------------------------------------


def test_delay_is_the_area_share():
    """0 for the identity, 1 for tau^5, and the area by quadrature in between."""
    identity = PolynomialSchedule(rho=[10.0, -40.0, -40.0, -40.0, -40.0])
    extreme = PolynomialSchedule(rho=[-40.0, -40.0, -40.0, -40.0, 10.0])
    assert delay(identity) == pytest.approx(0.0, abs=1e-9)
    assert delay(extreme) == pytest.approx(1.0, abs=1e-9)
    between = PolynomialSchedule(rho=[0.3, -1.0, 0.5, -2.0, 1.0])
    tau = torch.linspace(0, 1, 20001, dtype=torch.float64)
    with torch.no_grad():
        t = between(tau).t[:, 0]
    assert delay(between) == pytest.approx(float(torch.trapezoid(tau - t, tau)) / (1 / 2 - 1 / 6), rel=1e-6)


@pytest.mark.parametrize(
    ("collapsed", "picked"),
    [
        ([True, True, False, False], 0.04),
        ([False, False, False, False], 0.0),
        ([True, False, True, False], 0.1),
        ([True, True, True, True], None),
    ],
)
def test_the_weakest_stable_value_is_picked(collapsed, picked):
    assert weakest_stable([0.0, 0.02, 0.04, 0.1][: len(collapsed)], collapsed) == (picked if picked != 0.04 else 0.04)


def test_sweep_round_trip_and_continuation(tmp_path, data):
    config = replace(PROBE, steps=6, burn_in=2)
    sweep = sweep_kinetic(tiny, data, config, [0.5, 0.0], directory=tmp_path)
    assert sweep.kinetics == (0.0, 0.5)
    again = sweep_kinetic(tiny, data, config, [0.0, 0.5], directory=tmp_path)
    assert all(torch.equal(a.schedule.rho, b.schedule.rho) for a, b in zip(sweep.probes, again.probes, strict=True))
    sweep.save(tmp_path / "sweep.json")
    loaded = Sweep.load(tmp_path / "sweep.json")
    assert loaded.picked == sweep.picked
    assert loaded.probes[1].history == sweep.probes[1].history
    assert torch.equal(loaded.schedule.rho, sweep.schedule.rho)
    stored = load_schedule(tmp_path / "lambda-0.5" / "schedule.json", SPEC.names)
    assert stored.provenance["probe"]["kinetic"] == 0.5


def test_sweep_without_a_stable_value_says_so():
    extreme = LearnedSchedule(PolynomialSchedule(rho=[-9.0, -9.0, -9.0, -9.0, 9.0]), [], 0.99)
    assert extreme.delay > COLLAPSE_DELAY
    with pytest.raises(ValueError, match=r"every probe collapsed .* lambda = 0.04"):
        _ = Sweep((0.04,), (extreme,), None).schedule


def test_bisection_narrows_the_threshold_down():
    """With a threshold at 0.037 the interval from 0.01 to 0.16, a ratio of 16, shrinks to one of sqrt(2) around it."""

    def probe(kinetic: float) -> LearnedSchedule:
        return LearnedSchedule(PolynomialSchedule(), [], 0.9 if kinetic < 0.037 else 0.4)

    sweep = bisect_kinetic(probe, 0.01, 0.16, rounds=3)
    assert sweep.kinetics == (0.01, 0.02, 0.0283, 0.04, 0.16)
    assert sweep.picked == 0.04
    assert bisect_kinetic(probe, 0.0, 0.16, rounds=2).kinetics == (0.0, 0.04, 0.08, 0.16)
    assert bisect_kinetic(probe, 0.05, 0.1).picked == 0.05  # nothing to look for: the lower end is stable
    assert bisect_kinetic(probe, 0.01, 0.02).picked is None
    with pytest.raises(ValueError, match="must ascend"):
        bisect_kinetic(probe, 0.1, 0.1)


def test_every_milestone_has_a_checkpoint_however_seldom_they_are_made(tmp_path, data):
    config = replace(TRAIN, steps=12, log_every=5, save_seconds=1e9, keep_every=4, keep_last=1, snapshots=())
    history = train(tiny(), OffsetSchedule(0.3), data, config, directory=tmp_path).history
    assert Checkpoints(tmp_path).steps() == [4, 8, 12]
    assert [row["step"] for row in history] == [4, 5, 8, 10, 12]


def test_a_checkpoint_beyond_the_steps_asked_for_is_refused(tmp_path, data):
    config = replace(TRAIN, optimizer=OptimizerConfig(lr=1e-2), snapshots=())
    train(tiny(), OffsetSchedule(0.3), data, config, directory=tmp_path)
    with pytest.raises(ValueError, match=r"step-00000012 is beyond the 4 steps asked for"):
        train(tiny(), OffsetSchedule(0.3), data, replace(config, steps=4), directory=tmp_path)


def test_the_former_end_of_a_run_made_longer_can_be_a_snapshot(tmp_path, data):
    from safetensors.torch import load_file

    config = replace(TRAIN, steps=4, optimizer=OptimizerConfig(lr=1e-2), snapshots=(2,))
    short = train(tiny(), OffsetSchedule(0.3), data, config, directory=tmp_path).denoiser
    train(tiny(), OffsetSchedule(0.3), data, replace(config, steps=8, snapshots=(2, 4)), directory=tmp_path)
    assert sorted(path.name for path in (tmp_path / "snapshots").iterdir()) == [
        "00000002.safetensors", "00000004.safetensors"
    ]  # fmt: skip
    kept = load_file(tmp_path / "snapshots" / "00000004.safetensors")
    for name, value in short.state_dict().items():
        assert torch.equal(kept[name], value), name


def test_the_probe_decays_the_weights_of_the_denoiser_and_not_rho(data):
    """With a rate of rho of 0 and decay alone at work, weights shrink by (1 - lr * decay) a step."""
    decayed = replace(PROBE, steps=6, rho_lr=0.0, optimizer=OptimizerConfig(lr=1e-9, weight_decay=1e6))
    net, before = tiny(), weights(tiny())
    learned = learn_schedule(net, data, decayed)
    torch.testing.assert_close(weights(net), before * (1 - 1e-3) ** 6, rtol=1e-5, atol=1e-6)
    assert torch.equal(learned.schedule.rho, PolynomialSchedule(names=SPEC.names).rho.data)


def test_labels_that_the_denoiser_has_no_class_for_are_refused(data):
    from networks import SMALL, random_model

    counted_from_one = TensorLatents(SMALL.spec, torch.randn(9, 6, 4, 4), torch.arange(9) % 3 + 1)
    for run in (
        lambda: train(random_model(SMALL), OffsetSchedule(0.3), counted_from_one, TRAIN),
        lambda: learn_schedule(random_model(SMALL), counted_from_one, PROBE),
    ):
        with pytest.raises(ValueError, match="labels up to 3, but the denoiser has classes 0 to 2 only"):
            run()


def test_a_projector_needs_features(data):
    from networks import SMALL, random_model

    model = random_model(replace(SMALL, repa_depth=1, repa_dim=8, repa_projector_dim=8))
    plain = TensorLatents(SMALL.spec, torch.randn(9, 6, 4, 4), torch.arange(9) % 3)
    with pytest.raises(ValueError, match="a REPA projector, but the data have no features"):
        train(model, OffsetSchedule(0.3), plain, replace(TRAIN, repa=1.0))
