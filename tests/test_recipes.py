"""Every recipe: what follows from it, what was published for it, what it costs."""

from dataclasses import asdict, fields, replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lwd.backbones import LightningDiT, LightningDiTConfig, lightningdit_config
from lwd.cost import (
    B200,
    GIB,
    H100,
    PAPER_IMAGES_PER_SECOND,
    RTX4090,
    activation_bytes,
    forward_flops,
    parameter_count,
    state_bytes,
)
from lwd.latents import IMAGENET_SPEC, Group
from lwd.objective import repa_alignment
from lwd.recipes import ITERATIONS_PER_EPOCH, PAPER_SWEEP, RECIPES, Published, get_recipe, make_schedule, table
from lwd.recipes.budget import cost_of
from lwd.schedules import OffsetSchedule, PolynomialSchedule, SynchronousSchedule

DEMO, WEAK, S, B, XL, BIG = 5_010_592, 690_852, 32_459_200, 130_090_800, 674_339_184, 1_027_880_496
TEXTURE_XL = XL - 16 * (2 * 1152 + 1) + (1152**2 - 2 * 576**2)  # 16 channels fewer, one wide clock instead of two
PROJECTOR = {768: 7_344_896, 1152: 8_131_328, 1536: 8_917_760}

# name: steps, batch, epochs, parameters without projector, schedule, lambda (None: no probe), Jacobian, REPA weight
FACTS = {
    "embedded": (1_400, 64, 11.2, DEMO, "learned", 0.04, "detached", 0.0),
    "embedded-offset": (1_400, 64, 11.2, DEMO, "offset:0.3", None, "none", 0.0),
    "embedded-synchronous": (1_400, 64, 11.2, DEMO, "synchronous", None, "detached", 0.0),
    "embedded-weak": (466, 64, 3.728, WEAK, "learned", 0.04, "detached", 0.0),
    "imagenet-xl-80ep": (400_000, 256, 80, XL, "learned", 0.04, "detached", 1.0),
    "imagenet-xl-200ep": (1_000_000, 256, 200, XL, "learned", 0.04, "detached", 1.0),
    "imagenet-xl-600ep": (3_000_000, 256, 600, XL, "learned", 0.04, "detached", 1.0),
    "imagenet-b-weak": (70_000, 256, 14, B, "learned", None, "detached", 1.0),
    "imagenet-1b": (4_000_000, 256, 800, BIG, "learned", 0.04, "detached", 1.0),
    "imagenet-semvae": (400_000, 256, 80, XL, "learned", 0.02, "detached", 1.0),
    "imagenet-dino-pca": (400_000, 256, 80, XL, "learned", 0.02, "detached", 1.0),
    "imagenet-clip-pca": (400_000, 256, 80, XL, "learned", 0.02, "detached", 1.0),
    "imagenet-sfd-xl": (4_000_000, 256, 800, XL, "offset:0.3", None, "none", 1.0),
    "imagenet-sfd-1b": (4_000_000, 256, 800, BIG, "offset:0.3", None, "none", 1.0),
    "imagenet-sfd-b-weak": (120_000, 256, 24, B, "offset:0.3", None, "none", 1.0),
    "imagenet-sfd-80ep": (400_000, 256, 80, XL, "offset:0.3", None, "none", 0.5),
    "imagenet-sfd-dino-pca": (400_000, 256, 80, XL, "offset:0.3", None, "none", 1.0),
    "imagenet-sfd-clip-vae": (400_000, 256, 80, XL, "offset:0.3", None, "none", 1.0),
    "imagenet-lightningdit": (4_000_000, 256, 800, TEXTURE_XL, "synchronous", None, "detached", 0.0),
    "imagenet-lightningdit-repa": (4_000_000, 256, 800, TEXTURE_XL, "synchronous", None, "detached", 1.0),
    "imagenet-b-24gb": (400_000, 256, 80, B, "learned", 0.04, "detached", 1.0),
    "cifar-s": (100_000, 256, 512, S, "learned", 0.04, "detached", 0.0),
}

