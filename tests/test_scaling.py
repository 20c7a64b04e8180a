"""What long runs need: checkpoints that are kept or not, skipped steps, recomputed blocks, watching, validation."""

import json
from dataclasses import replace

import pytest
import torch

from distributed_worker import SPEC, TRAIN, Blocked, make_data
from gaussian import polynomial, random_gaussian
from lwd import CascadedSchedule, Group, LatentSpec, Normalization, OffsetSchedule, SynchronousSchedule
from lwd.checkpoints import Checkpoints
from lwd.data import TensorLatents
from lwd.loop import Hook, _mean_metrics, run_job
from lwd.metrics import MetricsLog, TensorBoard, WeightsAndBiases, flat
from lwd.parallel import Average, Trained, adamw, guarded_step
from lwd.probe import learn_schedule
from lwd.steps import EXECUTION, by_time
from lwd.training import train
from lwd.validation import HORIZON, Validation
from networks import SMALL, inputs, random_model

# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_the_newest_checkpoints_and_every_nth_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_every=20)
    for step in range(10, 80, 10):
        checkpoints.save(step, {"value": torch.tensor(float(step))}, {"step": step})
    checkpoints.finish()
    assert checkpoints.steps() == [20, 40, 60, 70]
    state = {"value": torch.zeros(())}
    assert checkpoints.load(60, state)["value"] == 60
    assert checkpoints.meta(70) == {"step": 70}
    with pytest.raises(ValueError, match="at least one"):
        Checkpoints(tmp_path, keep_last=0)


def test_what_changes_after_save_is_not_in_the_checkpoint(tmp_path):
    checkpoints, value = Checkpoints(tmp_path), torch.zeros(1_000_000)
    checkpoints.save(1, {"value": value}, {})
    value.fill_(1)
    checkpoints.finish()
    assert not checkpoints.load(1, {"value": torch.ones(1_000_000)})["value"].any()


def test_half_a_checkpoint_is_none(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"value": torch.ones(1)}, {}, wait=True)
    (tmp_path / "checkpoints" / ".step-00000002.partial").mkdir()
    assert checkpoints.steps() == [1]
    checkpoints.save(3, {"value": torch.ones(1)}, {}, wait=True)
    assert not (tmp_path / "checkpoints" / ".step-00000002.partial").exists()


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    from lwd import checkpoints as module

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"value": torch.ones(1)}, {}, wait=True)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_json", full)
    checkpoints.save(2, {"value": torch.ones(1)}, {})
    with pytest.raises(OSError, match=r"could not write a checkpoint .*No space left.*run the same command again"):
        checkpoints.finish()
    assert checkpoints.steps() == [1]


