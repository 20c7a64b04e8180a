"""Reading latent sets fast: the mapping, SFD's shards, 8-bit features, the loader, batches shared by processes."""

import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lwd.data import BatchOrder, LatentDataset, ShardWriter
from lwd.data.foreign import adopt
from lwd.data.layout import read_header
from lwd.data.loader import BatchLoader, nearest
from lwd.data.mapping import MappedFiles
from lwd.data.quantize import dequantize, quantize
from lwd.latents import Group, LatentSpec, Normalization

SPEC = LatentSpec([Group("texture", 4), Group("semantic", 2, 2.0)])


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the mapping --------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(0, 9000), min_size=1, max_size=5),
    row=st.integers(1, 60),
    alignment=st.sampled_from([1, 2, 3, 4, 8]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_rows_are_gathered_from_anywhere_in_any_file(tmp_path_factory, sizes, row, alignment, seed):
    directory = tmp_path_factory.mktemp("files")
    generator = torch.Generator().manual_seed(seed)
    contents = [torch.randint(256, (size,), dtype=torch.uint8, generator=generator) for size in sizes]
    paths = []
    for number, content in enumerate(contents):
        paths.append(directory / str(number))
        paths[-1].write_bytes(bytes(content.tolist()))
    mapped = MappedFiles(paths)
    places = [
        (mapped.starts[number] + start, content[start : start + row])
        for number, content in enumerate(contents)
        for start in range(0, len(content) - row + 1, 8 * alignment)
    ]
    if not places:
        return
    order = torch.randperm(len(places), generator=generator).tolist()
    wide = torch.zeros(len(order), row + 16, dtype=torch.uint8)
    mapped.will_need(torch.tensor([places[i][0] for i in order]), row)
    mapped.gather(torch.tensor([places[i][0] for i in order]), wide[:, 3 : 3 + row], alignment)
    assert torch.equal(wide[:, 3 : 3 + row], torch.stack([places[i][1] for i in order]))
    assert not wide[:, :3].any()
    assert not wide[:, 3 + row :].any()


def test_a_mapping_outlives_its_owner_as_long_as_a_view_does(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(16)))
    view = MappedFiles([tmp_path / "file"]).array(8, (4,), torch.int16)
    assert view.tolist() == [8 + 256 * 9, 10 + 256 * 11, 12 + 256 * 13, 14 + 256 * 15]


def test_without_posix_the_files_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("os.name", "nt")
    for number in range(2):
        (tmp_path / str(number)).write_bytes(bytes([number] * 10))
    mapped = MappedFiles([tmp_path / "0", tmp_path / "1"])
    out = torch.zeros(2, 3, dtype=torch.uint8)
    mapped.gather(torch.tensor([mapped.starts[1] + 7, 0]), out, 1)
    assert out.tolist() == [[1, 1, 1], [0, 0, 0]]


def test_headers_tell_truncation_and_foreign_files(tmp_path):
    save_file({"a": torch.arange(6).view(3, 2)}, tmp_path / "a.safetensors")
    arrays, _ = read_header(tmp_path / "a.safetensors")
    assert (arrays["a"].row.shape, arrays["a"].count, arrays["a"].row.bytes) == ((2,), 3, 16)
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"truncated: {len(content) - 1} bytes, its header says {len(content)}"):
        read_header(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"\x05\x00")
    with pytest.raises(ValueError, match="not a safetensors file, or damaged"):
        read_header(tmp_path / "b.safetensors")


# --- SFD's shards --------------------------------------------------------------------------------------------------


def write_sfd(directory, counts=(3, 5), semantic="latents_sv", statistics=True):
    directory.mkdir(exist_ok=True)
    arrays = []
    for number, count in enumerate(counts):
        shard = {"labels": torch.arange(count) + 10 * number}
        for flip in ("", "_flip"):
            seed = 10 * number + len(flip)
            shard["latents" + flip] = 2 + 3 * numbers(count, 4, 2, 2, seed=seed)
            shard[semantic + flip] = numbers(count, 2, 2, 2, seed=seed + 1)
            shard["feats_dino" + flip] = numbers(count, 6, 2, 2, seed=seed + 2).half()
        save_file(shard, directory / f"latents_rank00_shard{number:03}.safetensors")
        arrays.append(shard)
    if statistics:
        for key, channels, mean, std in (("latents", 4, 2.0, 3.0), (semantic, 2, 0.5, 1.0)):
            ones = torch.ones(1, channels, 1, 1)
            torch.save({"mean": mean * ones, "std": std * ones}, directory / f"{key}_stats.pt")
    return {key: torch.cat([shard[key] for shard in arrays]) for key in arrays[0]}