LWD = {70: 6.89, 120: 4.93, 400: 2.87, 800: 2.53, 1000: 2.37, 2000: 2.21, 3000: 2.14}
UNGUIDED = {  # thousands of iterations: FID
    "imagenet-xl-80ep": {k: v for k, v in LWD.items() if k <= 400},
    "imagenet-xl-200ep": {k: v for k, v in LWD.items() if k <= 1000},
    "imagenet-xl-600ep": LWD,
    "imagenet-sfd-xl": {70: 8.79, 120: 6.22, 400: 3.53, 1000: 2.82, 2000: 2.74, 4000: 2.54},
    "imagenet-lightningdit": {400: 9.29, 1000: 7.48, 2000: 6.88, 4000: 6.50},
    "imagenet-lightningdit-repa": {400: 6.94, 1000: 6.17, 2000: 5.87, 4000: 5.84},
    "imagenet-semvae": {400: 2.87},
    "imagenet-dino-pca": {400: 2.97},
    "imagenet-clip-pca": {400: 4.54},
    "imagenet-sfd-dino-pca": {400: 4.06},
    "imagenet-sfd-clip-vae": {400: 4.89},
    "imagenet-sfd-80ep": {400: 3.23},
}
EP80 = (400, 1.14, 3.79, 248.4, 0.78, 0.71, 1.5)
EP200 = (1000, 1.05, 3.79, 273.0, 0.78, 0.72, 1.5)
EP600 = (3000, 1.02, 3.78, 270.8, 0.78, 0.66, 1.3)
GUIDED = {  # thousands of iterations, FID, sFID, IS, precision, recall, w
    "imagenet-xl-80ep": [EP80],
    "imagenet-xl-200ep": [EP80, EP200],
    "imagenet-xl-600ep": [EP80, EP200, EP600],
    "imagenet-sfd-xl": [(400, 1.30, 3.87, 233.4, 0.78, 0.64, 1.6), (4000, 1.06, 3.89, 267.0, 0.78, 0.67, 1.5)],
    "imagenet-sfd-1b": [(400, 1.19, 4.00, 240.4, 0.78, 0.65, 1.5), (4000, 1.04, 3.75, 264.2, 0.78, 0.66, 1.5)],
    "imagenet-sfd-80ep": [(400, 1.38, None, None, None, None, 1.5)],
}


def on_meta(config: LightningDiTConfig) -> LightningDiT:
    with torch.device("meta"):
        return LightningDiT(config)


def test_the_registry_is_the_list_of_facts():
    assert list(RECIPES) == list(FACTS)
    assert all(make().name == name for name, make in RECIPES.items())


@pytest.mark.parametrize("name", FACTS)
def test_derived_facts(name):
    steps, batch, epochs, parameters, schedule, kinetic, jacobian, repa = FACTS[name]
    recipe, cost = get_recipe(name), cost_of(get_recipe(name))
    assert (recipe.train.steps, recipe.train.batch_size, recipe.schedule) == (steps, batch, schedule)
    assert (recipe.train.jacobian, recipe.train.repa, recipe.train.cosine) == (jacobian, repa, 1.0)
    assert (recipe.images, cost.images, cost.batch) == (steps * batch, steps * batch, batch)
    assert recipe.epochs == cost.epochs == pytest.approx(epochs)
    if name.startswith("imagenet"):
        assert batch == 256
        assert epochs == steps / ITERATIONS_PER_EPOCH
    assert cost.denoiser_parameters == parameters
    projector = PROJECTOR[recipe.backbone.hidden_size] if repa else 0
    assert cost.parameters - cost.denoiser_parameters == projector
    assert (recipe.backbone.repa_depth is not None) == (repa > 0)
    assert (None if recipe.probe is None else recipe.probe.kinetic) == kinetic
    assert bool(recipe.kinetics) == (recipe.probe is not None)
    assert recipe.latents
    assert all(0 < snapshot < steps for snapshot in recipe.train.snapshots)


@pytest.mark.parametrize("name", FACTS)
def test_backbone_and_schedule_can_be_made(name):
    recipe = get_recipe(name)
    model = on_meta(recipe.backbone)
    assert sum(p.numel() for p in model.parameters()) == cost_of(recipe).parameters
    names = recipe.backbone.spec.names
    assert names == (("texture",) if "lightningdit" in name else ("texture", "semantic"))
    assert recipe.backbone.clocks == len(names)
    if recipe.schedule == "learned":
        degree = 4 if recipe.probe is None else recipe.probe.degree
        schedule = PolynomialSchedule(degree, groups=len(names), names=names)
        assert schedule(torch.tensor([0.5])).t[0].tolist() == pytest.approx([0.5, 0.5], abs=0.01)
    else:
        schedule = make_schedule(recipe.schedule, names)
        assert isinstance(schedule, OffsetSchedule if recipe.schedule == "offset:0.3" else SynchronousSchedule)
    assert schedule.names == names


