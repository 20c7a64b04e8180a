"""Feature networks by name, against transformers, Pillow and the definitions; the same scores of small data."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from lwd.encoders.efficientnet import SHA256, EfficientNetFeatures
from lwd.evaluation import (
    FeatureStatistics,
    Judge,
    ProtocolSettings,
    evaluate_images,
    feature_extractor,
    frechet_distance,
    networks,
    reference_features,
    score_images,
)
from lwd.evaluation.networks import ClassToken, authors_positions

transformers = pytest.importorskip("transformers")
foundation = pytest.importorskip("test_foundation")  # its small networks, and the authors' names of their weights


@pytest.fixture(autouse=True)
def _nowhere_else(monkeypatch, tmp_path_factory):
    """No hub and no weights that this machine may have."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path_factory.getbasetemp() / "no-torch-hub"))


@pytest.fixture
def small(monkeypatch):
    """The published networks, in the size of the test's."""
    sizes = {name: replace(known, width=32 if "clip" in name else 128) for name, known in networks._KNOWN.items()}
    monkeypatch.setattr(networks, "_KNOWN", sizes)


def pictures(count: int = 2, size: int = 224, seed: int = 0, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


def normalised(images: torch.Tensor, colours: str = "IMAGENET_DEFAULT") -> torch.Tensor:
    constants = transformers.utils.constants
    mean, std = (torch.tensor(getattr(constants, f"{colours}_{name}"))[:, None, None] for name in ("MEAN", "STD"))
    return (images / 255 - mean) / std


# --- FD-DINOv2 ----------------------------------------------------------------------------------------------------


def cubic(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    return np.where(x <= 1, near, np.where(x < 2, a * (x**3 - 5 * x**2 + 8 * x - 4), 0))


def authors_matrix(stored: int = 37, side: int = 16) -> np.ndarray:
    """[side, stored]: output i is taken at (i + 1/2) stored / (side + 0.1) - 1/2; beyond the edge, the edge."""
    weights = np.zeros((side, stored))
    for i in range(side):
        at = (i + 0.5) * stored / (side + 0.1) - 0.5
        for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            weights[i, min(max(j, 0), stored - 1)] += cubic(np.array(at - j))
    return weights


def test_positions_are_resized_as_the_authors_do():
    positions = torch.randn(1, 1 + 37 * 37, 3, generator=torch.Generator().manual_seed(0))
    found = authors_positions(positions, 16)
    matrix = authors_matrix()
    expected = np.einsum("ia,jb,abc->ijc", matrix, matrix, positions[0, 1:].reshape(37, 37, 3).numpy())
    assert torch.equal(found[:, 0], positions[:, 0])
    np.testing.assert_allclose(found[0, 1:].reshape(16, 16, 3), expected, atol=2e-5)
    by_size = F.interpolate(positions[:, 1:].reshape(1, 37, 37, 3).permute(0, 3, 1, 2), (16, 16), mode="bicubic")
    assert (by_size.flatten(2).transpose(1, 2) - found[:, 1:]).abs().max() > 0.05  # transformers' way is another
    assert authors_positions(found, 16) is found


def class_token(model: torch.nn.Module, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """By the definition: patches, class token, positions, blocks, norm."""
    embeddings = model.embeddings
    patches = F.conv2d(
        x, embeddings.patch_embeddings.projection.weight, embeddings.patch_embeddings.projection.bias, stride=14
    )
    tokens = torch.cat([embeddings.cls_token.expand(len(x), -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
    return model.layernorm(model.encoder(tokens + positions).last_hidden_state)[:, 0]


def test_fd_dinov2_is_the_class_token_of_the_authors_computation(small, tmp_path):
    model = foundation.dinov2(registers=False)
    matrix = torch.from_numpy(authors_matrix()).float()
    stored = model.embeddings.position_embeddings.detach()
    grid = torch.einsum("ia,jb,abc->ijc", matrix, matrix, stored[0, 1:].reshape(37, 37, -1))
    positions = torch.cat([stored[0, :1], grid.reshape(256, -1)])
    with torch.no_grad():
        expected = class_token(model, normalised(pictures()), positions)
    # A directory as transformers saves it, the authors' file, and that file where torch.hub puts it.
    directory = foundation.saved(model, tmp_path / "saved")
    file = tmp_path / "checkpoints" / networks.DINOV2_FILE
    file.parent.mkdir()
    torch.save(foundation.authors_names(model), file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        found = [feature_extractor("dinov2", weights=place) for place in (directory, file, None)]
    for extractor in found:
        pool = extractor.features(pictures())["pool"]
        torch.testing.assert_close(pool, expected, rtol=1e-4, atol=1e-5)
        assert not pool.requires_grad
    assert [extractor.name for extractor in found] == ["dinov2"] * 3
    assert found[1].sha256 == found[2].sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found[0].settings == {
        "network": "dinov2",
        "features": "class token after the final layer norm",
        "resize": "bicubic, antialiased, to 224, 8 bits",
        "precision": "float32",
        "tf32": False,
    }


def smooth(size: int) -> torch.Tensor:
    """Photographs change slowly, and have edges."""
    images = F.interpolate(pictures(3, size // 8).float(), (size, size), mode="bicubic").clamp(0, 255)
    images[:, :, : size // 3, size // 2 :] = 255
    return images.byte()


@pytest.mark.parametrize(("kind", "size"), [(smooth, 256), (smooth, 64), (lambda size: pictures(3, size), 300)])
def test_resize_is_pillows_to_a_rounding(kind, size):
    extractor = ClassToken("x", foundation.dinov2(layers=0), "0")
    images = kind(size)
    found = extractor.resized(images)
    pillow = [
        np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC))
        for image in images
    ]
    difference = (found - torch.from_numpy(np.stack(pillow)).permute(0, 3, 1, 2).float()).abs()
    assert (found.min() >= 0, found.max() <= 255, bool((found == found.round()).all())) == (True, True, True)
    assert difference.max() <= 2
    assert (difference > 0).float().mean() < 0.01  # ties, which float32 and Pillow's fixed point round differently
    # EDM2's resize is the same but for rounding and clipping.
    unrounded = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True)
    assert (found - unrounded).abs().median() <= 0.5
    assert torch.equal(extractor.resized(pictures()), pictures().float())


def test_batches_grey_images_and_oblongs(small, tmp_path):
    extractor = feature_extractor("dinov2", weights=foundation.saved(foundation.dinov2(registers=False), tmp_path))
    images = pictures(3, 40)
    whole = extractor.features(images)["pool"]
    parts = torch.cat([extractor.features(part)["pool"] for part in images.split(1)])
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(extractor.features(images)["pool"], whole, rtol=0, atol=0)
    grey = images[:, :1]
    torch.testing.assert_close(
        extractor.features(grey)["pool"], extractor.features(grey.repeat(1, 3, 1, 1))["pool"], rtol=0, atol=0
    )
    assert extractor.features(images[:, :, :20])["pool"].shape == (3, 128)
    for wrong in (images.float(), images[0], torch.cat([images, grey], dim=1)):
        with pytest.raises(ValueError, match=r"uint8 \[N, 3 or 1, H, W\], not torch"):
            extractor.features(wrong)


# --- the other networks -------------------------------------------------------------------------------------------


def test_registers_and_clip(small, tmp_path):
    model = foundation.dinov2()
    extractor = feature_extractor("dinov2-b", weights=foundation.saved(model, tmp_path / "b"))
    with torch.no_grad():
        expected = model(normalised(pictures())).last_hidden_state[:, 0]
    torch.testing.assert_close(extractor.features(pictures())["pool"], expected, rtol=1e-4, atol=1e-5)
    assert extractor.name == "dinov2_b_reg"

    whole = foundation.clip()
    extractor = feature_extractor("clip-l", weights=foundation.saved(whole, tmp_path / "clip"))
    with torch.no_grad():
        out = whole.vision_model(normalised(pictures(), "OPENAI_CLIP"), output_hidden_states=True)
        expected = whole.vision_model.post_layernorm(out.hidden_states[-1][:, 0])
    torch.testing.assert_close(extractor.features(pictures())["pool"], expected, rtol=1e-4, atol=1e-5)
    assert extractor.name == "clip_l"


def test_networks_by_path_and_hub_name_have_names_of_their_own(small, tmp_path, monkeypatch):
    first, second = (foundation.saved(foundation.dinov2(seed), tmp_path / str(seed) / "my-vit") for seed in (0, 1))
    found = [feature_extractor(str(first)), feature_extractor(second)]
    assert [x.name for x in found] == [f"my_vit_{x.sha256[:8]}" for x in found]
    assert found[0].name != found[1].name
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(first))
    assert feature_extractor("someone/dinov2.base").name == "someone_dinov2_base"
    names = {known.metric for known in networks._KNOWN.values()}
    assert len(names | {"efficientnet", "inception"}) == len(networks.NETWORKS)
    for name in ("dinov2-l", "dinov2-b"):  # the weights say nothing of what they should be but the kind and width
        assert feature_extractor(name, weights=first).name == name.replace("-", "_") + "_reg"


def test_weights_of_another_network_are_refused(small, tmp_path):
    registers = foundation.saved(foundation.dinov2(), tmp_path / "registers")
    with pytest.raises(
        ValueError, match=r"weights of a dinov2_with_registers of width 128; dinov2 is a dinov2 of width"
    ):
        feature_extractor("dinov2", weights=registers)
    narrow = foundation.saved(foundation.dinov2(width=64, registers=False), tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"a dinov2 of width 64; dinov2 is .* 128 \(facebook/dinov2-large\)"):
        feature_extractor("dinov2", weights=narrow)
    with pytest.raises(ValueError, match="says where weights are, and so does weights="):
        feature_extractor(str(narrow), weights=registers)
    with pytest.raises(ValueError, match="come with its package"):
        feature_extractor("efficientnet", weights=registers)


def test_missing_weights_say_where_to_get_them(tmp_path):
    for place in (None, tmp_path / "absent", tmp_path):
        with pytest.raises(FileNotFoundError) as caught:
            feature_extractor("dinov2", weights=place)
        for part in ("no weights of dinov2", "https://", "facebook/dinov2-large", networks.DINOV2_URL, "no-torch-hub"):
            assert part in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"https://huggingface.co/openai/clip-vit-large-patch14"):
        feature_extractor("clip-l")
    for name in ("inception", "inception-2015-12-05"):
        with pytest.raises(FileNotFoundError, match=r"https://github.com/toshas.* \(SHA-256 begins 6726825d\)"):
            feature_extractor(name)


def test_names_and_settings_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match=r"no network is called 'dino2'; did you mean dinov2\?.*efficientnet, dinov2"):
        feature_extractor("dino2")
    with pytest.raises(ValueError, match="precision 'fp16' is unknown; there are float32, tf32"):
        feature_extractor("efficientnet", precision="fp16")  # type: ignore[arg-type]
    model = foundation.clip(patch=16)
    model.vision_model.config.patch_size = 15
    with pytest.raises(ValueError, match="patches of 15 pixels, which do not divide 224"):
        ClassToken("x", model.vision_model, "0")


# --- small data ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clothes():
    from lwd.data.embedded import load_embedded_images

    part = load_embedded_images("heldout")
    return part.images[:60], part.labels[:60]


def test_small_data_by_the_same_code_as_the_demo(clothes, tmp_path):
    images, labels = clothes
    generated, real = images[:25], images[25:]
    extractor = feature_extractor("efficientnet")
    asked = ProtocolSettings(images=25, reference_images=35)
    result = score_images(generated, real, extractor, settings=asked)

    judge, embedded = Judge(10).eval(), EfficientNetFeatures.load().pooled
    reference = reference_features(real, judge=judge, embedded=embedded)
    expected = evaluate_images(generated, labels[:25], judge=judge, embedded=embedded, reference=reference)
    assert set(result.metrics) == {"fd_efficientnet", "precision_efficientnet", "recall_efficientnet"}
    assert result.metrics["fd_efficientnet"] == pytest.approx(expected["fd_embedded"], rel=1e-9)
    assert result.metrics["fd_efficientnet"] > 1
    assert result.deviations == ("features of efficientnet instead of inception-2015-12-05",)
    assert result.extractor["sha256"] == SHA256
    assert result.generated["shape"] == [1, 32, 32]

    # A folder of grey PNG files against an npz file are the same images, and so are both in colour.
    folder = tmp_path / "png"
    folder.mkdir()
    for i, image in enumerate(generated.numpy()):
        Image.fromarray(image).save(folder / f"{i:06}.png")
    np.savez(tmp_path / "real.npz", images=real.numpy())
    assert score_images(folder, tmp_path / "real.npz", extractor, settings=asked).metrics == result.metrics


def test_embedded_network_takes_any_size_and_colour():
    extractor = feature_extractor("efficientnet")
    images = pictures(2, 20)[:, :, :, :16]
    torch.testing.assert_close(
        extractor.features(images)["pool"], EfficientNetFeatures.load().pooled(images), rtol=0, atol=0
    )
    grey = extractor.features(images[:, :1])["pool"]
    torch.testing.assert_close(grey, extractor.features(images[:, :1].repeat(1, 3, 1, 1))["pool"])
    assert grey.shape == (2, 320)


def test_a_network_scores_by_its_own_name(small, tmp_path):
    model = foundation.saved(foundation.dinov2(registers=False), tmp_path)
    extractor = feature_extractor("dinov2", weights=model)
    real, fake = pictures(6, 32), pictures(5, 32, seed=1)
    result = score_images(fake, real, extractor, settings=ProtocolSettings(images=5, reference_images=6))
    a, b = (extractor.features(x)["pool"] for x in (real, fake))
    assert set(result.metrics) == {"fd_dinov2", "precision_dinov2", "recall_dinov2"}
    assert result.metrics["fd_dinov2"] == pytest.approx(frechet_distance(a, b), rel=1e-6)
    with pytest.raises(ValueError, match="statistics of 320 pool features, dinov2 gives 128: they are of another"):
        score_images(fake, FeatureStatistics.of(torch.randn(9, 320)), extractor)
