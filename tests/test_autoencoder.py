"""The texture autoencoder: LDM checkpoints in diffusers' network, posterior samples, manifests."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lwd.encoders.autoencoder import ImageAutoencoder
from lwd.encoders.ldm_keys import ldm_config, to_diffusers
from lwd.files import sha256_of
from recipe_weights import load_fixture, recipe_weights

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def reference():
    tensors, shapes = load_fixture("sdvae_f16d32")
    return tensors, recipe_weights(shapes)


@pytest.fixture(scope="module")
def checkpoint(reference, tmp_path_factory):
    """As Lightning leaves it: under state_dict, with what else was trained or averaged beside."""
    path = tmp_path_factory.mktemp("ldm") / "ldm.ckpt"
    beside = ("loss.logvar", "foundation_model.model.norm.weight", "linear_proj.weight", "model_ema.decay")
    torch.save({"state_dict": reference[1] | {key: torch.zeros(1) for key in beside}, "epoch": 3}, path)
    return path


@pytest.fixture(scope="module")
def autoencoder(checkpoint):
    return ImageAutoencoder.load(checkpoint)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small autoencoder of diffusers, downsampling by 8, in its own directory."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    network = AutoencoderKL(**blocks, block_out_channels=[8] * 4, norm_num_groups=4, latent_channels=4)
    path = tmp_path_factory.mktemp("small")
    network.save_pretrained(path)
    return path


def make_images(count=3, size=32):
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_reference_checkpoint_gives_the_reference_moments(autoencoder, reference):
    tensors, _ = reference
    with torch.no_grad():
        parameters = autoencoder.network.encode(tensors["x"]).latent_dist.parameters
        decoded = autoencoder.network.decode(tensors["moments"].chunk(2, dim=1)[0]).sample
    for found, name in ((parameters, "moments"), (decoded, "decoded")):
        error = (found - tensors[name]).abs().max() / tensors[name].abs().max()
        assert error < 1e-5, name
    assert (autoencoder.channels, autoencoder.downsampling) == (32, 16)
    assert sum(p.numel() for p in autoencoder.parameters()) == 69_836_067


def test_sizes_are_read_off_the_weights(reference):
    config = ldm_config(reference[1])
    assert config["block_out_channels"] == [128, 128, 256, 256, 512]
    assert config["layers_per_block"] == 2
    assert config["down_block_types"] == ["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"]
    assert config["up_block_types"] == ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 4


def test_the_decoder_has_attention_where_its_own_weights_have_it(reference):
    from diffusers import AutoencoderKL

    state = {key: value for key, value in reference[1].items() if not (key.startswith("decoder.up") and "attn" in key)}
    config = ldm_config(state)
    assert config["down_block_types"][-1] == "AttnDownEncoderBlock2D"
    assert config["up_block_types"] == ["UpDecoderBlock2D"] * 5
    with torch.device("meta"):
        expected = AutoencoderKL(**config).state_dict()
    found = to_diffusers(state)
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in expected.items()}


def test_sizes_that_cannot_be_expressed_are_refused(reference):
    state = reference[1] | {"post_quant_conv.weight": torch.zeros(32, 16, 1, 1)}
    with pytest.raises(ValueError, match="embed_dim 16 is not z_channels 32"):
        ldm_config(state)
    encoder = {key: value for key, value in reference[1].items() if not key.startswith("decoder.up")}
    with pytest.raises(ValueError, match=r"it has no decoder\.up\.0\.block\.0\.conv1\.weight"):
        ldm_config(encoder)


def test_every_tensor_finds_one_place(reference, autoencoder):
    converted = to_diffusers(reference[1])
    assert len(converted) == len(reference[1])
    assert converted.keys() == autoencoder.network.state_dict().keys()


def test_weights_of_another_architecture_are_told_by_their_keys(reference, tmp_path):
    state = {key: value for key, value in reference[1].items() if "down.4.attn.1" not in key}
    state["encoder.extra.weight"] = torch.zeros(1)
    state["decoder.conv_out.bias"] = torch.zeros(5)
    save_file(state, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="another architecture") as error:
        ImageAutoencoder.load(tmp_path / "broken.safetensors")
    message = str(error.value)
    assert "10 missing: encoder.down_blocks.4.attentions.1" in message
    assert "1 unexpected: encoder.extra.weight" in message
    assert "decoder.conv_out.bias [5] instead of [3]" in message
    torch.save({"model": {"weight": torch.zeros(2)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no autoencoder in LDM's names"):
        ImageAutoencoder.load(tmp_path / "other.pt")
    (tmp_path / "half.ckpt").write_bytes(b"PK\x03\x04 half")
    with pytest.raises(ValueError, match=r"half\.ckpt cannot be read"):
        ImageAutoencoder.load(tmp_path / "half.ckpt")


def test_a_pickle_of_more_than_tensors_is_not_executed(tmp_path):
    import pathlib

    torch.save({"state_dict": {}, "callbacks": pathlib.PurePosixPath("x")}, tmp_path / "lightning.ckpt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        ImageAutoencoder.load(tmp_path / "lightning.ckpt")


@pytest.mark.parametrize("text", ["<!DOCTYPE html>", "version https://git-lfs.github.com/spec/v1\n"])
def test_what_is_no_checkpoint_is_not_said_to_need_trust(tmp_path, text):
    (tmp_path / "page.ckpt").write_text(text)
    with pytest.raises(ValueError, match="is no checkpoint: it begins with") as error:
        ImageAutoencoder.load(tmp_path / "page.ckpt")
    assert "weights_only" not in str(error.value)


def test_the_hash_is_of_the_file_that_was_loaded(small, tmp_path):
    weights = "diffusion_pytorch_model.safetensors"
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    other = {key: value.half() + 1 for key, value in load_file(small / weights).items()}
    save_file(other, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    before, after = ImageAutoencoder.load(small), ImageAutoencoder.load(tmp_path)
    assert after.sha256 == before.sha256 == sha256_of(small / weights)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_the_names_that_diffusers_used_before_are_read(small, tmp_path):
    """Published autoencoders, sd-vae-ft-ema among them, have their attention under these."""
    shutil.copytree(small, tmp_path, dirs_exist_ok=True)
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, value in load_file(small / "diffusion_pytorch_model.safetensors").items():
        for now, then in former.items():
            key = key.replace(f".{now}.", f".{then}.")
        state[key] = value
    assert sum(".query." in key for key in state) == 4
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    before, after = ImageAutoencoder.load(small), ImageAutoencoder.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_directories_that_do_not_fit_are_refused(small, tmp_path):
    def altered(name, **changes):
        shutil.copytree(small, tmp_path / name)
        config = json.loads((small / "config.json").read_text()) | changes
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        return tmp_path / name

    with pytest.raises(ValueError, match=r"of another shape: .*conv_in\.bias \[8\] instead of \[16\]") as error:
        ImageAutoencoder.load(altered("wide", block_out_channels=[8, 8, 8, 16]))
    assert str(error.value).count("instead of") == 8
    with pytest.raises(ValueError, match="holds the AutoencoderTiny of diffusers, not its AutoencoderKL"):
        ImageAutoencoder.load(altered("tiny", _class_name="AutoencoderTiny"))
    weights = altered("short") / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model\.safetensors cannot be read"):
        ImageAutoencoder.load(tmp_path / "short")


def test_of_a_pipeline_on_the_hub_only_the_autoencoder_is_fetched(small, tmp_path, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    weights, fetched = "diffusion_pytorch_model.safetensors", []
    shutil.copytree(small, tmp_path / "vae")
    held = ["model_index.json", "v1-5-pruned.safetensors", "unet/config.json", f"unet/{weights}"]
    held += ["vae/config.json", f"vae/{weights}", "vae/diffusion_pytorch_model.fp16.safetensors"]

    def snapshot_download(name, allow_patterns):
        assert name == "someone/pipeline"
        fetched.extend(filter_repo_objects(held, allow_patterns=allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    description = ImageAutoencoder.load("someone/pipeline").describe()
    assert fetched == ["vae/config.json", f"vae/{weights}"]
    expected = {"encoder": "autoencoder", "source": "someone/pipeline", "sha256": sha256_of(small / weights)}
    assert description == expected | {"channels": 4, "downsampling": 8, "posterior": "sample"}

    def unreachable(name, allow_patterns):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(FileNotFoundError, match=r"cannot be fetched from the Hugging Face hub \(no network\)"):
        ImageAutoencoder.load("stabilityai/sd-vae-ft-ema")


def test_precision_is_of_the_network_alone(small):
    images = make_images()
    exact, coarse = (ImageAutoencoder.load(small, precision=p) for p in (torch.float32, torch.bfloat16))
    assert {p.dtype for p in coarse.parameters()} == {torch.bfloat16}
    found, expected = coarse.encode(images, [1, 2, 3]), exact.encode(images, [1, 2, 3])
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()
    assert coarse.decode(found).dtype == torch.uint8


def test_a_sample_depends_on_its_seed_alone(small):
    autoencoder, images = ImageAutoencoder.load(small), make_images()
    mean, log_variance = autoencoder.moments(images)
    together = autoencoder.encode(images, [5, 6, 7])
    apart = torch.cat([autoencoder.encode(images[i : i + 1], [5 + i]) for i in range(3)])
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)
    noise = torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(together[1], mean[1] + log_variance[1].mul(0.5).exp() * noise)
    assert not torch.equal(together[0] - mean[0], together[1] - mean[1])
    assert torch.equal(autoencoder.encode(images, np.array([5, 6, 7])), together)
    mean_only = ImageAutoencoder.load(small, posterior="mean")
    assert torch.equal(mean_only.encode(images), mean)
    with pytest.raises(ValueError, match="posterior samples of 3 images need as many seeds"):
        autoencoder.encode(images)


def test_images_are_scaled_and_decoded_as_the_reference_does(small):
    autoencoder = ImageAutoencoder.load(small)
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 16, 16)
    with torch.no_grad():
        direct = autoencoder.network.encode(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 16, 16)).latent_dist
        torch.testing.assert_close(autoencoder.moments(images)[0], direct.mean)
        latents = 30 * torch.randn(5, 4, 2, 2, generator=torch.Generator().manual_seed(1))
        pixels = autoencoder.network.decode(latents).sample
    expected = (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8)
    assert (autoencoder.decode(latents).int() - expected.int()).abs().max() <= 1
    assert (autoencoder.decode(latents, batch=2).int() - autoencoder.decode(latents).int()).abs().max() <= 1


def test_description_finds_the_same_weights_again(small, tmp_path):
    autoencoder = ImageAutoencoder.load(small, posterior="mean")
    description = autoencoder.describe()
    again = ImageAutoencoder.from_description(description)
    assert again.describe() == description
    images = make_images()
    assert torch.equal(again.encode(images), autoencoder.encode(images))
    with pytest.raises(ValueError, match=r"has sha256 .*, but the latents were made with 000000000000"):
        ImageAutoencoder.from_description(description | {"sha256": "0" * 64})
    # As part of a pipeline of diffusers, and after conversion.
    assert autoencoder.save_pretrained(tmp_path / "vae") == tmp_path / "vae"
    assert "_name_or_path" not in json.loads((tmp_path / "vae" / "config.json").read_text())
    assert torch.equal(ImageAutoencoder.load(tmp_path, posterior="mean").encode(images), autoencoder.encode(images))


def test_a_converted_checkpoint_is_the_same_network(autoencoder, tmp_path):
    autoencoder.save_pretrained(tmp_path)
    again = ImageAutoencoder.load(tmp_path)
    for name, value in autoencoder.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_bad_input(small, tmp_path):
    autoencoder = ImageAutoencoder.load(small)
    with pytest.raises(ValueError, match=r"uint8 \[N, 3, H, W\], not torch.float32"):
        autoencoder.moments(make_images().float())
    with pytest.raises(ValueError, match=r"\[36, 36\] pixels cannot be downsampled by 8"):
        autoencoder.moments(make_images(1, 36))
    with pytest.raises(ValueError, match=r"latents must be \[N, 4, h, w\]"):
        autoencoder.decode(torch.zeros(1, 5, 2, 2))
    with pytest.raises(ValueError, match="batch must be 1 or more, not 0"):
        autoencoder.decode(torch.zeros(1, 4, 2, 2), batch=0)
    with pytest.raises(ValueError, match="posterior must be one of sample, mean, not 'mode'"):
        ImageAutoencoder.load(small, posterior="mode")
    with pytest.raises(FileNotFoundError, match="no checkpoint and no directory /nowhere"):
        ImageAutoencoder.load("/nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no autoencoder of diffusers"):
        ImageAutoencoder.load(tmp_path)
