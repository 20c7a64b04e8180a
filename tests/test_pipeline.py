"""The pipeline: what it draws, where it can be read from, and what it refuses."""

import json
import shutil
import sys

import pytest
import torch

import lwd
from lwd import AutoGuidance, ClassifierFreeGuidance, OffsetSchedule, Pipeline, ScaleCurve, TrainConfig
from lwd.data import TensorLatents
from lwd.files import write_json
from lwd.latents import Normalization
from lwd.pipeline import image_seed
from lwd.runs import steps_kept, write_run_config
from networks import SMALL, random_model

STATISTICS = Normalization(tuple(0.1 * i - 0.2 for i in range(6)), tuple(0.3 + 0.1 * i for i in range(6)))
ENCODERS = {"texture": {"encoder": "pixels", "patch": 2}}  # 4 channels on a grid of 4: grey images of 8 x 8 pixels
CURVE = lwd.PolynomialSchedule(4, rho=[0.3, -1.0, 0.0, -2.0, 1.0])


def make(seed: int = 0, schedule=CURVE, statistics=STATISTICS, **options) -> Pipeline:
    settings = {"class_names": ("cat", "dog", "ship"), "precision": "float32"} | options
    return Pipeline(random_model(SMALL, seed), schedule, statistics, ENCODERS, **settings)


def test_three_lines_from_labels_to_images(tmp_path):
    """What comes out is what sampling, un-normalising and un-patching by hand give."""
    make().save_pretrained(tmp_path / "saved")
    pipeline = Pipeline.from_pretrained(tmp_path / "saved", precision="float32")
    images = pipeline(["dog", 2], seed=3).images

    noise = lwd.seeded_noise([image_seed(3, 0), image_seed(3, 1)], (6, 4, 4))
    latents = lwd.sample(random_model(SMALL), CURVE, noise, torch.tensor([1, 2])).latents
    texture = STATISTICS.denormalize(latents)[:, :4].detach()
    pixels = torch.nn.functional.pixel_shuffle(texture, 2)[:, 0]
    for image, expected in zip(images, pixels, strict=True):
        assert (image.mode, image.size) == ("L", (8, 8))
        found = torch.tensor(list(image.tobytes())).view(8, 8).float()
        assert (found - (127.5 * expected + 127.5).clamp(0, 255)).abs().max() <= 1


def test_output_types_and_seeds():
    pipeline = make()
    drawn = pipeline([0, 1], seed=3, output_type="uint8")
    assert drawn.images.dtype == torch.uint8
    assert pipeline("cat", seed=3, output_type="latent").images is None
    again = pipeline([0, 1], seeds=[image_seed(3, 0), image_seed(3, 1)], output_type="uint8")
    assert torch.equal(drawn.images, again.images)
    fixed = pipeline([0, 1], seed=3, solver="heun", steps=4)
    assert fixed.evaluations.tolist() == [8, 8]
    with pytest.raises(ValueError, match="1 seeds for 2 labels"):
        pipeline([0, 1], seeds=[1])
    with pytest.raises(ValueError, match='"pil", "uint8" or "latent", not \'numpy\''):
        pipeline([0], output_type="numpy")
    with pytest.raises(ValueError, match="classes are 0 to 2; asked for 3"):
        pipeline([3])
    with pytest.raises(ValueError, match="no class 'cow'; there are cat, dog, ship"):
        pipeline(["cow"])