@pytest.mark.parametrize("name", FACTS)
def test_published_numbers(name):
    published = get_recipe(name).published
    found = {row.iterations // 1000: row.fid for row in published if row.guidance is None}
    assert found == UNGUIDED.get(name, {})
    columns = [field.name for field in fields(Published)][:7]
    rows = [tuple(getattr(row, column) for column in columns) for row in published if row.guidance is not None]
    assert [(k // 1000, *rest) for k, *rest in rows] == GUIDED.get(name, [])


@pytest.mark.parametrize("name", FACTS)
def test_every_published_row_can_be_reached(name):
    recipe = get_recipe(name)
    kept = {*recipe.train.snapshots, recipe.train.steps}
    for row in recipe.published:
        assert row.iterations in kept
        assert recipe.published_at(row.iterations, guided=row.guidance is not None) is row
        if row.weak is not None:
            weak, iterations = row.weak.split("@")
            weak_recipe = get_recipe(weak)
            assert int(iterations) in {*weak_recipe.train.snapshots, weak_recipe.train.steps}
            assert weak_recipe.schedule == recipe.schedule


def test_published_at_lists_what_there_is():
    recipe = get_recipe("imagenet-xl-200ep")
    assert recipe.published_at(800_000).fid == 2.53
    with pytest.raises(ValueError, match=r"at 800,000 .* with AutoGuidance; there is: 400,000, 1,000,000"):
        recipe.published_at(800_000, guided=True)
    with pytest.raises(ValueError, match="there is: nothing"):
        get_recipe("embedded").published_at(10)


def test_shorter_budgets_are_the_beginning_of_the_long_run():
    """Steps and snapshots apart the recipes are one, and nothing in the training depends on the number of steps."""
    long = get_recipe("imagenet-xl-600ep")
    for name in ("imagenet-xl-80ep", "imagenet-xl-200ep"):
        short = get_recipe(name)
        train = replace(short.train, steps=long.train.steps, snapshots=long.train.snapshots)
        same = replace(short, name=long.name, summary=long.summary, train=train, published=long.published)
        assert same == long
        for run in (short, long):
            assert {run.train.optimizer.factor(step, run.train.steps) for step in (0, 1, 399_999)} == {1.0}
        assert set(short.published) <= set(long.published)


def test_settings_of_tables_4_and_5():
    recipe = get_recipe("imagenet-xl-600ep")
    train, probe, config = recipe.train, recipe.probe, recipe.backbone
    assert (config.depth, config.hidden_size, config.num_heads, config.patch_size, config.mlp_ratio) == (
        28,
        1152,
        16,
        1,
        4.0,
    )
    assert config.spec == IMAGENET_SPEC
    assert config.repa_depth == 2
    assert asdict(train.optimizer) == {
        "lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 0.0, "warmup_steps": 0, "decay": "constant",
    }  # fmt: skip
    assert (train.ema, train.precision, train.tau, train.repa_loss) == (0.9999, "bf16", "uniform", "cos")
    assert (probe.steps, probe.burn_in, probe.batch_size, probe.degree) == (10_000, 5_000, 256, 4)
    assert (probe.optimizer.lr, probe.rho_lr, probe.kinetic, probe.jacobian) == (1e-4, 1e-2, 0.04, "detached")
    assert recipe.kinetics == PAPER_SWEEP == (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.1)
    assert probe.kinetic in recipe.kinetics
    for name in ("imagenet-semvae", "imagenet-dino-pca", "imagenet-clip-pca"):
        assert get_recipe(name).kinetics == (0.02,)


def test_settings_of_sfd():
    main, fork = get_recipe("imagenet-sfd-xl"), get_recipe("imagenet-sfd-80ep")
    assert main.train.tau == fork.train.tau == "logit_normal"
    assert (fork.train.optimizer.lr, fork.train.optimizer.betas) == (2e-4, (0.9, 0.95))
    assert (fork.train.repa, fork.train.repa_loss) == (0.5, "cos_mse")
    assert (main.train.optimizer, main.train.repa_loss) == (get_recipe("imagenet-xl-600ep").train.optimizer, "cos")


def test_recipes_that_differ_in_their_latents_alone():
    by_encoder = [get_recipe(f"imagenet-{name}") for name in ("semvae", "dino-pca", "clip-pca")]
    assert len({(recipe.backbone, recipe.train, recipe.probe) for recipe in by_encoder}) == 1
    assert len({recipe.latents for recipe in by_encoder}) == 3


def test_a_scaled_recipe():
    recipe = get_recipe("imagenet-xl-80ep")
    assert recipe.scaled(1) == recipe
    short = recipe.scaled(0.01)
    assert (short.train.steps, short.train.snapshots, short.published) == (4_000, (700, 1_200), ())
    assert (short.probe.steps, short.probe.burn_in) == (100, 50)
    tiny = recipe.scaled(1e-6)
    assert (tiny.train.steps, tiny.train.snapshots, tiny.probe.burn_in) == (2, (1,), 0)
    with pytest.raises(ValueError, match="positive factor, not 0"):
        recipe.scaled(0)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"no recipe 'imagenet-xl-60ep'. Did you mean imagenet-xl-[68]0"):
        get_recipe("imagenet-xl-60ep")
    with pytest.raises(ValueError, match="no schedule 'sync': give synchronous"):
        make_schedule("sync", ("texture", "semantic"))
    with pytest.raises(ValueError, match="schedule 'offset:x'"):
        make_schedule("offset:x", ("texture", "semantic"))


# --- cost -----------------------------------------------------------------------------------------------------------

SMALL = lightningdit_config("S", IMAGENET_SPEC, 16, 10, hidden_size=128, num_heads=4, depth=2, repa_depth=1)
THREE = (Group("a", 4), Group("b", 2), Group("c", 1))
NETWORKS = [
    SMALL,
    replace(SMALL, patch_size=2, clocks=1, qk_norm=False),
    lightningdit_config("demo", THREE, 8, 3, mlp_ratio=3.0, repa_depth=2, repa_dim=112, repa_projector_dim=64),
    get_recipe("imagenet-xl-600ep").backbone,
]


def counted(config: LightningDiTConfig, projector: bool, device: str = "meta") -> int:
    with torch.device(device), FlopCounterMode(display=False) as counter:
        side, channels = config.input_size, config.spec.channels
        z, t = torch.zeros(1, channels, side, side), torch.zeros(1, len(config.groups))
        LightningDiT(config)(z, t, torch.zeros(1, dtype=torch.int64), return_projection=projector)
    return counter.get_total_flops()


@pytest.mark.parametrize("config", NETWORKS, ids=["small", "patches", "three groups", "XL"])
def test_operations_are_those_that_torch_counts(config):
    for projector in (False, True):
        assert forward_flops(config, projector=projector) == counted(config, projector)
    assert parameter_count(config) == sum(p.numel() for p in on_meta(config).parameters())


def test_operations_of_short_sequences_and_other_lengths():
    assert forward_flops(NETWORKS[1]) == counted(NETWORKS[1], False, "cpu")  # 64 tokens: attention in plain products
    assert forward_flops(SMALL, tokens=64) == forward_flops(replace(SMALL, input_size=8))


def test_the_papers_speed_and_hours():
    recipe = get_recipe("imagenet-xl-200ep")
    assert round(forward_flops(recipe.backbone) / 1e9) == 237
    assert pytest.approx(589, abs=0.5) == PAPER_IMAGES_PER_SECOND
    cost = cost_of(recipe, B200)
    assert cost.training == 3 * recipe.images * forward_flops(recipe.backbone, projector=True)
    assert cost.training_hours / 2 == pytest.approx(60, rel=0.01)  # "approximately 60 hours" on 2 GPUs
    assert cost.probe_hours * 60 / 2 == pytest.approx(36, rel=0.02)  # "approximately 36 minutes"
    assert cost.probe_hours < 0.01 * cost.training_hours  # "less than 1 %"
    assert cost.sweep_hours == 7 * cost.probe_hours
    assert cost_of(recipe, H100).training_hours == pytest.approx(cost.training / (0.3 * 989e12 * 3600))
    assert cost_of(get_recipe("imagenet-sfd-xl")).probe_hours == 0


def test_state_of_the_optimizer():
    assert state_bytes(1000, "float32") == 4 * 5 * 1000  # weight, gradient, two moments, average
    assert state_bytes(1000, "bf16") == 22 * 1000


def saved_bytes(config: LightningDiTConfig, images: int, precision: str, projector: bool) -> int:
    """Bytes of all storages that autograd keeps for the backward pass, the model's own excepted."""
    model = LightningDiT(config)
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x  # alive, so that no address is given out twice
        return x

    side, channels = config.input_size, config.spec.channels
    z, t = torch.zeros(images, channels, side, side), torch.rand(images, len(config.groups))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            out = model(z, t, torch.zeros(images, dtype=torch.int64), return_projection=projector)
        if projector:
            repa_alignment(out[1], torch.randn(images, config.repa_dim, side, side))
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_activation_memory_against_what_autograd_keeps(precision, monkeypatch):
    """The formula is for CUDA's fused RMSNorm and attention; the CPU's keep (16 + c) N D bytes more in a block.

    Under bf16 the CPU's own attention keeps its matrix, so the fused one is put in its place."""
    monkeypatch.setattr("lwd.backbones.lightningdit.attend", torch.nn.functional.scaled_dot_product_attention)
    measured = saved_bytes(SMALL, 2, precision, False) - saved_bytes(SMALL, 1, precision, False)
    c, grid = 2 if precision == "bf16" else 4, 256 * SMALL.hidden_size
    extra = SMALL.depth * (16 + c) * grid + 4 * grid  # and the final norm
    estimate = activation_bytes(SMALL, precision)
    assert measured - extra == pytest.approx(estimate, rel=0.02)
    assert 1.1 < measured / estimate < 1.4
    with_repa = saved_bytes(SMALL, 2, precision, True) - saved_bytes(SMALL, 1, precision, True)
    assert with_repa - measured == pytest.approx(
        activation_bytes(SMALL, precision, projector=True) - estimate, rel=0.03
    )


def test_recomputed_blocks_trade_work_for_memory():
    recipe = get_recipe("imagenet-xl-200ep")
    plain, half, all_blocks = (cost_of(recipe, recompute=blocks) for blocks in (0, 14, 28))
    stream, block = 4 * 256 * 1152, plain.activations - cost_of(recipe, recompute=1).activations + 4 * 256 * 1152
    assert half.activations == plain.activations - 14 * (block - stream)
    assert all_blocks.activations == plain.activations - 27 * block + 28 * stream
    assert half.training - plain.training == (all_blocks.training - plain.training) / 2
    assert all_blocks.training / plain.training == pytest.approx(4 / 3, rel=0.01)
    with pytest.raises(ValueError, match="recompute 29 of 28 blocks"):
        cost_of(recipe, recompute=29)


def test_a_batch_that_fits():
    cost = cost_of(get_recipe("imagenet-b-24gb"), RTX4090)
    assert cost.micro_batch() == 64
    assert cost.memory(64) == cost.state + 64 * cost.activations < 0.9 * 24 * GIB < cost.memory(128)
    assert cost_of(get_recipe("imagenet-b-24gb"), RTX4090, recompute=12).micro_batch() == 256
    with pytest.raises(ValueError, match=r"one image needs 14.5 GiB, of which 14.0 GiB .* 9.0 GiB can be used"):
        cost_of(get_recipe("imagenet-xl-80ep")).micro_batch(10 * GIB)


def test_the_table():
    lines = table()
    assert max(map(len, lines)) <= 120
    rows = {line.split()[0]: line for line in lines if line.split() and line.split()[0] in RECIPES}
    assert list(rows) == list(FACTS)
    assert "3M x 256     600    674M    522  14.0+0.51n  2.14 (1.02)  LWD-XL" in rows["imagenet-xl-600ep"]
    assert " (1.04)  SFD-XXL" in rows["imagenet-sfd-1b"]
    assert "<0.1" in rows["embedded"]
    assert "H100 at 30% of its peak" in "\n".join(lines)
    assert "B200 at 19% of its peak" in "\n".join(table(B200))


def test_the_announced_memory_is_that_of_the_options_given(capsys):
    from lwd.cli.train import _announce

    recipe, device = get_recipe("imagenet-b-24gb"), torch.device("cpu")
    cost = cost_of(recipe)
    plain = cost.state + 256 * cost.activations
    for changes, expected in (
        ({}, plain),
        ({"accumulate": 16}, cost.state + 16 * cost.activations),
        ({"recompute": 12}, cost.state + 256 * cost_of(recipe, recompute=12).activations),
        ({"precision": "float32"}, 20 * cost.parameters + 256 * cost_of(
            replace(recipe, train=replace(recipe.train, precision="float32"))).activations),
    ):  # fmt: skip
        _announce(replace(recipe, train=replace(recipe.train, **changes)), 1_281_167, device)
        assert f"about {expected / 1e9:.1f} GB each" in capsys.readouterr().out
    assert cost.memory(1, shards=4) == 5 * cost.parameters + 2 * cost.parameters + cost.activations
    assert replace(recipe.train, parallel="fsdp").shards(8) == 8
    assert recipe.train.shards(8) == 1
