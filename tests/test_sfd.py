"""Checkpoints of Semantic-First Diffusion and LightningDiT."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lwd import Group, LatentSpec, LightningDiT
from lwd.backbones.lightningdit import rotate
from networks import TWO, assert_close, reference_arguments


@pytest.fixture
def sfd_state(reference) -> dict[str, Tensor]:
    return dict(reference("sfd_semantic_first").under("state"))


def write_checkpoints(state, tmp_path):
    """Every container a checkpoint comes in; where there are two sets of weights, `model` is the wrong one."""
    wrong = {key: torch.zeros_like(value) for key, value in state.items()}
    training = {"model": wrong, "ema": state, "opt": {"state": {}}, "args": argparse.Namespace(seed=1), "step": 3}
    contents = {
        "plain": state,
        "ema": training,
        "model": {"model": state, "step": 1},
        "wrapped": {"ema": {f"module._orig_mod.{key}": value for key, value in state.items()}},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pt")
    torch.save(training, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "plain.safetensors")
    both = {f"model.{key}": value for key, value in wrong.items()} | {f"ema.{key}": v for key, v in state.items()}
    save_file(both, tmp_path / "both.safetensors")
    return sorted(tmp_path.iterdir())


def test_all_containers_give_the_same_network(semantic_first, sfd_state, tmp_path):
    model, _ = semantic_first
    files = write_checkpoints(sfd_state, tmp_path)
    assert len(files) == 7
    for source in (*files, {f"_orig_mod.module.{key}": value for key, value in sfd_state.items()}):
        found = LightningDiT.from_sfd(source)
        assert found.config == model.config
        for name, value in model.state_dict().items():
            assert torch.equal(found.state_dict()[name], value), (source, name)


def test_the_network_does_not_share_memory_with_the_state_dict(sfd_state):
    before = sfd_state["final_layer.linear.bias"].clone()
    LightningDiT.from_sfd(sfd_state).final_layer.linear.bias.data.add_(1)
    assert torch.equal(sfd_state["final_layer.linear.bias"], before)


def test_half_precision_checkpoints_are_read(semantic_first, sfd_state):
    model, values = semantic_first
    half = LightningDiT.from_sfd({key: value.bfloat16() for key, value in sfd_state.items()})
    assert half.x_embedder.weight.dtype == torch.float32
    assert_close(half(*reference_arguments(model, values)), values["velocity"], 0.02)


def test_overrides(reference, sfd_state):
    groups = (Group("texture", 6), Group("semantic", 6))
    assert LightningDiT.from_sfd(sfd_state, groups=groups, repa_depth=3, num_heads=4).config.repa_depth == 3
    assert LightningDiT.from_sfd(sfd_state, spec=LatentSpec(groups)).spec.groups == groups
    two = (Group("texture", 5), Group("semantic", 3))
    synchronous = LightningDiT.from_sfd(reference("lightningdit_synchronous").under("state"), groups=two)
    assert (synchronous.config.clocks, synchronous.spec.sizes) == (1, (5, 3))


def without(part: str):
    return lambda state: {key: value for key, value in state.items() if part not in key}


def changed(**shapes: tuple[int, ...]):
    return lambda state: state | {key.replace("__", "."): torch.zeros(shape) for key, shape in shapes.items()}


def test_checkpoint_without_qk_norm_is_supported(sfd_state):
    model = LightningDiT.from_sfd(without("_norm.")(sfd_state))
    assert (model.config.qk_norm, model.config.num_heads) == (False, 4)
    x = torch.randn(2, 64, 96, generator=torch.Generator().manual_seed(0))
    attention = model.blocks[0].attn
    q, k, v = (attention.qkv(x)[..., i * 96 : (i + 1) * 96].view(2, 64, 4, 24).transpose(1, 2) for i in range(3))
    scores = rotate(q, model.rotary_cos, model.rotary_sin) @ rotate(k, model.rotary_cos, model.rotary_sin).mT
    expected = attention.proj(((scores / 24**0.5).softmax(dim=-1) @ v).transpose(1, 2).reshape(2, 64, 96))
    assert_close(attention(x, model.rotary_cos, model.rotary_sin), expected)


@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        (without("x_embedder"), {}, r"x_embedder\.proj\.weight is missing; the keys begin with blocks\.0\.adaLN"),
        (
            without("t_embedder_sem.mlp.2"),
            {},
            r"missing: t_embedder_sem\.mlp\.2\.bias, t_embedder_sem\.mlp\.2\.weight$",
        ),
        (without("blocks.1.attn.proj.bias"), {}, r"missing: blocks\.1\.attn\.proj\.bias$"),
        (changed(blocks__0__extra=(2,)), {}, r"unknown: blocks\.0\.extra"),
        (changed(blocks__1__mlp__w3__bias=(5,)), {}, r"blocks\.1\.mlp\.w3\.bias has shape \(5,\), expected \(96,\)"),
        (without("freqs_cos"), {}, r"not supported.*rotary positions \(use_rope\): no feat_rope\.freqs_cos"),
        (without("norm1"), {}, r"not supported.*RMSNorm \(use_rmsnorm\): no blocks\.0\.norm1\.weight"),
        (without("w12"), {}, r"not supported.*SwiGLU \(use_swiglu\): no blocks\.0\.mlp\.w12\.weight"),
        (changed(blocks__0__adaLN_modulation__1__bias=(384,)), {}, r"not supported.*wo_shift"),
        (changed(final_layer__linear__bias=(24,)), {}, r"not supported.*learn_sigma"),
        (changed(t_embedder_tex__mlp__0__weight=(48, 128)), {}, r"not supported.*256 frequencies"),
        (changed(pos_embed=(1, 64, 96)), {}, r"pos_embed \(1, 64, 96\) is not the fixed table"),
        (dict, {"depth": 4}, r"depth=4 was asked for, but its tensors have depth=3"),
        (dict, {"clocks": 1}, r"clocks=1 was asked for, but its tensors have clocks=2"),
        (dict, {"num_head": 4}, r"no field 'num_head' \(did you mean 'num_heads'\?\)"),
        (dict, {"groups": TWO}, r"the groups \('texture', 'semantic'\) have 6 channels, its tensors 12"),
        (dict, {"groups": [Group("all", 12)]}, r"it has 2 clocks, but 1 groups were given: all"),
        (dict, {"spec": LatentSpec(TWO), "groups": TWO}, r"either spec or groups"),
        (dict, {"repa_depth": 7}, r"repa_depth 7 is not one of the 3 blocks"),
        (without("repa"), {"repa_depth": 1}, r"repa_depth=1 was asked for, but it has no REPA projector"),
    ],
)
def test_unusable_state_dicts(change, overrides, message, sfd_state):
    with pytest.raises(ValueError, match=message) as raised:
        LightningDiT.from_sfd(change(sfd_state), **overrides)
    assert str(raised.value).startswith("cannot read this state dict as an SFD or LightningDiT checkpoint: ")


def test_channels_that_do_not_divide_need_groups(sfd_state):
    for key in ("x_embedder.proj.weight", "final_layer.linear.weight", "final_layer.linear.bias"):
        value = sfd_state[key]
        sfd_state[key] = value[:, :11] if key.startswith("x_") else value[:11]
    with pytest.raises(ValueError, match=r"how 11 channels divide .*pass groups=\(Group\('texture'"):
        LightningDiT.from_sfd(sfd_state)
    assert LightningDiT.from_sfd(sfd_state, groups=[Group("a", 7), Group("b", 4)]).spec.sizes == (7, 4)


def test_damaged_checkpoint_files(sfd_state, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file .*absent\.pt"):
        LightningDiT.from_sfd(tmp_path / "absent.pt")
    for path in write_checkpoints(sfd_state, tmp_path):
        content = path.read_bytes()
        for length in (0, 100, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:length])
            with pytest.raises(ValueError, match=path.name):
                LightningDiT.from_sfd(path)
    torch.save({"ema": {"config": "x"}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt holds no weights.*found config"):
        LightningDiT.from_sfd(tmp_path / "other.pt")
    torch.save({"ema": sfd_state, "opt": SimpleNamespace(a=1)}, tmp_path / "objects.pt")
    with pytest.raises(ValueError, match=r"objects\.pt is damaged, or holds more than tensors.*weights_only=False"):
        LightningDiT.from_sfd(tmp_path / "objects.pt")