def test_guidance_is_automatic_with_a_weak_model_and_classifier_free_without():
    pipeline, weak = make(), make(seed=1)
    assert pipeline.guided() is pipeline.denoiser
    assert isinstance(pipeline.guided(2.0), ClassifierFreeGuidance)
    pipeline.add_weak(weak)
    guided = pipeline.guided()
    assert isinstance(guided, AutoGuidance)
    assert guided.scale == (1.5,)
    assert pipeline.guided(1.0) is pipeline.denoiser
    by_hand = AutoGuidance(random_model(SMALL), random_model(SMALL, 1), (1.2, 1.7))
    noise = lwd.seeded_noise([image_seed(0, 0)], (6, 4, 4))
    expected = lwd.sample(by_hand, CURVE, noise, torch.tensor([2])).latents
    found = pipeline(2, guidance_scale=(1.2, 1.7), output_type="latent").latents
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_scale_along_tau_reaches_the_sampler():
    """1 until tau = 1/2 and 3 after it: the first half is the main model's own path, the rest that of a scale of 3."""
    pipeline = make()
    pipeline.add_weak(make(seed=1))
    curve = ScaleCurve([0.5, 0.5 + 1e-9], [1.0, 3.0])
    grid = torch.linspace(0, 1, 41).tolist()
    noise, label = lwd.seeded_noise([5], (6, 4, 4)), torch.tensor([1])
    plain = lwd.sample(pipeline.denoiser, CURVE, noise, label, solver="euler", steps=40, record=[0.5])
    found = lwd.sample(pipeline.guided(curve), CURVE, noise, label, solver="euler", steps=40, record=[0.5, 1.0])
    assert torch.equal(found.states[0], plain.states[0])
    z = plain.states[0].clone()
    strong = AutoGuidance(pipeline.denoiser, pipeline.weak.denoiser, 3.0)
    for number in range(20, 40):
        tau = torch.tensor([grid[number]])
        t, dt = CURVE.frozen()(tau)
        scale = 1.0 if number == 20 else 3.0
        v = (strong if scale == 3.0 else pipeline.denoiser)(z, t, label)
        z = z + (grid[number + 1] - grid[number]) * lwd.global_velocity(v, dt, pipeline.spec)
    torch.testing.assert_close(found.latents, z, rtol=1e-4, atol=1e-4)


def test_saved_with_its_weak_model_and_read_from_the_hub(tmp_path, monkeypatch):
    pipeline = make(origin={"recipe": "embedded", "step": 7})
    pipeline.add_weak(make(seed=1))
    pipeline.save_pretrained(tmp_path / "saved")

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        assert {"model.safetensors", "weak/model.safetensors", "schedule.json"} <= set(allow_patterns) or len(
            allow_patterns
        ) < 3
        if name != "someone/lwd":
            raise OSError("404")
        return str(tmp_path / "saved")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    read = Pipeline.from_pretrained("someone/lwd", precision="float32")
    assert torch.equal(read([0, 1], output_type="latent").latents, pipeline([0, 1], output_type="latent").latents)
    assert read.class_names == ("cat", "dog", "ship")
    assert read.origin == {"run": "someone/lwd", "recipe": "embedded", "step": 7}
    assert lwd.load_schedule("someone/lwd").to_dict() == CURVE.to_dict()
    assert Normalization.from_pretrained("someone/lwd") == STATISTICS
    with pytest.raises(FileNotFoundError, match="no run or pipeline 'no/body', and not found on the hub either: 404"):
        Pipeline.from_pretrained("no/body")
    with pytest.raises(FileNotFoundError, match="it has no steps to choose from"):
        Pipeline.from_pretrained(tmp_path / "saved", step=3)


def test_weak_models_that_do_not_fit():
    pipeline = make()
    other = make(schedule=OffsetSchedule(0.3))
    with pytest.raises(ValueError, match=r"both models on the same path.*polynomial.*offset"):
        pipeline.add_weak(other)
    pipeline.add_weak(other, force=True)
    assert pipeline.weak is other
    shifted = Normalization(STATISTICS.mean, tuple(2 * s for s in STATISTICS.std))
    with pytest.raises(ValueError, match="normalisation statistics differ"):
        pipeline.add_weak(make(statistics=shifted))


