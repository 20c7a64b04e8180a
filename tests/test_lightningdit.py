"""LightningDiT against the reference's values, its closed forms and its error messages."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from lwd import IMAGENET_SPEC, Group, LightningDiT, LightningDiTConfig, lightningdit_config
from lwd.backbones import SIZES
from lwd.backbones.lightningdit import rotary_tables, rotate, sincos_positions
from networks import SMALL, TWO, assert_close, inputs, random_model, reference_arguments

# What the reference computes


@pytest.mark.parametrize("name", ["semantic_first", "one_clock"])
def test_velocity_of_the_reference(name, request):
    model, values = request.getfixturevalue(name)
    assert_close(model(*reference_arguments(model, values)), values["velocity"])


def test_sizes_of_the_reference_are_read_from_its_tensors(semantic_first, one_clock):
    assert semantic_first[0].config == LightningDiTConfig(
        groups=(Group("texture", 8, 1.0), Group("semantic", 4, 2.0)),
        input_size=8,
        num_classes=10,
        hidden_size=96,
        depth=3,
        num_heads=4,
        repa_depth=2,
        repa_dim=384,
        repa_projector_dim=64,
    )
    assert one_clock[0].config == LightningDiTConfig(
        (Group("texture", 8),), input_size=8, num_classes=10, hidden_size=64, depth=2, num_heads=4
    )


def test_the_weak_model_explains_the_guided_velocity(semantic_first):
    model, values = semantic_first
    weak = LightningDiT.from_sfd(values.under("weak"))
    assert (weak.config.depth, weak.config.repa_depth) == (1, 1)
    arguments = reference_arguments(model, values)
    without_projector = LightningDiT.from_sfd(values.under("weak"), repa_depth=None)
    assert without_projector.repa_projector is None
    for network in (weak, without_projector):
        slow = network(*arguments)
        assert_close(slow + 1.5 * (values["velocity"] - slow), values["autoguidance_1.5"])


@pytest.mark.parametrize("name", ["sfd_semantic_first", "lightningdit_synchronous"])
def test_losses_and_gradients_of_the_reference(name, reference):
    """SFD's loss: squared error with weight 2 on semantic channels, one mean; cosine over channels; REPA."""
    values = reference(name)
    model = LightningDiT.from_sfd(values.under("state"))
    two_clocks = len(model.spec) == 2
    tau, x0, x1 = values["tau"], values["x0"], values["x1"]
    t = torch.stack([(1.3 * tau - 0.3).clamp(min=0), (1.3 * tau).clamp(max=1)], dim=1) if two_clocks else tau[:, None]
    per_channel = t.repeat_interleave(torch.tensor(model.spec.sizes), dim=1)[:, :, None, None]
    weights = torch.tensor([g.weight for g in model.spec.groups]).repeat_interleave(torch.tensor(model.spec.sizes))
    u = x1 - x0
    arguments = ((1 - per_channel) * x0 + per_channel * x1, t, values["y"])

    if two_clocks:
        velocity, tokens = model(*arguments, return_projection=True)
        features = values["repa_features"].flatten(2).transpose(1, 2)
        repa = 1 - F.cosine_similarity(tokens, features, dim=-1).mean(dim=1)
        torch.testing.assert_close(repa, values["train.repa_loss"], rtol=1e-5, atol=0)
    else:
        velocity, repa = model(*arguments), torch.zeros(())
    squared = (weights[:, None, None] * (velocity - u) ** 2).mean(dim=(1, 2, 3))
    cosine = 1 - F.cosine_similarity(velocity, u, dim=1).mean(dim=(1, 2))
    torch.testing.assert_close(squared, values["train.loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(cosine, values["train.cos_loss"], rtol=1e-5, atol=0)

    total = squared.mean() + cosine.mean() + repa.mean()
    torch.testing.assert_close(total, values["train.total"][0], rtol=1e-5, atol=0)
    total.backward()
    clocks = {"t_embedder.": "t_embedders.0.", "t_embedder_tex.": "t_embedders.0.", "t_embedder_sem.": "t_embedders.1."}
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert len(values.under("grad")) > 4
    for theirs, gradient in values.under("grad").items():
        key = theirs.replace(".proj.weight", ".weight") if theirs.startswith("x_embedder") else theirs
        for prefix, ours in clocks.items():
            key = key.replace(prefix, ours)
        assert_close(gradients[key], gradient)


# Sizes


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("demo", 5_247_616),
        ("S", 32_827_056),
        ("B", 130_090_800),
        ("L", 457_402_384),
        ("XL", 674_339_184),
        ("1.0B", 1_027_880_496),
    ],
)
def test_parameter_counts_at_48_channels(size, parameters):
    with torch.device("meta"):
        model = LightningDiT(lightningdit_config(size, IMAGENET_SPEC, input_size=16, num_classes=1000))
    assert sum(p.numel() for p in model.parameters()) == parameters
    width, depth, classes = model.config.hidden_size, model.config.depth, 1001
    swiglu = 3 * width * model.config.mlp_hidden + 2 * model.config.mlp_hidden + width
    attention = 4 * width**2 + 4 * width + 2 * width // model.config.num_heads
    block = swiglu + attention + 6 * width**2 + 6 * width + 2 * width
    clocks = 2 * (256 * width // 2 + (width // 2) ** 2 + width)
    final = 48 * width + 48 + 2 * width**2 + 2 * width + width
    assert parameters == depth * block + clocks + final + classes * width + 48 * width + width


def test_published_sizes_of_xl():
    """The paper's 674.6M and, with the projector, 682.8M count the 256 fixed positions too."""
    for repa_depth, millions in ((None, 674.6), (2, 682.8)):
        with torch.device("meta"):
            model = LightningDiT(lightningdit_config("XL", IMAGENET_SPEC, 16, 1000, repa_depth=repa_depth))
        count = sum(p.numel() for p in model.parameters()) + model.positions.numel()
        assert round(count / 1e6, 1) == millions


def test_operations_of_xl_counted_without_computing():
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        config = lightningdit_config("XL", IMAGENET_SPEC, 16, 1000)
        LightningDiT(config)(torch.zeros(1, 48, 16, 16), torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
    assert round(counter.get_total_flops() / 1e9) == 237


def test_config_is_restored_from_json():
    config = lightningdit_config("S", TWO, 4, 3, clocks=1, repa_depth=2, mlp_ratio=3.5, qk_norm=False, patch_size=2)
    assert config.hidden_size == SIZES["S"]["hidden_size"]
    assert LightningDiTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# Closed forms of the parts


def test_positions():
    """Token (row 1, column 2) of a 3x3 grid, width 8: column first, sin before cos, frequencies 1 and 1/100."""
    found = sincos_positions(3, 8)[0, 1 * 3 + 2]
    angles = [2, 0.02], [1, 0.01]
    expected = [f(a) for axis in angles for f in (math.sin, math.cos) for a in axis]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_rotation_makes_scores_depend_on_relative_positions_alone():
    side, width = 5, 8
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, width, generator=generator).expand(2, 1, 1, side * side, width)
    cos, sin = rotary_tables(side, width)
    scores = (rotate(q, cos, sin) @ rotate(k, cos, sin).mT).view(side, side, side, side)
    torch.testing.assert_close(scores[1:, 2:, 1:, 2:], scores[:-1, :-2, :-1, :-2])
    # Row distance 1, column distance 0: only the first half turns, by 1 and by 1/100 radian.
    complex_q, complex_k = (torch.view_as_complex(x[0, 0, 0].view(-1, 2).contiguous()) for x in (q, k))
    turns = torch.polar(torch.ones(4), torch.tensor([1, 0.01, 0, 0]))
    torch.testing.assert_close(scores[1, 0, 0, 0], (complex_q * turns * complex_k.conj()).real.sum())


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_condition_of_three_clocks(precision):
    """[embed(t_2), embed(t_1), embed(t_0)]: the last group first, with the remaining width; in float32 always."""
    groups = tuple(Group(name, 2) for name in ("texture", "depth", "semantic"))
    model = random_model(replace(SMALL, groups=groups, clocks=3))
    assert model.config.clock_widths == (5, 5, 6)
    t = torch.tensor([[0.1, 0.5, 0.9], [0.0, 0.3, 1.0]])
    frequencies = 10_000 ** (-torch.arange(128) / 128)
    expected = []
    for group in (2, 1, 0):
        angles = t[:, group, None] * frequencies
        first, _, second = model.t_embedders[group].mlp
        hidden = torch.cat([angles.cos(), angles.sin()], dim=1) @ first.weight.T + first.bias
        expected.append(hidden * hidden.sigmoid() @ second.weight.T + second.bias)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        assert_close(model._time_condition(t), torch.cat(expected, dim=1), 1e-6)


def test_one_clock_for_two_groups_reads_the_last_time():
    model = random_model(replace(SMALL, clocks=1))
    z, t, labels = inputs(SMALL)
    velocity = model(z, t, labels)
    assert torch.equal(model(z, t.clone().index_fill_(1, torch.tensor(0), 0.123), labels), velocity)
    assert not torch.equal(model(z, t.clone().index_fill_(1, torch.tensor(1), 0.123), labels), velocity)


def test_patches_and_initialisation():
    """At the start every gate and shift is 0, so that tokens pass the blocks unchanged; patches of 2x2."""
    torch.manual_seed(0)
    model = LightningDiT(replace(SMALL, patch_size=2, repa_depth=1))
    z, t, labels = inputs(SMALL)
    assert model(z, t, labels).count_nonzero() == 0
    head = model.final_layer.linear
    torch.nn.init.normal_(head.weight)
    torch.nn.init.normal_(head.bias)
    patches = z.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(3, 4, -1)  # (channel, row, column)
    tokens = patches @ model.x_embedder.weight.flatten(1).T + sincos_positions(2, 16)
    out = F.normalize(tokens, dim=-1) * 16**0.5 @ head.weight.T + head.bias  # (row, column, channel)
    expected = torch.zeros_like(z)
    for token, (row, column) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        expected[:, :, row : row + 2, column : column + 2] = out[:, token].view(3, 2, 2, 6).permute(0, 3, 1, 2)
    velocity, projection = model(z, t, labels, return_projection=True)
    assert_close(velocity, expected)
    assert_close(projection, model.repa_projector(tokens))

    limit = (6 / (16 + 48)) ** 0.5  # Xavier
    assert 0.98 * limit < model.blocks[0].attn.qkv.weight.abs().max() <= limit
    assert model.y_embedder.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert model.t_embedders[0].mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_null_label_is_the_last_embedding():
    model = random_model(SMALL)
    z, t, _ = inputs(SMALL)
    expected = model(z, t, torch.zeros(3, dtype=torch.int64))
    model.y_embedder.weight.data[model.null_label] = model.y_embedder.weight.data[0]
    assert torch.equal(model(z, t, torch.full((3,), model.null_label)), expected)


# Precision and compilation


def test_bf16_is_close_to_float32():
    config = replace(SMALL, hidden_size=64, repa_depth=1, repa_dim=8, repa_projector_dim=32)
    model, arguments = random_model(config), inputs(SMALL)
    velocity, projection = model(*arguments, return_projection=True)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(*arguments, return_projection=True)
    for found, expected in zip(mixed, (velocity, projection), strict=True):
        assert found.dtype == torch.float32
        assert_close(found, expected, 0.02)
    whole = model.to(torch.bfloat16)(*arguments)
    assert whole.dtype == torch.float32
    assert_close(whole, velocity, 0.04)


def test_compiles_as_one_graph():
    config = replace(SMALL, repa_depth=1, repa_dim=8, repa_projector_dim=16)
    model, arguments = random_model(config), inputs(config)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    for precision in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision):
            found, expected = (f(*arguments, return_projection=True) for f in (compiled, model))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
    found[0].square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("repa_projector"))