@pytest.mark.parametrize("semantic", ["latents_sv", "latents_dino"])
def test_shards_of_sfd_are_read_as_they_are(tmp_path, semantic):
    arrays = write_sfd(tmp_path / "sfd", semantic=semantic)
    data = LatentDataset.open(tmp_path / "sfd")
    assert [(group.name, group.channels, group.weight) for group in data.spec.groups] == [
        ("texture", 4, 1.0), ("semantic", 2, 2.0),
    ]  # fmt: skip
    indices, flip = torch.tensor([7, 0, 4, 2]), torch.tensor([True, False, False, True])
    batch = data.gather(indices, flip)
    for image, (index, mirrored) in enumerate(zip(indices.tolist(), flip.tolist(), strict=True)):
        suffix = "_flip" if mirrored else ""
        assert torch.equal(batch.latents[image, :4], (arrays["latents" + suffix][index] - 2) / 3)
        assert torch.equal(batch.latents[image, 4:], arrays[semantic + suffix][index] - 0.5)
        assert torch.equal(batch.features[image], arrays["feats_dino" + suffix][index])
    assert batch.labels.tolist() == [14, 0, 11, 2]


def test_shards_of_sfd_are_told_apart_by_what_is_in_them(tmp_path):
    """Nobody has hashed them: extracted once more, with the same statistics, they are another set."""
    fingerprints = []
    for name, shift in (("one", 0), ("copy", 0), ("other", 1)):
        write_sfd(tmp_path / name)
        if shift:
            shard = tmp_path / name / "latents_rank00_shard001.safetensors"
            save_file({key: value + shift for key, value in load_file(shard).items()}, shard)
        fingerprints.append(LatentDataset.open(tmp_path / name).fingerprint)
    assert fingerprints[0] == fingerprints[1]
    assert fingerprints[0] != fingerprints[2]


def test_adopted_shards_get_checksums_and_their_statistics(tmp_path):
    arrays = write_sfd(tmp_path / "sfd", statistics=False)
    with pytest.raises(FileNotFoundError, match=r"neither manifest.json nor latents_stats.pt.*--adopt"):
        LatentDataset.open(tmp_path / "sfd")
    adopt(tmp_path / "sfd")
    data = LatentDataset.open(tmp_path / "sfd")
    data.check()
    direct = Normalization.from_latents(torch.cat([arrays["latents"], arrays["latents_sv"]], dim=1))
    assert data.normalization.mean == pytest.approx(direct.mean, rel=1e-9)
    assert data.normalization.std == pytest.approx(direct.std, rel=1e-9)
    with pytest.raises(FileExistsError, match="has a manifest already"):
        adopt(tmp_path / "sfd")
    write_sfd(tmp_path / "with")
    adopt(tmp_path / "with")
    assert LatentDataset.open(tmp_path / "with").normalization.mean == (2.0,) * 4 + (0.5,) * 2


