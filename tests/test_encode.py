"""From images to latent sets: plans, resuming, sharing the work, statistics, further groups."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from lwd.data import LatentDataset
from lwd.data.check import as_colors, check, contact_sheet, describe
from lwd.data.encode import EncodeConfig, Encoding
from lwd.data.extend import add_group
from lwd.data.fit import fit_pca
from lwd.data.images import FolderImages, ImageError
from lwd.data.layout import image_names
from lwd.data.sharding import Share
from lwd.encoders import PixelPatches
from lwd.encoders.choose import decoder
from lwd.encoders.composite import CompositeEncoder, ProjectedFeatures, SharedFeatures
from lwd.latents import Normalization

CONFIG = EncodeConfig(size=16, shard_size=4, batch=3, workers=2)


class ColorNetwork:
    """Features on a 4x4 grid that are easy to compute by hand: the mean colour of each 4x4 square, and its square."""

    width = 6

    def __init__(self):
        self.calls = 0

    def feature_maps(self, images):
        self.calls += 1
        mean = torch.nn.functional.avg_pool2d(images.float() / 255, 4)
        return torch.cat([mean, mean**2], dim=1)

    def describe(self):
        return {"network": "colors", "width": 6}


class Noisy:
    """A group whose latents depend on the seeds alone, as a posterior sample does."""

    def encode(self, images, seeds=None):
        draws = [torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(draws)

    def describe(self):
        return {"encoder": "noisy"}


class Dropped:
    """The projection that keeps the first two features."""

    channels = 2

    def transform(self, maps, seeds=None):
        return maps[:, :2]

    def describe(self):
        return {"encoder": "dropped", "channels": 2}


@pytest.fixture
def folder(tmp_path):
    """Eleven PNGs of 20 x 16 pixels in two classes."""
    generator = np.random.default_rng(0)
    for number in range(11):
        path = tmp_path / "images" / ("cat" if number < 6 else "dog") / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def make_encoder(repa=True):
    shared = SharedFeatures(ColorNetwork())
    groups = {"texture": PixelPatches(4), "semantic": ProjectedFeatures(shared, Dropped()), "noise": Noisy()}
    return CompositeEncoder(groups, repa=shared if repa else None)


def pixels(folder):
    """The images as the centre crop leaves them, in order."""
    images = [np.asarray(Image.open(path))[:, 2:18] for path in sorted(folder.rglob("*.png"))]
    return torch.from_numpy(np.stack(images)).movedim(-1, 1)


def arrays_of(directory):
    data = LatentDataset.open(directory)
    memory = data.to_memory()
    return [memory.latents, memory.flipped, memory.features, memory.flipped_features, memory.labels]


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.glob("shard-*.safetensors"))}


def test_a_set_holds_every_image_once_with_what_its_encoders_say(folder, tmp_path):
    assert Encoding(FolderImages(folder), make_encoder(), CONFIG, tmp_path / "set").run()
    data = LatentDataset.open(tmp_path / "set")
    assert [shard["count"] for shard in data.manifest["shards"]] == [4, 4, 3]
    assert data.spec.names == ("texture", "semantic", "noise")
    assert [group.weight for group in data.spec.groups] == [1.0, 24.0, 24.0]  # 48 channels of pixels over 2
    assert data.class_names == ("cat", "dog")
    assert [name for shard in data.names() for name in shard] == [
        f"{'cat' if number < 6 else 'dog'}/{number:02}.png" for number in range(11)
    ]
    expected, mirrored = pixels(folder), pixels(folder).flip(3)
    latents, flipped, features, flipped_features, labels = arrays_of(tmp_path / "set")
    assert labels.tolist() == [0] * 6 + [1] * 5
    assert torch.equal(latents[:, :48], PixelPatches(4).encode(expected))
    assert torch.equal(flipped[:, :48], PixelPatches(4).encode(mirrored))
    network = ColorNetwork()
    assert torch.equal(latents[:, 48:50], network.feature_maps(expected)[:, :2])
    assert torch.equal(features, network.feature_maps(expected).half())
    assert torch.equal(flipped_features, network.feature_maps(mirrored).half())
    # Samples of two images, or of an image and its mirror image, are independent.
    noise = torch.cat([latents[:, 50:], flipped[:, 50:]]).flatten(1)
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.7
    direct = Normalization.from_latents(latents)
    assert data.normalization.mean == pytest.approx(direct.mean, rel=1e-9, abs=1e-12)
    assert data.normalization.std == pytest.approx(direct.std, rel=1e-9)
    assert data.manifest["encoders"]["semantic"] == {
        "encoder": "dropped", "channels": 2, "network": {"network": "colors", "width": 6},
    }  # fmt: skip


def test_the_feature_network_runs_once_per_view(folder, tmp_path):
    encoder = make_encoder()
    encoding = Encoding(FolderImages(folder), encoder, CONFIG, tmp_path / "set")
    encoding.run()
    # Shards of 4, 4, 3 in batches of 3 are 3 + 1, 3 + 1 and 3 images: five batches, two views.
    assert encoder.repa.network.calls == 10


def test_any_number_of_processes_make_the_same_set(folder, tmp_path):
    source = FolderImages(folder)
    Encoding(source, make_encoder(), CONFIG, tmp_path / "one").run()
    finished = [Encoding(source, make_encoder(), CONFIG, tmp_path / "two", Share(rank, 2)).run() for rank in (1, 0)]
    assert finished == [False, True]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    read = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", "two")]
    assert read[0] == read[1]


def test_an_interrupted_run_goes_on_and_a_damaged_shard_is_made_again(folder, tmp_path, monkeypatch):
    source = FolderImages(folder)
    Encoding(source, make_encoder(), CONFIG, tmp_path / "whole").run()
    encoding = Encoding(source, make_encoder(), CONFIG, tmp_path / "set")
    real, calls = encoding.arrays, []

    def interrupted(indices, images):
        calls.append(indices)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(indices, images)

    monkeypatch.setattr(encoding, "arrays", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encoding.run()
    assert list(contents(tmp_path / "set")) == ["shard-00000.safetensors"]
    with pytest.raises(FileNotFoundError, match="no finished latent set"):
        LatentDataset.open(tmp_path / "set")
    seen = []
    assert Encoding(source, make_encoder(), CONFIG, tmp_path / "set").run(
        lambda done, total: seen.append((done, total))
    )
    assert seen == [(7, 11), (8, 11), (11, 11)]  # the first shard is not read again
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")

    shard = tmp_path / "set" / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"shard-00001.safetensors is truncated .* delete shard-00001.safetensors"):
        LatentDataset.open(tmp_path / "set")
    shard.unlink()
    Encoding(source, make_encoder(), CONFIG, tmp_path / "set").run()
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_other_settings_do_not_mix_with_what_is_there(folder, tmp_path):
    source = FolderImages(folder)
    Encoding(source, make_encoder(), CONFIG, tmp_path / "set").run()
    other = EncodeConfig(size=16, shard_size=4, batch=5, workers=1, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"other settings:\s+config\.dtype: 'float32' there, 'bfloat16' now"):
        Encoding(source, make_encoder(), other, tmp_path / "set").run()
    (folder / "dog" / "10.png").unlink()
    with pytest.raises(ValueError, match=r"images\.count: 11 there, 10 now"):
        Encoding(FolderImages(folder), make_encoder(), CONFIG, tmp_path / "set").run()


def test_corrupt_images_stop_the_run_or_are_listed(folder, tmp_path):
    (folder / "cat" / "02.png").write_bytes(b"not an image")
    source = FolderImages(folder)
    with pytest.raises(ImageError, match=r"02\.png"):
        Encoding(source, make_encoder(), CONFIG, tmp_path / "set").run()
    skipping = EncodeConfig(size=16, shard_size=4, batch=3, workers=2, skip_corrupt=True)
    assert Encoding(source, make_encoder(), skipping, tmp_path / "set").run()
    data = LatentDataset.open(tmp_path / "set")
    assert [shard["count"] for shard in data.manifest["shards"]] == [3, 4, 3]
    assert "cat/02.png" not in [name for shard in data.names() for name in shard]
    (failure,) = [json.loads(line) for line in (tmp_path / "set" / "failed.jsonl").read_text().splitlines()]
    assert failure["image"] == "cat/02.png"
    assert data.manifest["provenance"]["failed"] == 1
    kept = [number for number in range(11) if number != 2]
    for path in folder.rglob("02.png"):
        path.unlink()
    assert torch.equal(arrays_of(tmp_path / "set")[0][:, :48], PixelPatches(4).encode(pixels(folder)))
    assert len(data) == len(kept)


def test_statistics_of_a_sample_and_of_another_set(folder, tmp_path):
    config = EncodeConfig(size=16, shard_size=4, batch=3, workers=2, statistics=5)
    encoding = Encoding(FolderImages(folder), make_encoder(), config, tmp_path / "set")
    encoding.run()
    chosen = encoding._in_statistics.nonzero().flatten()
    assert len(chosen) == 5
    data = LatentDataset.open(tmp_path / "set")
    direct = Normalization.from_latents(data.to_memory().latents[chosen])
    assert data.normalization.mean == pytest.approx(direct.mean, rel=1e-9, abs=1e-12)
    assert data.manifest["provenance"]["statistics"] == "of 5 images"
    given = Normalization((0.5,) * 52, (2.0,) * 52)
    Encoding(FolderImages(folder), make_encoder(), CONFIG, tmp_path / "other", normalization=given).run()
    assert LatentDataset.open(tmp_path / "other").normalization == given


@pytest.mark.parametrize(("dtype", "features", "error"), [("bfloat16", "int8", 2**-8), ("float16", "float32", 2**-11)])
def test_storage_in_fewer_bits(folder, tmp_path, dtype, features, error):
    config = EncodeConfig(size=16, shard_size=4, batch=3, workers=2, dtype=dtype, features=features)
    Encoding(FolderImages(folder), make_encoder(), config, tmp_path / "set").run()
    data = LatentDataset.open(tmp_path / "set")
    assert {group["dtype"] for group in data.manifest["groups"]} == {dtype}
    exact = PixelPatches(4).encode(pixels(folder))
    stored = data.to_memory().latents[:, :48]
    assert ((stored - exact).abs() <= error * exact.abs()).all()
    maps = ColorNetwork().feature_maps(pixels(folder))
    batch = data.gather(torch.arange(11))
    if features == "int8":
        # No entry is off by more than half a step of its token's scale.
        assert ((batch.features - maps).abs() <= maps.amax(dim=1, keepdim=True) / 254 * 1.0001).all()
    else:
        assert torch.equal(batch.features, maps)


def test_nan_latents_name_their_images(folder, tmp_path):
    class Broken(Noisy):
        def encode(self, images, seeds=None):
            latents = super().encode(images, seeds)
            latents[-1] = float("nan")
            return latents

    encoding = Encoding(FolderImages(folder), CompositeEncoder({"noise": Broken()}), CONFIG, tmp_path / "set")
    with pytest.raises(ValueError, match=r"the noise latents of cat/02\.png contain NaN"):
        encoding.run()


def test_groups_must_share_a_grid(folder, tmp_path):
    encoder = CompositeEncoder({"texture": PixelPatches(8), "noise": Noisy()})
    with pytest.raises(ValueError, match=r"texture 2 x 2, noise 4 x 4; choose"):
        Encoding(FolderImages(folder), encoder, CONFIG, tmp_path / "set").run()


def test_the_estimate_is_what_the_set_becomes(folder, tmp_path, monkeypatch):
    encoding = Encoding(FolderImages(folder), make_encoder(), CONFIG, tmp_path / "set")
    estimate = encoding.estimate()
    assert (estimate.images, estimate.shards, estimate.remaining) == (11, 3, 11)
    # Two views of 52 latent channels in float32 and 6 features in float16 on 16 positions, and a label.
    assert estimate.bytes_per_image == 2 * (52 * 4 + 6 * 2) * 16 + 8
    encoding.run()
    written = sum(len(content) for content in contents(tmp_path / "set").values())
    assert estimate.bytes < written < estimate.bytes + 3 * 2000  # headers
    assert encoding.estimate().remaining == 0
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match="free; use another disk"):
        Encoding(FolderImages(folder), make_encoder(), CONFIG, tmp_path / "other").estimate()


def test_a_full_disk_stops_cleanly_and_the_run_goes_on(folder, tmp_path, monkeypatch):
    source = FolderImages(folder)
    Encoding(source, make_encoder(), CONFIG, tmp_path / "whole").run()
    from lwd.data import layout

    real, calls = layout.save_file, []

    def full(arrays, path, metadata=None):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(arrays, path, metadata)

    monkeypatch.setattr(layout, "save_file", full)
    with pytest.raises(OSError, match=r"could not write .*shard-00001.safetensors: .*No space left"):
        Encoding(source, make_encoder(), CONFIG, tmp_path / "set").run()
    assert list(contents(tmp_path / "set")) == ["shard-00000.safetensors"]
    assert not list((tmp_path / "set").glob(".*tmp"))
    assert Encoding(source, make_encoder(), CONFIG, tmp_path / "set").run()
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_pca_of_a_sample_equals_the_pca_of_its_features(folder):
    source, network = FolderImages(folder), ColorNetwork()
    pca = fit_pca(source, network, 2, CONFIG.reading, images=100)
    maps = network.feature_maps(pixels(folder))
    tokens = maps.movedim(1, -1).flatten(0, -2).double()
    _, _, directions = torch.linalg.svd(tokens - tokens.mean(dim=0), full_matrices=False)
    assert (pca.directions.double() * directions[:2]).sum(dim=1).abs().tolist() == pytest.approx([1, 1], abs=1e-6)
    assert (pca.directions.gather(1, pca.directions.abs().argmax(dim=1, keepdim=True)) > 0).all()
    again = fit_pca(source, network, 2, CONFIG.reading, images=100)
    assert again.describe() == pca.describe()


# --- a further group ------------------------------------------------------------------------------------------------


def edges(images):
    """Mean horizontal difference of every 4x4 square, [n, 1, 4, 4]."""
    grey = images.float().mean(dim=1, keepdim=True) / 255
    return torch.nn.functional.avg_pool2d(torch.nn.functional.pad(grey.diff(dim=3), (0, 1)), 4)


def test_a_group_is_added_without_touching_the_others(folder, tmp_path):
    source, directory = FolderImages(folder), tmp_path / "set"
    Encoding(source, make_encoder(), CONFIG, directory).run()
    before, old = contents(directory), arrays_of(directory)
    assert not add_group(directory, source, "edges", edges, share=Share(1, 2), batch=2)
    assert LatentDataset.open(directory).spec.names == ("texture", "semantic", "noise")
    assert add_group(directory, source, "edges", edges, share=Share(0, 2), batch=2)
    assert contents(directory) == before
    data = LatentDataset.open(directory)
    assert data.spec.names == ("texture", "semantic", "noise", "edges")
    assert data.spec.groups[3].weight == 48
    check(data)
    new = arrays_of(directory)
    assert torch.equal(new[0][:, :52], old[0])
    torch.testing.assert_close(new[0][:, 52:], edges(pixels(folder)))
    torch.testing.assert_close(new[1][:, 52:], edges(pixels(folder).flip(3)))
    batch = data.gather(torch.tensor([7, 2]), torch.tensor([True, False]))
    expected = torch.stack([new[1][7], new[0][2]])
    assert torch.equal(batch.latents, data.normalization.normalize(expected))
    with pytest.raises(ValueError, match="has a group 'edges' already"):
        add_group(directory, source, "edges", edges)
    with pytest.raises(ValueError, match=r"must be \[\d, C, 4, 4\]"):
        add_group(directory, source, "wrong", lambda images: torch.zeros(len(images), 1, 2, 2))
    held, alike = tmp_path / "held", {"description": {"encoder": "edges"}}
    Encoding(source, make_encoder(), CONFIG, held, normalization=data.normalization_of(data.spec.names[:3])).run()
    for where, settings in ((directory, {}), (held, {"like": directory})):
        assert add_group(where, source, "edges2", edges, weight=None if settings else 5.0, **alike, **settings)
    train, other = LatentDataset.open(directory), LatentDataset.open(held)
    assert other.spec.groups[3] == train.spec.groups[4]
    assert other.normalization_of(("edges2",)) == train.normalization_of(("edges2",))
    assert (
        train.normalization_of(("texture", "edges2")).mean
        == train.normalization.mean[:48] + train.normalization.mean[53:]
    )
    for settings, message in (
        ({"like": held}, "held has no group 'edges3', only"),
        (
            {"like": directory, "description": {"encoder": "x"}},
            "was made by {'encoder': 'edges'}, not by {'encoder': 'x'}",
        ),
        ({"like": directory, "weight": 2.0, **alike}, "the weight of 'edges4' in .* is 48, not 2"),
    ):
        name = "edges3" if "held" in str(settings["like"]) else "edges4"
        if name == "edges4" and name not in LatentDataset.open(directory).spec.names:
            add_group(directory, source, name, edges, **alike)
        with pytest.raises(ValueError, match=message):
            add_group(held, source, name, edges, **settings)
    (folder / "cat" / "03.png").unlink()
    with pytest.raises(ValueError, match=r"holds 'cat/03.png', which is not among the 10 images"):
        add_group(directory, FolderImages(folder), "depth", edges)


# --- checking -------------------------------------------------------------------------------------------------------


def test_check_finds_damage_and_foreign_statistics(folder, tmp_path):
    directory = tmp_path / "set"
    Encoding(FolderImages(folder), make_encoder(), CONFIG, directory).run()
    data = LatentDataset.open(directory)
    findings = check(data)
    assert findings.problems == []
    assert findings.mean < 1e-5
    lines = describe(data)
    assert lines[0].startswith("11 images in 3 shards")
    assert lines[1] == "2 classes of 5 to 6 images"
    assert "texture     48 x 4 x 4 float32, weight 1: pixels" in lines
    shard = directory / "shard-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    (problem,) = check(LatentDataset.open(directory)).problems
    assert problem.startswith("shard-00002.safetensors fails its checksum: delete it")
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["normalization"]["mean"] = [value + 1 for value in manifest["normalization"]["mean"]]
    (directory / "manifest.json").write_text(json.dumps(manifest))
    assert check(LatentDataset.open(directory)).mean > 0.5


def test_the_contact_sheet_shows_the_images(folder, tmp_path):
    directory = tmp_path / "set"
    source = FolderImages(folder)
    Encoding(source, make_encoder(), CONFIG, directory).run()
    data = LatentDataset.open(directory)
    decode = decoder(data.encoders["texture"])
    path = contact_sheet(data, tmp_path / "sheet.png", decoder=decode, source=source, count=4)
    width, height = Image.open(path).size
    assert width > 400
    assert height > 400  # four rows: images, decoded, semantic, noise
    bare = contact_sheet(data, tmp_path / "bare.png", count=4)
    assert Image.open(bare).size[1] < height


def test_colors_are_the_principal_components_between_black_and_white():
    ramp = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    latents = torch.cat([3 * ramp, ramp.flip(2), 0.1 * ramp.square(), torch.zeros_like(ramp)], dim=1)
    colors = as_colors(latents)
    assert colors.shape == (1, 3, 8, 8)
    assert {int(channel.min()) for channel in colors[0]} == {0}
    assert {int(channel.max()) for channel in colors[0]} == {255}
    latents[:, 2] = 0  # two components are left
    assert as_colors(latents)[0, 2].unique().tolist() == [128]
    assert all(channel.unique().numel() > 2 for channel in as_colors(latents)[0, :2])
    grey = as_colors(ramp)
    assert torch.equal(grey[0, 0], grey[0, 2])
    assert grey[0, 0, 0, 0] == 0


def test_the_share_is_that_of_torchrun_or_of_a_step_of_slurm(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert Share.from_environment() == Share(0, 1)
    # A batch script that calls the command without srun does all the work, whatever it has asked for.
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert Share.from_environment() == Share(0, 1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert Share.from_environment() == Share(3, 8)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Share.from_environment() == Share(1, 2)
    with pytest.raises(ValueError, match="there is no rank 2"):
        Share(2, 2)


# --- processes ------------------------------------------------------------------------------------------------------


def command(folder, out, *more):
    return [
        sys.executable, "-m", "lwd", "encode", "--data", str(folder), "--out", str(out), "--texture", "pixels:4",
        "--size", "16", "--shard", "2", "--batch", "2", "--workers", "1", "--device", "cpu", *more,
    ]  # fmt: skip


def test_processes_that_run_at_once_share_the_work(folder, tmp_path):
    more = ("--features", "efficientnet:10:64", "--semantic", "pca:3", "--pca-images", "5")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command(folder, tmp_path / "one", *more), check=True, env=environment, capture_output=True)
    processes = [
        subprocess.Popen(
            command(folder, tmp_path / "three", *more),
            env=environment | {"RANK": str(rank), "WORLD_SIZE": "3"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(3)
    ]
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert contents(tmp_path / "three") == contents(tmp_path / "one")
    assert (tmp_path / "three" / "manifest.json").exists()


def test_killed_at_any_moment_the_command_goes_on(folder, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command(folder, tmp_path / "whole"), check=True, env=environment, capture_output=True)
    out = tmp_path / "set"
    for wanted in (1, 3):
        process = subprocess.Popen(command(folder, out), env=environment, stdout=subprocess.DEVNULL)
        while len(list(out.glob("shard-*.safetensors"))) < wanted and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command(folder, out), check=True, env=environment, capture_output=True)
    assert contents(out) == contents(tmp_path / "whole")
    assert image_names(out / "shard-00005.safetensors") == ["dog/10.png"]
    assert (out / "manifest.json").read_bytes() == (tmp_path / "whole" / "manifest.json").read_bytes()


def test_a_damaged_image_with_a_name_that_is_not_utf8_is_listed(folder, tmp_path):
    with open(os.path.join(os.fsencode(folder), b"cat", b"caf\xe9.png"), "wb") as file:
        file.write(b"no image")
    config = EncodeConfig(size=16, shard_size=4, batch=3, workers=2, skip_corrupt=True)
    assert Encoding(FolderImages(folder), make_encoder(), config, tmp_path / "set").run()
    (row,) = [json.loads(line) for line in (tmp_path / "set" / "failed.jsonl").read_text().splitlines()]
    assert row["image"] == "cat/caf\udce9.png"
    assert len(LatentDataset.open(tmp_path / "set")) == 11