@pytest.mark.gpu
def test_forward_does_not_wait_for_the_gpu():
    model, arguments = random_model(SMALL), inputs(SMALL)
    expected = model(*arguments)
    on_gpu = tuple(x.cuda() for x in arguments)
    model.cuda()
    model(*on_gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = model(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(found.cpu(), expected, 1e-3)


# Settings and inputs that do not fit


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": ()}, "at least one Group"),
        ({"clocks": 3}, "clocks is 3; use 1, or 2"),
        ({"patch_size": 3}, "grid of 4 cannot be cut into patches of 3"),
        ({"num_heads": 3}, "hidden_size 16 over 3 heads.*multiple of 4"),
        ({"num_heads": 8}, "hidden_size 16 over 8 heads.*multiple of 4"),
        ({"repa_depth": 3}, "repa_depth 3 is not one of the 2 blocks"),
        ({"depth": 0}, "depth is 0; it must be an integer of at least 1"),
        ({"input_size": "8"}, "input_size is '8'"),
        ({"mlp_ratio": 0.0}, "mlp_ratio 0.0"),
    ],
)
def test_impossible_configurations(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **settings)


def test_unknown_sizes_and_fields():
    with pytest.raises(
        ValueError, match=r"unknown size 'xl' \(did you mean 'XL'\?\); there are demo, S, B, L, XL, 1\.0B"
    ):
        lightningdit_config("xl", IMAGENET_SPEC, 16, 1000)
    with pytest.raises(ValueError, match=r"no field 'patchsize' \(did you mean 'patch_size'\?\)"):
        lightningdit_config("XL", IMAGENET_SPEC, 16, 1000, patchsize=2)
    with pytest.raises(ValueError, match="'groups'"):
        LightningDiTConfig.from_dict({"input_size": 4})


def test_inputs_that_do_not_fit():
    model = LightningDiT(SMALL)
    z, t, labels = inputs(SMALL)
    for arguments, message in (
        ((z[:, :5], t, labels), r"z have shape \(3, 5, 4, 4\).*\[B, 6, H, W\] \(4 texture \+ 2 semantic"),
        ((z[..., :2], t, labels), r"latent grid is \(4, 2\), this network is built for \(4, 4\)"),
        ((z, t[:, :1], labels), r"local times have shape \(3, 1\), expected \[3, 2\]"),
        ((z, t[:1], labels), r"local times have shape \(1, 2\), expected \[3, 2\]"),
        ((z, t, labels.float()), r"labels must be integers \[3\], not torch\.float32"),
        ((z, t, labels[:2]), r"labels must be integers \[3\]"),
        ((z, t, labels + 2), r"labels run from 2 to 4; this network knows the classes 0 to 2, and 3 for no class"),
        ((z, t, labels - 1), r"labels run from -1 to 1"),
        ((z, t, labels, True), r"no REPA projector"),
    ):
        with pytest.raises(ValueError, match=message):
            model(*arguments)