def test_resuming_can_be_demanded(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .* to resume from"):
        train(Blocked(), OffsetSchedule(0.3), make_data(), TRAIN, directory=tmp_path, must_resume=True)


def test_how_a_run_is_carried_out_may_change_on_the_way(tmp_path):
    train(Blocked(), OffsetSchedule(0.3), make_data(), replace(TRAIN, steps=10), directory=tmp_path)
    changed = replace(TRAIN, steps=10, accumulate=4, log_every=1, keep_last=1, save_seconds=99)
    assert {"accumulate", "log_every", "keep_last", "save_seconds"} <= EXECUTION
    assert len(train(Blocked(), OffsetSchedule(0.3), make_data(), changed, directory=tmp_path).history) == 2
    with pytest.raises(ValueError, match=r"train.batch_size: 8 in the checkpoint, 4 now"):
        train(Blocked(), OffsetSchedule(0.3), make_data(), replace(TRAIN, steps=10, batch_size=4), directory=tmp_path)


def test_a_training_at_a_constant_rate_can_be_made_longer(tmp_path):
    """Ten steps, then forty more, are the fifty of one run; with a decaying rate that is refused."""
    train(Blocked(), OffsetSchedule(0.3), make_data(), replace(TRAIN, steps=10), directory=tmp_path / "grown")
    grown = train(Blocked(), OffsetSchedule(0.3), make_data(), TRAIN, directory=tmp_path / "grown")
    whole = train(Blocked(), OffsetSchedule(0.3), make_data(), TRAIN)
    for a, b in zip(grown.denoiser.parameters(), whole.denoiser.parameters(), strict=True):
        assert torch.equal(a, b)
    decaying = replace(TRAIN, steps=5, optimizer=replace(TRAIN.optimizer, decay="linear"))
    train(Blocked(), OffsetSchedule(0.3), make_data(), decaying, directory=tmp_path / "fixed")
    with pytest.raises(ValueError, match=r"train.steps: 5 in the checkpoint, 6 now"):
        train(Blocked(), OffsetSchedule(0.3), make_data(), replace(decaying, steps=6), directory=tmp_path / "fixed")


def test_a_run_remembers_its_latents(tmp_path):
    data = make_data()
    data.fingerprint = "abc"
    train(Blocked(), OffsetSchedule(0.3), data, replace(TRAIN, steps=2), directory=tmp_path)
    data.fingerprint = "def"
    with pytest.raises(ValueError, match=r"latents: 'abc' in the checkpoint, 'def' now"):
        train(Blocked(), OffsetSchedule(0.3), data, replace(TRAIN, steps=2), directory=tmp_path)


# --- numerics ------------------------------------------------------------------------------------------------------


class Poisoned(TensorLatents):
    """One batch of NaN."""

    calls = 0

    def gather(self, indices, flip=None):
        self.calls += 1
        batch = super().gather(indices, flip)
        if self.calls == 7:
            batch.latents.fill_(float("nan"))
        return batch


def test_a_step_that_is_not_finite_is_left_out_and_counted():
    config = replace(TRAIN, steps=10, skip_non_finite=True, flips=False)
    history = train(Blocked(), OffsetSchedule(0.3), make_data(Poisoned), config).history
    assert history[0].get("skipped") is None
    assert history[1]["skipped"] == 1
    assert history[1]["loss"] < 10
    healthy = train(Blocked(), OffsetSchedule(0.3), make_data(), replace(config, steps=6)).denoiser
    # The 7th step changed nothing: weights after 7 steps are those after 6, but for the average's pull.
    poisoned = train(Blocked(), OffsetSchedule(0.3), make_data(Poisoned), replace(config, steps=7, ema=0.0)).denoiser
    healthy = train(Blocked(), OffsetSchedule(0.3), make_data(), replace(config, steps=6, ema=0.0)).denoiser
    for a, b in zip(poisoned.parameters(), healthy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_guarded_step_gives_the_norm_and_refuses_infinities():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = adamw([weight], torch.device("cpu"), lr=0.1, weight_decay=0.0)
    weight.grad = torch.tensor([3.0, 0.0, 4.0])
    assert guarded_step(optimizer) == 5
    after = weight.detach().clone()
    torch.testing.assert_close(after, torch.tensor([0.9, 1.0, 0.9]))
    weight.grad = torch.tensor([1.0, float("inf"), 1.0])
    assert guarded_step(optimizer).isinf()
    assert torch.equal(weight.detach(), after)
    assert optimizer.state[weight]["step"] == 1


def test_recomputed_blocks_give_the_same_gradients():
    """All blocks, one, or none: the memory differs, the numbers do not."""
    found = []
    for blocks in (0, 1, 2):
        model = random_model(SMALL).train()
        forward = Trained(model, torch.device("cpu"), precision="float32", recompute=blocks)
        forward(*inputs(SMALL)).square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert found[-1].abs().sum() > 0
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    with pytest.raises(ValueError, match="cannot recompute 3 blocks"):
        Trained(random_model(SMALL), torch.device("cpu"), precision="float32", recompute=3)


def test_the_average_stands_in_and_steps_back():
    model = random_model(SMALL)
    average = Average(model, 0.5)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(2)
    average.update()
    with average.in_place():
        for p, old in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(p.detach(), old + 1)
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.detach(), old + 2)


# --- watching ------------------------------------------------------------------------------------------------------


def test_losses_by_band_of_local_time():
    per_group = torch.tensor([[1.0, 10.0], [3.0, 20.0], [5.0, 40.0]])
    t = torch.tensor([[0.05, 1.0], [0.0, 0.55], [0.95, 0.551]])
    rows = [by_time(per_group, t, SPEC), by_time(per_group[:1], t[:1], SPEC)]
    means = _mean_metrics(rows)
    assert means["loss_texture_by_time"] == [(1 + 3 + 1) / 3, *[None] * 8, 5]
    assert means["loss_semantic_by_time"] == [*[None] * 5, 30, *[None] * 3, 10]


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path)
    log = MetricsLog(None, [board])
    log.add({"step": 5, "loss": 0.25, "loss_by_time": [1.0, None, 3.0], "note": "text"})
    log.add({"step": 10, "loss": 0.125, "loss_by_time": [2.0, 2.0, 2.0]})
    board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(5, 0.25), (10, 0.125)]
    assert [e.step for e in events.Scalars("loss_by_time/1")] == [10]
    assert flat({"a": 1, "b": [2, None]}) == {"a": 1.0, "b/0": 2.0}


