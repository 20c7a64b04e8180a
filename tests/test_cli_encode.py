"""`lwd encode` and `lwd semvae` from end to end on small images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lwd import cli
from lwd.data import LatentDataset
from lwd.encoders import SemVAE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for number in range(24):
        path = root / "all" / "abc"[number % 3] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return root / "all"


OPTIONS = [
    "--size", "32", "--shard", "10", "--batch", "8", "--workers", "2", "--device", "cpu",
    "--texture", "pixels:8", "--features", "efficientnet:10:64",
]  # fmt: skip


@pytest.fixture(scope="module")
def encoded(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("latents") / "train"
    cli.main(["encode", "--data", str(folder), "--out", str(out), "--semantic", "pca:5", "--repa", "int8", *OPTIONS])
    return out


def test_encode_then_check(encoded, capsys):
    data = LatentDataset.open(encoded)
    assert len(data) == 24
    assert data.spec.sizes == (192, 5)
    assert data.spec.groups[1].weight == 192 / 5
    assert (encoded / "encoders" / "pca.safetensors").exists()
    cli.main(["encode", "--out", str(encoded), "--check"])
    printed = capsys.readouterr().out
    assert "24 images in 3 shards" in printed
    assert "semantic     5 x 4 x 4 float32, weight 38.4: pca of efficientnet-lite0" in printed
    assert "features  112 x 4 x 4 int8, for REPA" in printed
    assert printed.rstrip().endswith("is whole.")
    assert Image.open(encoded / "contact_sheet.png").size[0] > 500


def test_a_dry_run_says_what_it_takes_and_writes_nothing(folder, tmp_path, capsys):
    cli.main(["encode", "--data", str(folder), "--out", str(tmp_path / "x"), "--dry-run", *OPTIONS])
    printed = capsys.readouterr().out
    # Two views of 192 channels on 16 positions in float32, and a label.
    assert f"24 images, 3 classes, 3 shards: {(2 * 192 * 16 * 4 + 8) / 1e3:.1f} kB an image" in printed
    assert "24 still to encode" in printed
    assert not list((tmp_path / "x").glob("*.safetensors"))


def test_like_encodes_other_images_the_same_way(folder, encoded, tmp_path):
    cli.main(["encode", "--data", str(folder), "--out", str(tmp_path / "held"), "--like", str(encoded), "--batch", "5"])
    one, other = LatentDataset.open(encoded), LatentDataset.open(tmp_path / "held")
    assert other.normalization == one.normalization
    torch.testing.assert_close(other.to_memory().latents, one.to_memory().latents, rtol=1e-4, atol=1e-4)
    assert other.manifest["provenance"]["statistics"] == "given"


def test_a_group_from_ones_own_module(folder, encoded, tmp_path, monkeypatch, capsys):
    import shutil

    shutil.copytree(encoded, tmp_path / "three")
    (tmp_path / "my_brightness.py").write_text(
        "from torch.nn import functional as F\n\n\n"
        "def brightness(images):\n    return F.avg_pool2d(images.float().mean(dim=1, keepdim=True), 8)\n"
    )
    monkeypatch.chdir(tmp_path)
    common = ["encode", "--out", str(tmp_path / "three"), "--data", str(folder)]
    cli.main([*common, "--add", "light=my_brightness:brightness", "--weight", "3"])
    assert "has the group light" in capsys.readouterr().out
    data = LatentDataset.open(tmp_path / "three")
    assert data.spec.names == ("texture", "semantic", "light")
    assert data.spec.groups[2].weight == 3
    latents = data.to_memory().latents
    # The mean of a patch's pixels, which the texture group holds in its own units.
    torch.testing.assert_close(latents[:, 197], (latents[:, :192].mean(dim=1) + 1) * 127.5, rtol=1e-4, atol=1e-3)
    for text, message in (("light", "not of the form"), ("x=my_brightness:nothing", "has no function 'nothing'")):
        with pytest.raises(SystemExit):
            cli.main([*common, "--add", text])
        assert message in capsys.readouterr().err


def test_shards_without_a_manifest_are_adopted(encoded, tmp_path, capsys):
    for shard in encoded.glob("shard-*.safetensors"):
        (tmp_path / shard.name).write_bytes(shard.read_bytes())
    cli.main(["encode", "--out", str(tmp_path), "--adopt"])
    adopted, original = LatentDataset.open(tmp_path), LatentDataset.open(encoded)
    assert adopted.normalization.mean == pytest.approx(original.normalization.mean, rel=1e-6, abs=1e-9)
    adopted.check()


def test_a_semvae_is_trained_on_stored_features_and_encodes(folder, encoded, tmp_path):
    run = tmp_path / "semvae"
    cli.main(
        ["semvae", "--latents", str(encoded), "--out", str(run), "--channels", "4", "--steps", "3", "--batch", "4",
         "--heldout", "4", "--device", "cpu"]
    )  # fmt: skip
    assert SemVAE.load(run / "model").config.features == 112
    assert json.loads((run / "config.json").read_text())["settings"]["images"] == 20
    out = tmp_path / "latents"
    cli.main(["encode", "--data", str(folder), "--out", str(out), "--semantic", f"semvae:{run / 'model'}", *OPTIONS])
    data = LatentDataset.open(out)
    assert data.spec.sizes == (192, 4)
    assert data.encoders["semantic"]["encoder"] == "semvae"
    assert data.encoders["semantic"]["network"]["network"] == "efficientnet-lite0"
    # Streamed features train the same way.
    cli.main(
        ["semvae", "--data", str(folder), "--features", "efficientnet:10:64", "--size", "32", "--channels", "4",
         "--out", str(tmp_path / "streamed"), "--steps", "2", "--batch", "4", "--heldout", "4", "--device", "cpu"]
    )  # fmt: skip
    assert (tmp_path / "streamed" / "model" / "config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "FOLDER"], "say how to encode"),
        (["--data", "FOLDER", "--semantic", "pca:3"], "--semantic needs --features"),
        (["--data", "FOLDER", "--texture", "pixels:8", "--repa", "int8"], "--repa needs --features"),
        (["--data", "FOLDER", "--texture", "pixels:x"], "'pixels:x' is not of the form pixels:PATCH"),
        (["--data", "FOLDER", "--features", "efficientnet:1:2", "--semantic", "ica:3"], "unknown projection 'ica:3'"),
        (["--data", "/nowhere", "--texture", "pixels:8"], "/nowhere"),
        (["--check"], "no finished latent set"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(folder, tmp_path, capsys, arguments, message):
    filled = [str(folder) if argument == "FOLDER" else argument for argument in arguments]
    with pytest.raises(SystemExit) as stop:
        cli.main(["encode", "--out", str(tmp_path / "out"), *filled])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_pca_is_not_taken_for_one_of_other_features(folder, tmp_path, capsys):
    out = tmp_path / "set"
    common = ["encode", "--data", str(folder), "--out", str(out), "--semantic", "pca:4", *OPTIONS]
    cli.main([*common, "--dry-run"])
    assert not (out / "encoders").exists()
    cli.main(common)
    fitted = (out / "encoders" / "pca.safetensors").read_bytes()
    cli.main(common)  # the same command goes on
    with pytest.raises(SystemExit):
        cli.main([*common, "--features", "untrained:10:64"])
    error = capsys.readouterr().err
    assert "pca.safetensors was fitted to something else" in error
    assert "network.seed: 'absent' there, 0 now" in error
    with pytest.raises(SystemExit):
        cli.main([*common, "--pca-images", "20"])
    assert "count: 24 there, 20 now" in capsys.readouterr().err
    assert (out / "encoders" / "pca.safetensors").read_bytes() == fitted


def test_a_pca_from_elsewhere_is_kept_for_sets_to_come(folder, encoded, tmp_path, capsys):
    file = encoded / "encoders" / "pca.safetensors"
    out = tmp_path / "other"
    cli.main(["encode", "--data", str(folder), "--out", str(out), "--semantic", f"pca:{file}", *OPTIONS])
    cli.main(["encode", "--data", str(folder), "--out", str(tmp_path / "held"), "--like", str(out)])
    held = LatentDataset.open(tmp_path / "held")
    assert held.encoders["semantic"] == LatentDataset.open(encoded).encoders["semantic"]


def test_like_refuses_options_that_would_have_no_say(folder, encoded, tmp_path, capsys):
    common = ["encode", "--data", str(folder), "--out", str(tmp_path / "held"), "--like", str(encoded)]
    with pytest.raises(SystemExit):
        cli.main([*common, "--size", "64", "--no-flips"])
    assert "leave out --size, --flips" in capsys.readouterr().err
    cli.main(["encode", "--out", str(tmp_path / "embedded")])
    with pytest.raises(SystemExit):
        cli.main(
            ["encode", "--data", str(folder), "--out", str(tmp_path / "x"), "--like", str(tmp_path / "embedded/train")]
        )
    assert "does not say how its images were read" in capsys.readouterr().err


def test_held_out_latents_of_a_set_with_an_added_group(folder, encoded, tmp_path, monkeypatch, capsys):
    import shutil

    shutil.copytree(encoded, tmp_path / "train")
    (tmp_path / "my_light.py").write_text(
        "from torch.nn import functional as F\n\n\n"
        "def light(images):\n    return F.avg_pool2d(images.float().mean(dim=1, keepdim=True), 8)\n"
    )
    monkeypatch.chdir(tmp_path)
    cli.main(["encode", "--data", str(folder), "--out", "train", "--add", "light=my_light:light", "--weight", "3"])
    cli.main(["encode", "--data", str(folder), "--out", "held", "--like", "train"])
    printed = capsys.readouterr().out
    advice = "lwd encode --out held --add light=my_light:light --like train"
    assert f"Left out: light. Add it with {advice}" in printed
    cli.main([*advice.split()[1:], "--data", str(folder)])
    train, held = LatentDataset.open("train"), LatentDataset.open("held")
    assert held.spec == train.spec
    assert held.normalization == train.normalization
    torch.testing.assert_close(held.to_memory().latents, train.to_memory().latents, rtol=1e-4, atol=1e-4)


def test_what_is_wrong_with_a_set_is_said_even_where_no_sheet_can_be_drawn(encoded, tmp_path, monkeypatch, capsys):
    import shutil

    from lwd.data import check

    out = tmp_path / "set"
    shutil.copytree(encoded, out)
    shard = next(iter(sorted(out.glob("shard-*.safetensors"))))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))

    def fail(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(check, "contact_sheet", fail)
    with pytest.raises(SystemExit):
        cli.main(["encode", "--out", str(out), "--check"])
    printed = capsys.readouterr()
    assert "There is no contact sheet: read-only" in printed.out
    assert f"{shard.name} fails its checksum" in printed.err
