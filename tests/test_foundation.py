"""Patch features of DINOv2 and CLIP, against transformers itself and against the authors' computation written out."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from lwd.encoders import foundation
from lwd.encoders.foundation import FoundationFeatures

transformers = pytest.importorskip("transformers")
constants = pytest.importorskip("transformers.utils.constants")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """Whatever a test gets wrong, it does not turn to the network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every weight random: those that begin at 0 or 1 would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def dinov2(seed: int = 0, layers: int = 2, width: int = 128, registers: bool = True) -> torch.nn.Module:
    """Tiny, but with the patches of 14 and the 37 x 37 position embeddings of the published ones."""
    kind = "Dinov2WithRegisters" if registers else "Dinov2"
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        mlp_ratio=2,
        patch_size=14,
        image_size=518,
    )
    return randomised(getattr(transformers, f"{kind}Model")(config), seed)


def clip(seed: int = 0, patch: int = 16) -> torch.nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        vision_config=sizes | {"patch_size": patch, "image_size": 224},
        text_config=sizes | {"vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 4},
    )
    return randomised(transformers.CLIPModel(config), seed)


def saved(model: torch.nn.Module, directory: Path, **options: str) -> Path:
    model.save_pretrained(directory, **options)
    return directory


def images(n: int = 2, size: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def prepared(pictures: torch.Tensor, colours: str, size: int = 224) -> torch.Tensor:
    mean, std = (torch.tensor(getattr(constants, f"{colours}_{name}"))[:, None, None] for name in ("MEAN", "STD"))
    return F.interpolate((pictures / 255 - mean) / std, (size, size), mode="bicubic", align_corners=False)


def patch_maps(tokens: torch.Tensor, before: int) -> torch.Tensor:
    side = round((tokens.shape[1] - before) ** 0.5)
    return tokens[:, before:].reshape(len(tokens), side, side, -1).permute(0, 3, 1, 2)


# --- what the features are ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("registers", [True, False])
def test_dinov2_gives_patch_tokens_after_the_final_norm(tmp_path, registers):
    model = dinov2(registers=registers)
    network = FoundationFeatures.load(saved(model, tmp_path))
    maps = network.feature_maps(images())
    with torch.no_grad():
        tokens = model(prepared(images(), "IMAGENET_DEFAULT"), output_hidden_states=True)
    expected = patch_maps(model.layernorm(tokens.hidden_states[-1]), 5 if registers else 1)
    torch.testing.assert_close(maps, expected, rtol=1e-5, atol=1e-6)
    assert maps.shape == (2, network.width, *network.grid) == (2, 128, 16, 16)
    assert maps.dtype == torch.float32
    assert not maps.requires_grad
    assert not maps.is_inference()


@pytest.mark.parametrize("whole", [True, False])
def test_clip_gives_patch_tokens_before_the_final_norm(tmp_path, whole):
    model = clip()
    network = FoundationFeatures.load(saved(model if whole else model.vision_model, tmp_path))
    maps = network.feature_maps(images())
    with torch.no_grad():
        out = model.vision_model(prepared(images(), "OPENAI_CLIP"), output_hidden_states=True)
    torch.testing.assert_close(maps, patch_maps(out.hidden_states[-1], 1), rtol=1e-5, atol=1e-6)
    assert maps.shape == (2, network.width, *network.grid) == (2, 32, 14, 14)
    assert network.describe()["network"] == "clip_vision_model"


def test_a_patch_changes_the_position_it_lies_at(tmp_path):
    """Without blocks nothing mixes positions."""
    network = FoundationFeatures.load(saved(dinov2(layers=0), tmp_path))
    before = images(1, 224)
    after = before.clone()
    after[:, :, 2 * 14 : 3 * 14, 5 * 14 : 6 * 14] = 255 - before[:, :, 2 * 14 : 3 * 14, 5 * 14 : 6 * 14]
    changed = (network.feature_maps(after) != network.feature_maps(before)).any(dim=1)[0]
    assert changed.nonzero().tolist() == [[2, 5]]


def test_maps_are_resized_to_the_grid_bilinearly(tmp_path):
    saved(clip(), tmp_path)
    own = FoundationFeatures.load(tmp_path).feature_maps(images())
    network = FoundationFeatures.load(tmp_path, grid=16)
    maps = network.feature_maps(images())
    assert network.grid == (16, 16)
    assert network.describe()["grid"] == [16, 16]
    # Position i of 16 is the point (i + 1/2) 14/16 - 1/2 between those of 14: 0 is cut off to 0, 1 is 0.8125.
    torch.testing.assert_close(maps[:, :, 0, 0], own[:, :, 0, 0])
    torch.testing.assert_close(maps[:, :, 0, 1], 0.1875 * own[:, :, 0, 0] + 0.8125 * own[:, :, 0, 1])
    torch.testing.assert_close(maps[:, :, 1, 0], 0.1875 * own[:, :, 0, 0] + 0.8125 * own[:, :, 1, 0])
    same = FoundationFeatures.load(tmp_path, grid=14).feature_maps(images())
    assert torch.equal(same, own)


def test_another_image_size_gives_another_grid(tmp_path):
    model, tower = dinov2(), clip().vision_model
    network = FoundationFeatures.load(saved(model, tmp_path / "dinov2"), image_size=84)
    with torch.no_grad():
        expected = patch_maps(model(prepared(images(), "IMAGENET_DEFAULT", 84)).last_hidden_state, 5)
    assert network.grid == (6, 6)
    torch.testing.assert_close(network.feature_maps(images()), expected, rtol=1e-5, atol=1e-6)
    network = FoundationFeatures.load(saved(tower, tmp_path / "clip"), image_size=128)
    with torch.no_grad():
        out = tower(prepared(images(), "OPENAI_CLIP", 128), interpolate_pos_encoding=True)
    assert network.describe()["image_size"] == 128
    torch.testing.assert_close(
        network.feature_maps(images()), patch_maps(out.last_hidden_state, 1), rtol=1e-5, atol=1e-6
    )


def test_features_do_not_depend_on_the_batch(tmp_path):
    network = FoundationFeatures.load(saved(dinov2(), tmp_path))
    whole = network.feature_maps(images(5))
    torch.testing.assert_close(network.feature_maps(images(5), batch=2), whole, rtol=1e-5, atol=1e-6)


def test_precision(tmp_path):
    saved(dinov2(), tmp_path)
    exact = FoundationFeatures.load(tmp_path).feature_maps(images())
    rounded = FoundationFeatures.load(tmp_path, precision="bf16").feature_maps(images())
    assert rounded.dtype == torch.float32
    error = (rounded - exact).norm() / exact.norm()
    assert 1e-4 < error < 2e-2  # bfloat16 has 8 bits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(FoundationFeatures.load(tmp_path).feature_maps(images()), exact)


# --- the file that DINOv2's authors publish ----------------------------------------------------------------------


def authors_names(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a `Dinov2WithRegistersModel` as the authors store them."""
    state, theirs = dict(model.state_dict()), {}
    for name in [name for name in state if ".q_proj." in name]:
        parts = [state.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        theirs[name.replace("attention.q_proj", "attn.qkv").replace("encoder.layer", "blocks")] = torch.cat(parts)
    for name, weight in state.items():
        for ours, replacement in (
            ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            ("embeddings.position_embeddings", "pos_embed"),
            ("embeddings.", ""),
            ("layernorm", "norm"),
            ("encoder.layer", "blocks"),
            ("attention.o_proj", "attn.proj"),
            ("layer_scale1.lambda1", "ls1.gamma"),
            ("layer_scale2.lambda1", "ls2.gamma"),
        ):
            name = name.replace(ours, replacement)
        theirs[name] = weight
    return theirs


def authors_patch_tokens(w: dict[str, torch.Tensor], x: torch.Tensor, heads: int) -> torch.Tensor:
    """x_norm_patchtokens by the authors' definition, from the weights in their names."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14)
    rows, columns = x.shape[2:]
    positions = w["pos_embed"][:, 1:]
    side = round(positions.shape[1] ** 0.5)
    positions = positions.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    # dinov2_vit*14_reg: interpolate_antialias=True, interpolate_offset=0.0
    positions = F.interpolate(positions, size=(rows, columns), mode="bicubic", antialias=True)
    x = (x + positions).flatten(2).transpose(1, 2)
    start = torch.cat([w["cls_token"] + w["pos_embed"][:, :1], w["register_tokens"]], dim=1)
    x = torch.cat([start.expand(len(x), -1, -1), x], dim=1)
    for i in range(sum(name.endswith("ls1.gamma") for name in w)):
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1) @ v
        x = x + w[f"blocks.{i}.ls1.gamma"] * linear(attention.transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + w[f"blocks.{i}.ls2.gamma"] * linear(hidden, f"blocks.{i}.mlp.fc2")
    return norm(x, "norm")[:, start.shape[1] :]


def test_the_authors_computation_and_ours_agree(tmp_path):
    """Also on position embeddings, which transformers resizes in its own way."""
    weights = authors_names(dinov2(1))
    torch.save(weights, tmp_path / "dinov2_vitx14_reg4_pretrain.pth")
    maps = FoundationFeatures.load(tmp_path / "dinov2_vitx14_reg4_pretrain.pth").feature_maps(images())
    tokens = authors_patch_tokens(weights, prepared(images(), "IMAGENET_DEFAULT"), heads=2)
    torch.testing.assert_close(maps, patch_maps(tokens, 0), rtol=1e-4, atol=1e-5)


def test_vit_small_in_both_forms(tmp_path):
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518
    )
    model = randomised(transformers.Dinov2WithRegistersModel(config))
    file = tmp_path / "dinov2_vits14_reg4_pretrain.pth"
    torch.save(authors_names(model), file)
    ours = FoundationFeatures.load(saved(model, tmp_path / "ours"))
    theirs = FoundationFeatures.load(str(file))
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "patch_size", "image_size")
    assert [getattr(theirs.model.config, name) for name in names] == [384, 12, 6, 4, 14, 518]
    assert theirs.model.config.num_register_tokens == 4
    assert torch.equal(theirs.feature_maps(images(1)), ours.feature_maps(images(1)))
    assert theirs.describe() == {
        "network": "dinov2_with_registers",
        "source": str(file),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "width": 384,
        "grid": [16, 16],
        "image_size": 224,
    }