def test_what_is_no_latent_shard_is_refused(tmp_path):
    save_file({"weights": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors holds weights, not latents and labels"):
        LatentDataset.open(tmp_path)
    write_sfd(tmp_path / "sfd")
    shard = tmp_path / "sfd" / "latents_rank00_shard001.safetensors"
    arrays = load_file(shard)
    save_file(arrays | {"latents": arrays["latents"].half()}, shard)
    with pytest.raises(ValueError, match=r"shard001.safetensors holds 5 x \[4, 2, 2\] float16 as latents, but"):
        LatentDataset.open(tmp_path / "sfd")


# --- 8-bit features ------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 999), size=st.floats(1e-6, 1e4))
@settings(max_examples=30, deadline=None)
def test_eight_bits_are_off_by_half_a_step_at_most(seed, size):
    features = size * numbers(3, 5, 2, 2, seed=seed)
    quantized, scale = quantize(features)
    assert quantized.abs().amax(dim=1).unique().tolist() == [127]
    error = (dequantize(quantized, scale) - features).abs()
    assert (error <= scale[:, None] / 2 * 1.001).all()


def test_a_token_of_zeros_stays_zero():
    quantized, scale = quantize(torch.zeros(1, 4, 1, 1))
    assert not dequantize(quantized, scale).any()


def make_set(directory, count=50, shard_size=8):
    latents, labels = numbers(count, 6, 2, 2), torch.arange(count) % 5
    features = numbers(count, 7, 2, 2, seed=1)
    with ShardWriter(
        directory, SPEC, list("abcde"), encoders={}, shard_size=shard_size, dtype=torch.bfloat16
    ) as writer:
        writer.add(latents, labels, flipped=-latents, features=features, flipped_features=-features, eight_bit=True)
    return LatentDataset.open(directory)


def test_stored_in_fewer_bits_memory_and_mapping_agree(tmp_path):
    data = make_set(tmp_path)
    assert data.gather_stored(torch.tensor([0])).latents.dtype == torch.bfloat16
    assert data.gather_stored(torch.tensor([0])).features.dtype == torch.int8
    indices, flip = torch.tensor([49, 3, 3]), torch.tensor([False, True, False])
    mapped, memory = data.gather(indices, flip), data.to_memory().gather(indices, flip)
    assert torch.equal(mapped.latents, memory.latents)
    torch.testing.assert_close(mapped.features, memory.features.float(), rtol=1e-3, atol=0)
    exact = numbers(50, 7, 2, 2, seed=1)[indices] * torch.tensor([1, -1, 1])[:, None, None, None]
    assert (mapped.features - exact).abs().max() < 0.02
    assert torch.equal(mapped.features[1], -mapped.features[2])


def test_another_process_can_use_the_set(tmp_path):
    data = make_set(tmp_path)
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again.gather(torch.arange(50)).latents, data.gather(torch.arange(50)).latents)


# --- the loader ----------------------------------------------------------------------------------------------------


def test_the_loader_gives_the_batches_of_the_order_from_any_step(tmp_path):
    data, order = make_set(tmp_path), BatchOrder(50, 12, seed=3)
    loader = BatchLoader(data, order, torch.device("cpu"), flips=True, ahead=2)
    for step in [0, 1, 2, 3, 9, 10, 4, 5]:  # on, ahead, and back as a resumed run may go
        batch, expected = loader.get(step), data.gather(order.indices(step), order.flips(step))
        assert torch.equal(batch.latents, expected.latents)
        assert torch.equal(batch.labels, expected.labels)
        assert torch.equal(batch.features, expected.features)


def test_a_batch_is_left_alone_while_the_next_is_read(tmp_path):
    data, order = make_set(tmp_path), BatchOrder(50, 12, seed=3)
    loader = BatchLoader(data, order, torch.device("cpu"))
    first = loader.get(0)
    kept = first.latents.clone(), first.labels.clone(), first.features.clone()
    loader.get(1)
    assert torch.equal(first.latents, kept[0])
    assert torch.equal(first.labels, kept[1])
    assert torch.equal(first.features, kept[2])
    with pytest.raises(ValueError, match="at least one batch"):
        BatchLoader(data, order, torch.device("cpu"), ahead=0)


def test_on_a_cpu_the_mapping_itself_is_the_nearest(tmp_path):
    data = make_set(tmp_path)
    assert nearest(data, torch.device("cpu")) is data


@pytest.mark.gpu
def test_the_loader_reads_ahead_for_a_gpu(tmp_path):
    data, order, device = make_set(tmp_path), BatchOrder(50, 12, seed=3), torch.device("cuda")
    loader = BatchLoader(data, order, device, flips=True, ahead=3)
    for step in [0, 1, 2, 7, 8]:
        batch, expected = loader.get(step), data.gather(order.indices(step), order.flips(step))
        torch.testing.assert_close(batch.latents.cpu(), expected.latents)
        torch.testing.assert_close(batch.features.cpu(), expected.features)
        assert torch.equal(batch.labels.cpu(), expected.labels)


# --- processes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "world"), [(50, 2), (7, 4), (13, 3)])
def test_processes_together_draw_the_batch_of_one(count, world):
    whole = BatchOrder(count, 12, seed=3)
    parts = [BatchOrder(count, 12, seed=3, rank=rank, world=world) for rank in range(world)]
    for step in range(20):
        assert torch.equal(torch.cat([part.indices(step) for part in parts]), whole.indices(step))
        assert torch.equal(torch.cat([part.flips(step) for part in parts]), whole.flips(step))
    with pytest.raises(ValueError, match="5 processes cannot share a batch of 12 evenly"):
        BatchOrder(count, 12, seed=3, rank=0, world=5)


def test_a_manifest_is_readable_json(tmp_path):
    make_set(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["features"] == {"key": "feats_dino", "shape": [7, 2, 2], "dtype": "int8"}
    assert manifest["groups"][1] == {
        "name": "semantic", "channels": 2, "weight": 2.0, "key": "latents_sv", "dtype": "bfloat16",
    }  # fmt: skip
    assert [shard["count"] for shard in manifest["shards"]] == [8] * 6 + [2]
