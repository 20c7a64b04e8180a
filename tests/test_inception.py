"""The FID Inception against the reference's features, its resize against closed forms, its weights' files."""

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from lwd.evaluation import ProtocolSettings, frechet_distance, inception_score, precision_recall, score_images
from lwd.evaluation.inception import DOWNLOADS, FIDInception, load_inception, tf1_resize
from lwd.evaluation.numerics import float32_arithmetic

FIXTURE = Path(__file__).parent / "fixtures" / "inception_v3_fid.safetensors"


def recipe_weights(gain: float = 1.6) -> dict[str, torch.Tensor]:
    """Weights by recipe, from the key names and shapes in the fixture."""
    with safe_open(FIXTURE, framework="pt") as file:
        shapes = json.loads(file.metadata()["state_keys"])
    state = {}
    for key, shape in shapes.items():
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(0)
            continue
        rng = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
        r = rng.standard_normal(shape, dtype=np.float32)
        if key.endswith("running_var"):
            r = 1 + 0.1 * np.abs(r)
        elif key.endswith("running_mean"):
            r = 0.05 * r
        elif r.ndim == 1:
            r = 1 + 0.1 * r if key.endswith("weight") else 0.05 * r
        else:
            r = gain * r / np.sqrt(r[0].size)
        state[key] = torch.from_numpy(np.asarray(r, dtype=np.float32))
    return state


def fixture_images() -> tuple[torch.Tensor, torch.Tensor]:
    r = np.random.Generator(np.random.PCG64(9))
    a = r.integers(0, 256, (3, 3, 256, 256), np.uint8)
    a[1] = (a[1] * 0.3).astype(np.uint8)
    b = r.integers(0, 256, (2, 3, 64, 64), np.uint8)
    return torch.from_numpy(a), torch.from_numpy(b)


@pytest.fixture(scope="module")
def network():
    return FIDInception.from_state_dict(recipe_weights())


def test_features_match_the_reference(network):
    with safe_open(FIXTURE, framework="pt") as file:
        for images, size in zip(fixture_images(), (256, 64), strict=True):
            features = network.features(images)
            for ours, theirs in (("pool", "pool3"), ("spatial", "spatial"), ("logits", "logits_unbiased")):
                expected = file.get_tensor(f"{theirs}_{size}")
                scale = float(expected.std())
                torch.testing.assert_close(features[ours], expected, rtol=1e-5, atol=1e-5 * scale)


def test_features_do_not_depend_on_the_batch_or_on_the_process_settings(network):
    images = fixture_images()[1]
    expected = network.features(images)
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    network.max_batch = 1
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = network.features(images)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cudnn.allow_tf32 == tf32
    finally:
        network.max_batch = 64
        torch.set_float32_matmul_precision(precision)
    for key, value in features.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-5)


def test_float32_arithmetic_is_full_float32_and_leaves_the_settings_alone():
    matmul, conv = torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv
    before = matmul.fp32_precision, conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        with float32_arithmetic(torch.device("cpu")):
            assert (matmul.fp32_precision, conv.fp32_precision) == ("ieee", "ieee")
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert matmul.fp32_precision == "bf16"
        with float32_arithmetic(torch.device("cpu"), tf32=True):
            assert (matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision) == ("ieee", "tf32")
    finally:
        matmul.fp32_precision = before[0]
    assert before == (matmul.fp32_precision, conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision)


def test_spatial_features_are_channels_last(network):
    # sFID's 2023 numbers are [17, 17, 7]; neighbouring entries are channels of one position.
    images = fixture_images()[1][:1]
    taken: list[torch.Tensor] = []
    handle = network.Mixed_6d.branch1x1.register_forward_hook(lambda *x: taken.append(x[2].clone()))
    spatial = network.features(images)["spatial"].reshape(17, 17, 7)
    handle.remove()
    assert torch.equal(spatial[3, 11], taken[0][0, :7, 3, 11])
    assert float(spatial.min()) == 0  # after the ReLU


def test_features_refuse_other_images(network):
    with pytest.raises(ValueError, match=r"uint8 images \[N, 3, H, W\], or grey .*, got torch.float32"):
        network.features(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"\[2, 4, 8, 8\]"):
        network.features(torch.zeros(2, 4, 8, 8, dtype=torch.uint8))


def test_grey_images_are_seen_in_three_equal_channels(network):
    grey = fixture_images()[1][:, :1]
    expected = network.features(grey.expand(-1, 3, -1, -1).contiguous())
    for key, value in network.features(grey).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-5)


def test_scores_by_inception_from_images_to_result(network):
    images = torch.randint(0, 256, (10, 3, 32, 32), generator=torch.Generator().manual_seed(3)).byte()
    real, fake = images[:5], images[5:] // 2
    result = score_images(fake, real, network, settings=ProtocolSettings(distances="float64"))
    a, b = network.features(real), network.features(fake)
    assert result.metrics == {
        "fid": pytest.approx(frechet_distance(a["pool"], b["pool"]), rel=1e-5),
        "sfid": pytest.approx(frechet_distance(a["spatial"], b["spatial"]), rel=1e-5),
        "inception_score": pytest.approx(inception_score(b["logits"].double().softmax(1)), rel=1e-5),
        "precision": precision_recall(a["pool"], b["pool"]).precision,
        "recall": precision_recall(a["pool"], b["pool"]).recall,
    }
    assert f"weights have SHA-256 {network.sha256[:8]}..., the published ones 6726825d" in str(result.deviations)
    assert result.extractor["settings"] == {
        "resize": "TensorFlow-1 bilinear to 299",
        "precision": "float32",
        "tf32": False,
    }