def test_a_model_of_independent_times_goes_along_any_schedule(tmp_path):
    free = make(schedule=lwd.IndependentTimes())
    with pytest.raises(ValueError, match="which are no path: choose a schedule to go along"):
        free(0)
    with pytest.raises(ValueError, match="are no path to sample along"):
        free.along(lwd.IndependentTimes())
    with pytest.raises(ValueError, match=r"schedule is of the groups \('a', 'b'\)"):
        free.along(lwd.SynchronousSchedule(2, ("a", "b")))
    offset = OffsetSchedule(0.3)
    drawn = {curve.kind: free.along(curve)([0, 1], output_type="latent").latents for curve in (offset, CURVE)}
    torch.testing.assert_close(drawn["offset"], make(schedule=offset)([0, 1], output_type="latent").latents)
    torch.testing.assert_close(drawn["polynomial"], make()([0, 1], output_type="latent").latents)
    described = free.describe()
    assert (described["schedule"]["kind"], described["trained_on"]["kind"]) == ("polynomial", "independent")
    # A weak model of independent times needs no path of its own, and both are saved as what they are.
    free.add_weak(make(seed=1, schedule=lwd.IndependentTimes()))
    guided = free([0, 1], output_type="latent").latents
    assert not torch.allclose(guided, drawn["polynomial"], atol=1e-3)
    again = Pipeline.from_pretrained(free.save_pretrained(tmp_path / "saved"), precision="float32")
    torch.testing.assert_close(again.along(CURVE)([0, 1], output_type="latent").latents, guided)
    with pytest.raises(ValueError, match=r"both models on the same path.*independent.*polynomial"):
        free.add_weak(make(seed=1))
    # Other models know their own path.
    with pytest.raises(ValueError, match=r"trained on the schedule polynomial.*only a model of independent times"):
        make().along(offset)
    assert make().along(CURVE).schedule.kind == "polynomial"
    assert make().along(offset, force=True).schedule.kind == "offset"