def test_the_log_of_the_probe_tells_everything(tmp_path):
    from distributed_worker import PROBE

    learned = learn_schedule(Blocked(), make_data(), replace(PROBE, steps=10, burn_in=5), directory=tmp_path)
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert row == learned.history[-1]
    expected = {"step", "loss", "flow", "kinetic", "gradient_norm", "rho", "midpoint", "delay", "images_per_second"}
    assert expected | {"loss_texture", "loss_semantic_by_time", "waited_for_data"} <= row.keys()
    assert row["gradient_norm"] > 0


def test_hooks_are_called_every_so_many_images():
    class Nothing:
        def update(self, step):
            return {"loss": torch.tensor(1.0)}

        def describe(self):
            return {}

    called = []
    hook = Hook(25, lambda step: called.append(step) or {"seen": step * 10})
    rows = run_job(Nothing(), 12, directory=None, identity={}, title="x", batch_size=10, log_every=2, hooks=[hook])
    # 25, 50, 75 and 100 images are passed in steps 3, 5, 8 and 10, and noticed when the log is written.
    assert called == [4, 6, 8, 10]
    assert [row.get("seen") for row in rows] == [None, 40, 60, 80, 100, None]


# --- validation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule",
    [SynchronousSchedule(), OffsetSchedule(0.3), CascadedSchedule(), polynomial([-2.0, 0.5, -1.0, 0.0, 2.0])],
    ids=["synchronous", "offset", "cascaded", "polynomial"],
)
def test_validation_of_the_exact_denoiser_is_the_information_whatever_the_schedule(schedule):
    """1/2 log det(I + snr Sigma) per dimension, with snr = T^2 / (1 - T)^2 for both groups at the end."""
    spec = LatentSpec([Group("texture", 2), Group("semantic", 1)])
    exact = random_gaussian(spec, positions=2)
    count = 6000
    generator = torch.Generator().manual_seed(0)
    roots = torch.linalg.cholesky(exact.covariance)
    noise = torch.randn(count, 2, 3, 1, generator=generator, dtype=torch.float64)
    latents = (roots @ noise)[..., 0].transpose(1, 2)[:, :, None].float()
    identity = Normalization((0.0,) * 3, (1.0,) * 3)
    data = TensorLatents(spec, latents, torch.zeros(count, dtype=torch.long), normalization=identity)

    def denoiser(z, t, labels):
        return exact(z.double(), t.double()).float()

    validation = Validation(data, schedule, images=count, points=300, batch=2000)
    found = validation.measure(denoiser, torch.device("cpu"))
    snr = (HORIZON / (1 - HORIZON)) ** 2
    expected = 0.5 * torch.logdet(torch.eye(3, dtype=torch.float64) + snr * exact.covariance).sum() / 6
    assert found["validation"] == pytest.approx(float(expected), rel=0.02)
    assert len(found["validation_texture"]) == 300


def test_validation_and_surface_see_all_classes_of_a_set_that_is_sorted_by_class():
    from lwd.surface import measure_surface

    data = TensorLatents(SPEC, torch.randn(1000, 5, 4, 4), torch.arange(1000) // 100)
    seen = []

    def denoiser(z, t, labels):
        seen.append(labels)
        return z

    Validation(data, OffsetSchedule(0.3), images=200, points=1).measure(denoiser, torch.device("cpu"))
    first = torch.cat(seen)
    assert len(first) == 200
    assert torch.bincount(first).min() > 5
    seen.clear()
    measure_surface(denoiser, data, points=2, images=200, batch=200)
    assert torch.equal(seen[0], first)  # and both the same ones, always


def test_training_validates_the_average_on_heldout_latents():
    config = replace(TRAIN, steps=10, validate_every=40)
    result = train(Blocked(), OffsetSchedule(0.3), make_data(), config, heldout=make_data())
    assert all(row["validation"] > 0 for row in result.history)
    direct = Validation(make_data(), OffsetSchedule(0.3)).measure(result.denoiser, torch.device("cpu"))
    assert direct["validation"] == pytest.approx(result.history[-1]["validation"], rel=1e-5)


def test_every_run_has_an_id_of_its_own_for_weights_and_biases(tmp_path, monkeypatch):
    """Also where directories have the same name; a continued run keeps it."""
    import sys
    import types

    begun = []
    fake = types.SimpleNamespace(init=lambda **settings: begun.append(settings))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for folder in ("seed0/main", "seed1/main", "seed0/main"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        WeightsAndBiases("project", tmp_path / folder)
    assert [run["name"] for run in begun] == ["main"] * 3
    assert begun[0]["id"] == begun[2]["id"] != begun[1]["id"]
    assert begun[0]["resume"] == "allow"