def test_the_command_scores_by_the_protocol_and_marks_what_is_not(network, tmp_path, monkeypatch, capsys):
    from lwd import cli

    images = torch.randint(0, 256, (8, 3, 32, 32), generator=torch.Generator().manual_seed(4)).byte()
    for name, part in (("real", images[:4]), ("fake", images[4:])):
        np.savez(tmp_path / f"{name}.npz", arr_0=part.movedim(1, -1).numpy())
    monkeypatch.setattr("lwd.evaluation.networks.load_inception", lambda *_, **__: network)
    command = f"evaluate --samples {tmp_path}/fake.npz --reference {tmp_path}/real.npz --distances float64 --device cpu"
    cli.main([*command.split(), "--out", str(tmp_path / "scores.json"), "--cache", str(tmp_path / "cache")])
    (written,) = json.loads((tmp_path / "scores.json").read_text())["results"]
    shown = capsys.readouterr().out
    assert f"{written['metrics']['fid']:.4g}" in shown
    assert "not as the protocol asks: " in shown
    assert "4 generated images instead of 50000" in shown
    cli.main(command.split())
    assert json.loads(capsys.readouterr().out)[0]["metrics"] == pytest.approx(written["metrics"], rel=1e-6)
    expected = score_images(images[4:], images[:4], network, settings=ProtocolSettings(distances="float64"))
    assert written["metrics"] == pytest.approx(expected.metrics, rel=1e-4)
    assert any("50" in deviation and "4" in deviation for deviation in written["protocol"])
    assert list((tmp_path / "cache").iterdir())


# --- resize -------------------------------------------------------------------------------------------------------


def test_resize_of_a_ramp_starts_at_the_first_pixel_and_is_clamped_at_the_last():
    # Output i reads position i * 4 / 8 without a half-pixel shift; past the last pixel there is only that pixel.
    ramp = torch.tensor([0.0, 10.0, 20.0, 30.0]).expand(1, 1, 4, 4)
    resized = tf1_resize(ramp, 8)
    assert resized[0, 0, 5].tolist() == [0, 5, 10, 15, 20, 25, 30, 30]
    assert torch.equal(tf1_resize(ramp.transpose(2, 3), 8), resized.transpose(2, 3))


def test_resize_downwards_takes_single_pixels():
    # No antialiasing: at an integer ratio only every second pixel is seen.
    images = torch.randint(0, 256, (2, 3, 10, 10), dtype=torch.uint8)
    assert torch.equal(tf1_resize(images, 5), images[:, :, ::2, ::2].float())


def test_resize_of_the_right_size_changes_nothing():
    images = torch.randint(0, 256, (1, 3, 299, 299), dtype=torch.uint8)
    assert torch.equal(tf1_resize(images), images.float())


def test_resize_equals_a_direct_double_loop():
    x = torch.rand(1, 1, 7, 5, dtype=torch.float64)

    def at(i: int, j: int) -> float:
        (u, v), (h, w) = (i * 7 / 9, j * 5 / 9), (7, 5)
        (a, b), (f, g) = (int(u), int(v)), (u - int(u), v - int(v))
        c, d = min(a + 1, h - 1), min(b + 1, w - 1)
        rows = [(1 - g) * x[0, 0, r, b] + g * x[0, 0, r, d] for r in (a, c)]
        return float((1 - f) * rows[0] + f * rows[1])

    expected = torch.tensor([[at(i, j) for j in range(9)] for i in range(9)])
    torch.testing.assert_close(tf1_resize(x, 9)[0, 0], expected, rtol=1e-6, atol=1e-6)


# --- files of weights ---------------------------------------------------------------------------------------------


def test_weights_from_a_file_or_the_hub_cache(tmp_path, monkeypatch):
    name = next(iter(DOWNLOADS))
    path = tmp_path / "checkpoints" / name
    path.parent.mkdir()
    torch.save(recipe_weights(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=f"{name} is damaged or not .* is {digest[:16]}..., expected 6726825d"):
        load_inception(path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for place in (None, path, path.parent):
        assert load_inception(place, sha256_prefix="").sha256 == digest
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be used"):
        load_inception(sha256_prefix="")


def test_missing_weights_say_where_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for place in (None, tmp_path, tmp_path / "absent.pth"):
        with pytest.raises(
            FileNotFoundError, match=r"https://github.com/toshas.*/weights-inception-2015-12-05-6726825d"
        ):
            load_inception(place)


def test_other_weights_are_refused_by_name():
    state = recipe_weights()
    module_state = {"blocks.0.0.conv.weight": state["Conv2d_1a_3x3.conv.weight"]}
    with pytest.raises(ValueError, match="leaves the classifier out"):
        FIDInception.from_state_dict(module_state)
    state["fc.weight"] = state["fc.weight"][:1000]
    state["AuxLogits.fc.bias"] = state.pop("Mixed_7c.branch_pool.bn.bias")
    with pytest.raises(ValueError) as error:
        FIDInception.from_state_dict(state)
    for part in (
        "Mixed_7c.branch_pool.bn.bias is missing",
        "AuxLogits.fc.bias is unknown",
        "fc.weight has shape [1000, 2048], not [1008, 2048]",
    ):
        assert part in str(error.value)


def test_batch_counters_do_not_matter():
    # torch-fidelity's file has them, older ports do not.
    state = recipe_weights()
    bare = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    assert FIDInception.from_state_dict(bare).sha256 == FIDInception.from_state_dict(state).sha256
