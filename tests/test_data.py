"""Latent sets on disk and in memory, and the order of training."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lwd.data import BatchOrder, LatentDataset, ShardWriter, TensorLatents
from lwd.data import order as order_module
from lwd.data.layout import group_key
from lwd.latents import Group, LatentSpec, Normalization

SPEC = LatentSpec([Group("texture", 3), Group("semantic", 2, 2.0), Group("depth", 1)])


def make_latents(count: int = 25) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = 3 * torch.randn(count, 6, 4, 4, generator=generator) + torch.arange(6.0)[:, None, None]
    return latents, torch.arange(count) % 5


def make_features(count: int = 25) -> torch.Tensor:
    return torch.randn(count, 8, 2, 2, generator=torch.Generator().manual_seed(1)).half()


def write(directory, latents, labels, views=None, **kwargs):
    """`latents` in batches of 7, with the arrays of `views` beside them."""
    with ShardWriter(directory, SPEC, list("abcde"), encoders={"texture": {"encoder": "x"}}, **kwargs) as writer:
        for start in range(0, len(latents), 7):
            batch = slice(start, start + 7)
            extra = {name: array[batch] for name, array in (views or {}).items()}
            writer.add(latents[batch], labels[batch], **extra)
    return directory


def make_views(latents) -> dict[str, torch.Tensor]:
    features = make_features(len(latents))
    return {"flipped": latents.flip(3), "features": features, "flipped_features": features.flip(3)}


# --- shards ------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_bit_for_bit_across_shards(tmp_path):
    latents, labels = make_latents()
    write(tmp_path, latents, labels, shard_size=10, provenance={"images": "random"})
    data = LatentDataset.open(tmp_path)
    assert [s["count"] for s in data.manifest["shards"]] == [10, 10, 5]
    assert len(data) == 25
    assert data.grid == (4, 4)
    assert data.manifest["provenance"] == {"images": "random"}
    data.check()
    memory = data.to_memory()
    assert torch.equal(memory.latents, latents)
    assert torch.equal(memory.labels, labels)
    assert memory.spec == SPEC
    assert data.class_names == tuple("abcde")
    assert data.encoders == {"texture": {"encoder": "x"}}


def test_keys_are_those_of_sfd(tmp_path):
    assert [group_key(name) for name in SPEC.names] == ["latents", "latents_sv", "latents_depth"]
    latents, labels = make_latents()
    write(tmp_path, latents, labels, make_views(latents))
    shard = load_file(tmp_path / "shard-00000.safetensors")
    groups = {"latents", "latents_sv", "latents_depth", "feats_dino"}
    assert shard.keys() == groups | {f"{key}_flip" for key in groups} | {"labels"}
    assert torch.equal(shard["latents_sv_flip"], latents[:, 3:5].flip(3))
    assert shard["feats_dino"].dtype == torch.float16
    assert shard["labels"].dtype == torch.int64


def test_streamed_statistics_equal_direct_ones(tmp_path):
    latents, labels = make_latents()
    # A mean that is large against the spread: naive sums of squares would lose it.
    latents[:, 0] += 1e4
    write(tmp_path, latents, labels, {"flipped": latents.flip(3) + 5}, shard_size=10)
    found = LatentDataset.open(tmp_path).normalization
    direct = Normalization.from_latents(latents)
    assert found.mean == pytest.approx(direct.mean, rel=1e-12)
    assert found.std == pytest.approx(direct.std, rel=1e-9)
    batch = LatentDataset.open(tmp_path).gather(torch.arange(25))
    torch.testing.assert_close(batch.latents.mean(dim=(0, 2, 3)), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(batch.latents.std(dim=(0, 2, 3)), torch.ones(6), atol=2e-3, rtol=0)


def test_a_constant_channel_keeps_its_scale(tmp_path):
    latents, labels = make_latents()
    latents[:, 2] = -1.0
    write(tmp_path, latents, labels)
    found = LatentDataset.open(tmp_path).normalization
    assert (found.mean[2], found.std[2]) == (-1.0, 1.0)


def test_statistics_can_be_those_of_another_set(tmp_path):
    latents, labels = make_latents()
    other = Normalization((1.0,) * 6, (2.0,) * 6)
    batch = LatentDataset.open(write(tmp_path, latents, labels, normalization=other)).gather(torch.tensor([4]))
    assert torch.equal(batch.latents, (latents[4:5] - 1) / 2)


def test_the_callers_buffers_may_be_reused(tmp_path):
    latents, labels = make_latents(6)
    buffer, buffer_labels = latents[:3].clone(), labels[:3].clone()
    with ShardWriter(tmp_path, SPEC, list("abcde"), encoders={}) as writer:
        writer.add(buffer, buffer_labels)
        buffer.copy_(latents[3:])
        buffer_labels.copy_(labels[3:])
        writer.add(buffer, buffer_labels)
    data = LatentDataset.open(tmp_path).to_memory()
    assert torch.equal(data.latents, latents)
    assert torch.equal(data.labels, labels)


@pytest.mark.parametrize("in_memory", [False, True])
def test_gather_across_shards_equals_plain_indexing(tmp_path, in_memory):
    latents, labels = make_latents()
    views = make_views(latents)
    opened = LatentDataset.open(write(tmp_path, latents, labels, views, shard_size=4))
    data = opened.to_memory() if in_memory else opened
    generator = torch.Generator().manual_seed(2)
    indices = torch.randint(25, (40,), generator=generator)
    flip = torch.rand(40, generator=generator) < 0.5
    mirrored = flip[:, None, None, None]

    plain = data.gather(indices)
    assert torch.equal(plain.latents, data.normalization.normalize(latents[indices]))
    assert torch.equal(plain.labels, labels[indices])
    assert torch.equal(plain.features, views["features"][indices])

    batch = data.gather(indices, flip)
    expected = torch.where(mirrored, latents.flip(3)[indices], latents[indices])
    assert torch.equal(batch.latents, data.normalization.normalize(expected))
    assert torch.equal(batch.labels, labels[indices])
    assert torch.equal(
        batch.features, torch.where(mirrored, views["flipped_features"][indices], views["features"][indices])
    )


def test_gather_refuses_what_the_set_has_not(tmp_path):
    latents, labels = make_latents()
    data = LatentDataset.open(write(tmp_path, latents, labels))
    assert data.gather(torch.tensor([0])).features is None
    for source in (data, data.to_memory()):
        with pytest.raises(ValueError, match="no mirrored latents"):
            source.gather(torch.tensor([0]), torch.tensor([True]))
        with pytest.raises(IndexError):
            source.gather(torch.tensor([25]))
    with pytest.raises(IndexError, match=r"run from -1 to 3 in a latent set of 25"):
        data.gather(torch.tensor([-1, 3]))


def test_tensors_that_do_not_fit_one_another_are_refused():
    latents, labels = make_latents()
    with pytest.raises(ValueError, match=r"25 latents but labels of shape \(3,\)"):
        TensorLatents(SPEC, latents, labels[:3])
    with pytest.raises(ValueError, match=r"must be 0 to 2; they run from 0 to 4"):
        TensorLatents(SPEC, latents, labels, class_names="abc")
    with pytest.raises(ValueError, match="mirrored latents have shape"):
        TensorLatents(SPEC, latents, labels, flipped=latents[:3])
    with pytest.raises(ValueError, match="features of the mirrored images"):
        TensorLatents(SPEC, latents, labels, flipped=latents, features=make_features())
    with pytest.raises(ValueError, match="no images"):
        TensorLatents(SPEC, latents[:0], labels[:0])


# --- damage ------------------------------------------------------------------------------------------------------


def test_truncated_shard_is_named_with_both_sizes(tmp_path):
    write(tmp_path, *make_latents())
    shard = tmp_path / "shard-00000.safetensors"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"shard-00000.*{size - 100} bytes, expected {size}; delete shard-00000"):
        LatentDataset.open(tmp_path)


def test_changed_shard_fails_its_checksum(tmp_path):
    write(tmp_path, *make_latents())
    shard = tmp_path / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="fails its checksum"):
        LatentDataset.open(tmp_path).check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("latents_sv"), r"shard-00000.safetensors holds no latents_sv"),
        (
            lambda arrays: arrays.update(latents=arrays["latents"][:, :2].contiguous()),
            r"holds 25 x \[2, 4, 4\] float32 as latents, but the set has 25 x \[3, 4, 4\] float32",
        ),
        (
            lambda arrays: arrays.update(labels=arrays["labels"][:7].contiguous()),
            r"holds 7 x \[\] int64 as labels, but the set has 25 x \[\] int64",
        ),
    ],
)
def test_shards_that_differ_from_the_manifest_are_named(tmp_path, change, message):
    write(tmp_path, *make_latents())
    path = tmp_path / "shard-00000.safetensors"
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"][0]["files"][0]["bytes"] = path.stat().st_size
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        LatentDataset.open(tmp_path)


def test_unfinished_or_foreign_sets_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no finished latent set.*lwd encode"):
        LatentDataset.open(tmp_path)
    write(tmp_path, *make_latents())
    manifest = tmp_path / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"count": 24}))
    with pytest.raises(ValueError, match="do not add up to its count of 24"):
        LatentDataset.open(tmp_path)
    (tmp_path / "shard-00000.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00000.safetensors is missing"):
        LatentDataset.open(tmp_path)
    del content["grid"]
    manifest.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"manifest.json is incomplete .*grid"):
        LatentDataset.open(tmp_path)
    manifest.write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="format 'other'"):
        LatentDataset.open(tmp_path)
    manifest.write_text('{"format": "lwd-la')
    with pytest.raises(ValueError, match=r"manifest.json is not readable JSON"):
        LatentDataset.open(tmp_path)


def test_a_finished_set_is_never_written_over(tmp_path):
    write(tmp_path, *make_latents())
    with pytest.raises(FileExistsError, match="holds a finished latent set"):
        ShardWriter(tmp_path, SPEC, list("abcde"), encoders={})


def test_an_interrupted_writer_leaves_no_set_and_the_next_one_cleans_up(tmp_path):
    latents, labels = make_latents()
    broken = latents.clone()
    broken[-1] = float("inf")
    with pytest.raises(ValueError, match=r"images \[24\] contain NaN or infinity"):
        write(tmp_path, broken, labels, shard_size=3)
    assert len(list(tmp_path.glob("shard-*"))) == 7
    (tmp_path / ".shard-00008.safetensors.123.tmp").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match="no finished latent set"):
        LatentDataset.open(tmp_path)
    data = LatentDataset.open(write(tmp_path, latents, labels, shard_size=20))
    assert torch.equal(data.to_memory().latents, latents)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "manifest.json",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]


def test_bad_batches_are_refused_and_what_was_added_before_is_kept(tmp_path):
    latents, labels = make_latents()
    features = make_features()
    writer = ShardWriter(tmp_path, SPEC, list("abcde"), encoders={}, shard_size=4)
    writer.add(latents[:10], labels[:10], features=features[:10])
    bad = latents.clone()
    bad[12, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"latents of images \[12\] contain NaN"):
        writer.add(bad[10:], labels[10:], features=features[10:])
    with pytest.raises(ValueError, match=r"feats_dino of images \[10, 11\] contain NaN or inf"):
        writer.add(latents[10:12], labels[10:12], features=torch.full((2, 8, 2, 2), float("inf")).half())
    with pytest.raises(ValueError, match=r"must be 0 to 4; they run from 0 to 9"):
        writer.add(latents[:2], torch.tensor([0, 9]), features=features[:2])
    with pytest.raises(ValueError, match=r"asks for \[B, 6, H, W\]"):
        writer.add(latents[:2, :5], labels[:2], features=features[:2])
    with pytest.raises(ValueError, match=r"images from 10 on have other arrays .*: feats_dino"):
        writer.add(latents[10:], labels[10:])
    with pytest.raises(ValueError, match=r"other arrays .*: latents \(now .*latents_depth \(now .*latents_sv"):
        writer.add(latents[10:, :, :2], labels[10:], features=features[10:])
    with pytest.raises(ValueError, match="there are no images"):
        writer.add(latents[:0], labels[:0])
    assert not (tmp_path / "manifest.json").exists()
    writer.add(latents[10:], labels[10:], features=features[10:])
    data = LatentDataset.open(writer.close()).to_memory()
    assert torch.equal(data.latents, latents)
    assert torch.equal(data.features, features)
    with pytest.raises(ValueError, match="no latents were added"):
        ShardWriter(tmp_path / "empty", SPEC, list("abcde"), encoders={}).close()


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
    running = BatchOrder(20, 7, seed=1)
    drawn = [running.indices(step) for step in range(12)]
    for step in range(12):
        assert torch.equal(BatchOrder(20, 7, seed=1).indices(step), drawn[step])
    assert torch.equal(running.indices(2), drawn[2])
    assert not torch.equal(BatchOrder(20, 7, seed=2).indices(8), drawn[8])
    with pytest.raises(ValueError, match="from 0, not -1"):
        running.indices(-1)
    with pytest.raises(ValueError, match="not 0 and 4"):
        BatchOrder(0, 4, seed=0)


def test_a_permutation_is_drawn_once_per_epoch(monkeypatch):
    drawn = []
    real = order_module.stream
    monkeypatch.setattr(order_module, "stream", lambda *args: drawn.append(args) or real(*args))
    order = BatchOrder(10, 3, seed=5)
    for step in range(10):
        order.indices(step)
    assert drawn == [(5, "epoch", 0), (5, "epoch", 1), (5, "epoch", 2)]


def test_flips_are_seeded_and_fair():
    order, again = BatchOrder(100, 1000, seed=1), BatchOrder(100, 1000, seed=1)
    assert torch.equal(order.flips(5), again.flips(5))
    assert not torch.equal(order.flips(5), order.flips(6))
    # 1,000 fair draws stay within four standard deviations, 16 each, of 500.
    assert abs(int(order.flips(5).sum()) - 500) < 64