def test_parts_that_do_not_fit():
    with pytest.raises(ValueError, match="statistics of 2 channels, but a model of 6"):
        make(statistics=Normalization((0.0, 0.0), (1.0, 1.0)))
    with pytest.raises(ValueError, match=r"schedule is of the groups \('a', 'b'\)"):
        make(schedule=lwd.SynchronousSchedule(2, ("a", "b")))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 6 steps, with a snapshot after 2 and checkpoints after 4 and 6."""
    directory = tmp_path_factory.mktemp("run")
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(12, 6, 4, 4, generator=generator)
    data = TensorLatents(SMALL.spec, latents, torch.arange(12) % 3, normalization=STATISTICS, encoders=ENCODERS)
    config = TrainConfig(
        steps=6,
        batch_size=4,
        ema=0.5,
        repa=0.0,
        precision="float32",
        snapshots=(2,),
        keep_every=2,
        save_seconds=0.0,
        log_every=2,
    )
    write_run_config(directory, torch.device("cpu"), recipe="mine", train=config, backbone=SMALL)
    lwd.train(random_model(SMALL), CURVE, data, config, directory=directory)
    return directory


def test_any_step_of_a_run_can_be_read(run):
    assert {2, 4} <= set(steps_kept(run))
    final = Pipeline.from_pretrained(run, precision="float32")
    assert final.describe()["recipe"] == "mine"
    assert final.describe()["step"] == 6
    assert final.describe()["batch_size"] == 4
    early = Pipeline.from_pretrained(run, step=2, precision="float32")
    middle = Pipeline.from_pretrained(run, step=4, precision="float32")
    weights = [dict(p.model.named_parameters())["x_embedder.weight"] for p in (early, middle, final)]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    with pytest.raises(FileNotFoundError, match=r"kept nothing of step 3, only of \[2, "):
        Pipeline.from_pretrained(run, step=3)


def test_a_run_that_is_made_longer_does_not_pass_off_its_former_end_as_the_new_one(run, tmp_path):
    longer = tmp_path / "run"
    shutil.copytree(run, longer)
    about = json.loads((longer / "config.json").read_text())
    about["settings"]["train"]["steps"] = 12
    (longer / "config.json").write_text(json.dumps(about))
    with pytest.raises(FileNotFoundError, match=r"is not finished; its weights can be had of the steps \[2, 4, 6\]"):
        Pipeline.from_pretrained(longer)
    with pytest.raises(FileNotFoundError, match="kept nothing of step 12"):
        Pipeline.from_pretrained(longer, step=12)
    former = Pipeline.from_pretrained(longer, step=6)
    assert former.describe()["step"] == 6
    assert former.describe()["model_sha256"] == Pipeline.from_pretrained(run).describe()["model_sha256"]
    (longer / "config.json").rename(tmp_path / "config.json")  # a run by `lwd.train` alone has none
    assert Pipeline.from_pretrained(longer).describe()["step"] == 6
    (tmp_path / "config.json").rename(longer / "config.json")
    # Cut off between the new weights and the note of their step.
    note = json.loads((longer / "model" / "trained.json").read_text())
    (longer / "model" / "trained.json").write_text(json.dumps(note | {"sha256": "of others"}))
    with pytest.raises(FileNotFoundError, match="is not finished"):
        Pipeline.from_pretrained(longer)


def test_the_checkpoint_of_the_last_step_holds_the_finished_model(run, tmp_path):
    """Of an unfinished run: everything but model/ is there."""
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    for path in run.iterdir():
        if path.name != "model":
            (unfinished / path.name).symlink_to(path)
    with pytest.raises(FileNotFoundError, match=r"is not finished; its weights can be had of the steps \[.*6\]"):
        Pipeline.from_pretrained(unfinished)
    read, final = Pipeline.from_pretrained(unfinished, step=6), Pipeline.from_pretrained(run)
    for (name, a), (_, b) in zip(read.model.state_dict().items(), final.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_what_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no finished run \(no model/\) and no checkpoint"):
        Pipeline.from_pretrained(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file; a run or a pipeline is a directory"):
        Pipeline.from_pretrained(tmp_path / "model.pt")
    write_json(tmp_path / "else" / "config.json", {})
    with pytest.raises(FileNotFoundError, match="keeps no statistics of latents"):
        Normalization.from_pretrained(tmp_path / "else")


def test_a_checkpoint_of_sfd(semantic_first):
    model, values = semantic_first
    channels = model.spec.channels
    statistics = Normalization((0.0,) * channels, (1.0,) * channels)
    pipeline = Pipeline.from_sfd(values.under("state"), OffsetSchedule(0.3), statistics, precision="float32")
    times = torch.stack([values["t_tex"], values["t_sem"]], dim=1)
    torch.testing.assert_close(
        pipeline.denoiser(values["x1"], times, values["y"]), values["velocity"], rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="cannot be decoded to images"):
        pipeline(0, solver="euler", steps=3)


@torch._dynamo.config.patch(recompile_limit=16)
def test_compiled_it_draws_the_same():
    """Also where an adaptive solver lets the batch shrink."""
    plain = make()
    plain.add_weak(make(seed=1))
    expected = plain([0, 1, 2, 0], output_type="latent").latents
    torch._dynamo.reset()
    for block in (*plain.model.blocks, *plain.weak.model.blocks):
        block.compile(backend="aot_eager", dynamic=None)
    torch.testing.assert_close(plain([0, 1, 2, 0], output_type="latent").latents, expected, rtol=1e-5, atol=1e-5)


def test_without_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match='or ask for "uint8"'):
        make()(0, solver="euler", steps=1)


@pytest.mark.gpu
def test_on_a_gpu():
    cpu = make()
    gpu = Pipeline(random_model(SMALL).cuda(), CURVE, STATISTICS, ENCODERS, precision="float32")
    a, b = (p([0, 1, 2], output_type="latent").latents.cpu() for p in (cpu, gpu))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