def test_a_file_that_is_no_dinov2_with_registers(tmp_path):
    def load(weights: object) -> None:
        torch.save(weights, tmp_path / "x.pth")
        FoundationFeatures.load(tmp_path / "x.pth")

    weights = authors_names(dinov2())
    with pytest.raises(ValueError, match="without registers"):
        load({name: weight for name, weight in weights.items() if name != "register_tokens"})
    with pytest.raises(ValueError, match=r"missing: encoder.layer.1.norm2.bias"):
        load({name: weight for name, weight in weights.items() if name != "blocks.1.norm2.bias"})
    with pytest.raises(ValueError, match=r"not part of the network: head.weight"):
        load(weights | {"head.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"missing: blocks.0.mlp.fc1.weight, patch_embed.proj.weight, pos_embed, reg"):
        load({"a": torch.zeros(1)})
    with pytest.raises(ValueError, match="not a state dict"):
        load({"model": weights})
    load({name: weight for name, weight in weights.items() if name != "mask_token"})  # never used
    (tmp_path / "x.pth").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"x\.pth is damaged"):
        FoundationFeatures.load(tmp_path / "x.pth")


# --- weights on disk ---------------------------------------------------------------------------------------------


def test_the_hash_is_that_of_the_weights(tmp_path):
    first, second = (saved(dinov2(seed), tmp_path / str(seed)) for seed in (0, 1))
    hashes = [FoundationFeatures.load(directory).describe()["sha256"] for directory in (first, second)]
    assert hashes == [hashlib.sha256((d / "model.safetensors").read_bytes()).hexdigest() for d in (first, second)]
    assert hashes[0] != hashes[1]


def test_shards_and_older_formats_hold_the_same_network(tmp_path):
    model = dinov2()
    expected = FoundationFeatures.load(saved(model, tmp_path / "one")).feature_maps(images())
    shards = sorted(saved(model, tmp_path / "shards", max_shard_size="400KB").glob("*.safetensors"))
    assert len(shards) > 1
    network = FoundationFeatures.load(tmp_path / "shards")
    joined = "".join(hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards)
    assert network.describe()["sha256"] == hashlib.sha256(joined.encode()).hexdigest()
    assert torch.equal(network.feature_maps(images()), expected)

    weights = load_file(tmp_path / "one" / "model.safetensors")
    old = saved(model, tmp_path / "old")
    (old / "model.safetensors").unlink()
    torch.save(weights, old / "pytorch_model.bin")
    assert torch.equal(FoundationFeatures.load(old).feature_maps(images()), expected)

    half = saved(model, tmp_path / "half")
    save_file({name: weight.half() for name, weight in weights.items()}, half / "model.safetensors")
    maps = FoundationFeatures.load(half).feature_maps(images())
    assert 0 < (maps - expected).norm() / expected.norm() < 5e-3  # stored as float16, computed in float32


def test_weights_that_do_not_fit_are_refused(tmp_path):
    directory = saved(dinov2(), tmp_path)
    file = directory / "model.safetensors"
    weights = load_file(file)

    def load(changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, file)
        FoundationFeatures.load(directory)

    with pytest.raises(ValueError, match=r"Keys missing: encoder.layer.0.mlp.fc1.weight, layernorm.bias$"):
        load({k: v for k, v in weights.items() if k not in ("layernorm.bias", "encoder.layer.0.mlp.fc1.weight")})
    with pytest.raises(ValueError, match=r"Keys missing: layernorm.bias; not part of the network: classifier.bias$"):
        load({k: v for k, v in weights.items() if k != "layernorm.bias"} | {"classifier.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"shapes of its config.json: layernorm.bias \(3,\), not \(128,\)"):
        load(weights | {"layernorm.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"Keys missing: .* and \d+ more; not part"):
        load({"decoder.weight": torch.zeros(3)})
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        FoundationFeatures.load(directory)


def test_clip_without_its_vision_tower_is_refused(tmp_path):
    file = saved(clip(), tmp_path) / "model.safetensors"
    weights = load_file(file)
    kept = "vision_model.embeddings.position_ids"  # older files store these numbers
    save_file(weights | {kept: torch.arange(197)[None], "text_model.embeddings.position_ids": torch.arange(4)}, file)
    FoundationFeatures.load(tmp_path)
    save_file({k: v for k, v in weights.items() if not k.startswith("vision_model.encoder.layers.1")}, file)
    with pytest.raises(ValueError, match=r"Keys missing: encoder.layers.1.layer_norm1.bias"):
        FoundationFeatures.load(tmp_path)


def test_other_networks_and_empty_directories_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config.json; download config.json"):
        FoundationFeatures.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(
        ValueError, match="'bert'; supported are dinov2_with_registers, dinov2, clip, clip_vision_model"
    ):
        FoundationFeatures.load(tmp_path)
    saved(dinov2(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors or pytorch_model.bin; download"):
        FoundationFeatures.load(tmp_path)


# --- names -------------------------------------------------------------------------------------------------------


def test_names_that_lead_nowhere():
    with pytest.raises(
        FileNotFoundError, match=r"dinov2-g does not exist.*dinov2-s, dinov2-b, dinov2-l, clip-b, clip-l"
    ):
        FoundationFeatures.load("dinov2-g")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        FoundationFeatures.load(Path("no/such"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        FoundationFeatures.load("weights/dinov2_vitb14_reg4_pretrain.pth")


def test_without_a_connection_it_says_where_the_weights_are(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        FoundationFeatures.load("dinov2-b")
    for part in (
        "https://huggingface.co/facebook/dinov2-with-registers-base",
        "config.json and model.safetensors or pytorch_model.bin",
        "dinov2_vitb14_reg4_pretrain.pth",
        "give the directory",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("stored", ["model.safetensors", "pytorch_model.bin"])
def test_short_names_are_names_on_the_hub(monkeypatch, tmp_path, stored):
    model = dinov2()
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        """The repository holds `stored` alone."""
        asked.append(name)
        saved(model, tmp_path)
        if stored != "model.safetensors":
            weights = load_file(tmp_path / "model.safetensors")
            (tmp_path / "model.safetensors").unlink()
            if stored in allow_patterns:
                torch.save(weights, tmp_path / stored)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    network = FoundationFeatures.load("dinov2-l")
    assert asked == ["facebook/dinov2-with-registers-large"] * (1 if stored == "model.safetensors" else 2)
    assert network.describe()["source"] == "dinov2-l"
    assert set(foundation.ALIASES) == {"dinov2-s", "dinov2-b", "dinov2-l", "clip-b", "clip-l"}


# --- other errors ------------------------------------------------------------------------------------------------


def test_images_and_settings_that_cannot_be(tmp_path):
    network = FoundationFeatures.load(saved(dinov2(), tmp_path))
    for wrong in (
        images().float(),
        images()[0],
        images()[:, :1],
        images()[:, :, :200],
        images()[:0],
    ):
        with pytest.raises(ValueError, match=r"images must be uint8 \[N, 3, S, S\], not torch"):
            network.feature_maps(wrong)
    with pytest.raises(ValueError, match="image size of 225 is no multiple of the patch, 14"):
        FoundationFeatures.load(tmp_path, image_size=225)
    with pytest.raises(ValueError, match="image size of 0"):
        FoundationFeatures.load(tmp_path, image_size=0)
    with pytest.raises(ValueError, match="grid of 0"):
        FoundationFeatures.load(tmp_path, grid=0)
    with pytest.raises(ValueError, match="precision 'fp16' is unknown; there are float32, bf16"):
        FoundationFeatures.load(tmp_path, precision="fp16")


def test_without_transformers(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "lwd\[encoders\]"'):
        FoundationFeatures.load(tmp_path)
