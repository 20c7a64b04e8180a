"""Sets of generated images: the same whatever the batch, the number of processes and the interruptions."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lwd import Pipeline, SynchronousSchedule
from lwd.data.sharding import Share
from lwd.files import read_json
from lwd.generation import SampleConfig, SampleStore, draw_images, sample_to_directory
from lwd.generation.store import batches_of
from networks import SMALL, random_model
from test_pipeline import CURVE, ENCODERS, STATISTICS, make

HEUN = SampleConfig(solver="heun", steps=3, seed=5)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return make()


def images_in(directory) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted((directory / "images").iterdir())])


def test_a_set_of_png_files(pipeline, tmp_path):
    """Two processes, an interruption and another batch size against one call in memory."""
    whole = draw_images(pipeline, HEUN, count=11)
    assert whole.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]

    arguments = {"images": 11, "part": 3}
    assert sample_to_directory(pipeline, tmp_path, HEUN, share=Share(1, 2), batch=4, **arguments) is None
    assert not (tmp_path / "samples.json").exists()
    assert [path.name for path in sorted((tmp_path / "parts").iterdir())] == ["00001.json", "00003.json"]
    assert len(list((tmp_path / "images").iterdir())) == 5

    failing = make()

    def decode(latents):
        if (tmp_path / "parts/00000.json").exists():
            raise KeyboardInterrupt
        return Pipeline.decode(failing, latents)

    failing.decode = decode
    with pytest.raises(KeyboardInterrupt):
        sample_to_directory(failing, tmp_path, HEUN, share=Share(0, 2), batch=1, **arguments)
    summary = sample_to_directory(pipeline, tmp_path, HEUN, batch=2, **arguments)
    assert (images_in(tmp_path) == whole.images.numpy()).all()
    assert not (tmp_path / "parts").exists()
    assert summary == read_json(tmp_path / "samples.json")
    assert summary["evaluations"] == {"mean": 6.0, "max": 6}
    assert summary["images"] == 11
    assert summary["origin"]["solver"] == "heun"
    assert summary["origin"]["steps"] == 3
    assert summary["origin"]["schedule"]["kind"] == "polynomial"
    assert summary["origin"]["guidance"] is None
    assert read_json(tmp_path / "schedule.json")["kind"] == "polynomial"
    # Asked again, it is there; asked for something else, it says what differs.
    assert sample_to_directory(pipeline, tmp_path, HEUN, **arguments) == summary
    with pytest.raises(ValueError, match=r"begun with other settings:\n  images: 11 there, 12 now"):
        sample_to_directory(pipeline, tmp_path, HEUN, images=12, part=3)
    other = make(schedule=SynchronousSchedule())
    with pytest.raises(ValueError, match=r"origin\.schedule\.kind: 'polynomial' there, 'synchronous' now"):
        sample_to_directory(other, tmp_path, HEUN, **arguments)


def test_npz_and_latents_hold_the_same_set(pipeline, tmp_path):
    whole = draw_images(pipeline, HEUN, count=7, labels=[2, 0])
    arguments = {"images": 7, "part": 2, "batch": 3, "classes": [2, 0]}
    sample_to_directory(pipeline, tmp_path / "npz", HEUN, form="npz", **arguments)
    with np.load(tmp_path / "npz/samples.npz") as arrays:
        assert (arrays["arr_0"] == whole.images.numpy()).all()
        assert arrays["arr_1"].tolist() == [2, 0, 2, 0, 2, 0, 2]
        assert arrays["arr_1"].dtype == np.int64
    sample_to_directory(pipeline, tmp_path / "latents", HEUN, form="latents", **arguments)
    parts = [load_file(path) for path in sorted((tmp_path / "latents/latents").iterdir())]
    assert torch.cat([part["labels"] for part in parts]).tolist() == [2, 0, 2, 0, 2, 0, 2]
    torch.testing.assert_close(torch.cat([part["latents"] for part in parts]), whole.latents, rtol=1e-5, atol=1e-5)
    assert len(read_json(tmp_path / "latents/samples.json")["classes"]) == 2


def test_the_adaptive_solver_gives_an_image_whatever_is_beside_it(pipeline, tmp_path):
    config = SampleConfig(seed=1)
    arguments = {"images": 6, "form": "latents", "part": 2}
    first = sample_to_directory(pipeline, tmp_path / "a", config, batch=6, **arguments)
    second = sample_to_directory(pipeline, tmp_path / "b", config, batch=1, **arguments)
    a, b = (
        torch.cat([load_file(path)["latents"] for path in sorted((tmp_path / name / "latents").iterdir())])
        for name in "ab"
    )
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert first["evaluations"] == second["evaluations"]
    assert first["evaluations"]["mean"] == first["origin"]["evaluations"]


def test_placed_steps_depend_on_the_model_alone(pipeline, tmp_path):
    """Whatever is drawn with them, and they are not the equal ones."""
    config = SampleConfig(solver="dpmpp2m", steps=7, placement="kinetic", spacing="cosine")
    times = config.step_times(pipeline)
    assert times == config.step_times(make())
    assert len(times) == 8
    assert (times[0], times[-1]) == (0.0, 1.0)
    assert np.abs(np.diff(times) - 1 / 7).max() > 0.02
    few, many = draw_images(pipeline, config, count=2, batch=1), draw_images(pipeline, config, count=4)
    torch.testing.assert_close(few.latents, many.latents[:2], rtol=1e-5, atol=1e-5)
    assert few.evaluations.tolist() == [7, 7]
    uniform = draw_images(pipeline, SampleConfig(solver="dpmpp2m", steps=7), count=2)
    assert (few.latents - uniform.latents).abs().max() > 1e-3
    assert config.describe(pipeline)["spacing"] == "cosine"


def test_guidance_is_on_record(tmp_path):
    pipeline = make()
    pipeline.add_weak(make(seed=1, origin={"recipe": "weak one", "step": 7}))
    config = SampleConfig(
        solver="euler", steps=2, scale=(1.0, 1.2, 2.0, 2.2), scale_times=(0.1, 0.9), interval=(0, 0.8)
    )
    guidance = config.describe(pipeline)["guidance"]
    assert guidance["kind"] == "autoguidance"
    assert guidance["scale"] == {"tau": [0.1, 0.9], "scale": [[1.0, 1.2], [2.0, 2.2]]}
    assert guidance["interval"] == [[0.0, 0.8]]
    assert guidance["weak"]["recipe"] == "weak one"
    assert guidance["weak"]["step"] == 7
    assert SampleConfig().describe(pipeline)["guidance"]["scale"] == [1.5]
    assert SampleConfig(scale=(1.3,)).describe(make())["guidance"]["kind"] == "classifier-free"
    assert SampleConfig(scale=(1.0,)).describe(pipeline)["guidance"] is None
    json.dumps(config.describe(pipeline), allow_nan=False)


def test_contradictory_settings():
    with pytest.raises(ValueError, match="dopri5 chooses its own steps"):
        SampleConfig(steps=10)
    with pytest.raises(ValueError, match="unknown solver 'heum'"):
        SampleConfig(solver="heum")
    with pytest.raises(ValueError, match="two local times, or two per group"):
        SampleConfig(interval=(0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match="2 scale times need as many scales"):
        SampleConfig(scale=(1.0, 2.0, 3.0), scale_times=(0.0, 1.0))


def test_errors_of_a_set(pipeline, tmp_path):
    with pytest.raises(ValueError, match="classes are 0 to 2; asked for 3"):
        sample_to_directory(pipeline, tmp_path, HEUN, images=2, classes=[3])
    with pytest.raises(ValueError, match="at least 1, got 0 and 64"):
        sample_to_directory(pipeline, tmp_path, HEUN, images=0)
    undecodable = Pipeline(random_model(SMALL), CURVE, STATISTICS, precision="float32")
    with pytest.raises(ValueError, match="cannot be decoded to images"):
        sample_to_directory(undecodable, tmp_path / "u", HEUN, images=2)
    sample_to_directory(undecodable, tmp_path / "v", HEUN, images=2, form="latents")


def test_what_cannot_be_written_stops_the_sampling(pipeline, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(SampleStore, "_write_png", full)
    with pytest.raises(OSError, match="no space left"):
        sample_to_directory(pipeline, tmp_path, HEUN, images=4, part=2, batch=1)
    assert not (tmp_path / "samples.json").exists()
    assert list((tmp_path / "parts").glob("*.json")) == []


def test_batches_cross_the_borders_of_parts():
    assert list(batches_of([range(3), range(6, 9)], 4)) == [[0, 1, 2, 6], [7, 8]]
    assert list(batches_of([], 4)) == []


@pytest.mark.gpu
def test_a_gpu_draws_the_same_set(tmp_path):
    gpu = Pipeline(random_model(SMALL).cuda(), CURVE, STATISTICS, ENCODERS, precision="float32")
    for name, drawer in (("cpu", make()), ("gpu", gpu)):
        sample_to_directory(drawer, tmp_path / name, HEUN, images=20, part=4, batch=7)
    difference = np.abs(images_in(tmp_path / "cpu").astype(int) - images_in(tmp_path / "gpu"))
    assert difference.max() <= 1
