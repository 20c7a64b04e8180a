"""What makes steps fast changes no loss: each way of doing the work beside the plain one (docs/results/speed.md)."""

import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lwd
import lwd.linear
from lwd.backbones.lightningdit import Block, attend, rotary_tables
from lwd.compute import compile_blocks
from lwd.data import TensorLatents
from lwd.guidance import AutoGuidance, ClassifierFreeGuidance
from lwd.memory import keep_freed_memory
from lwd.training import _Training
from networks import SMALL, assert_close, inputs, random_model

CPU = torch.device("cpu")
WITH_REPA = replace(SMALL, repa_depth=1, repa_dim=8, repa_projector_dim=16)


def losses(steps: int = 4, device: torch.device = CPU, **settings) -> list[float]:
    """Of the first steps of a training with every term, from the same weights and batches."""
    generator = torch.Generator().manual_seed(3)
    latents, features = (torch.randn(12, channels, 4, 4, generator=generator) for channels in (6, 8))
    data = TensorLatents(WITH_REPA.spec, latents, torch.arange(12) % 3, features=features)
    config = lwd.TrainConfig(**{"batch_size": 6, "precision": "float32", "ema": 0.9} | settings)
    network = random_model(WITH_REPA).train().to(device)
    training = _Training(network, lwd.OffsetSchedule(0.3).to(device), data, config, None, device)
    return [float(training.update(step)["loss"]) for step in range(steps)]


@pytest.fixture
def traced(monkeypatch):
    """Compile without a C++ compiler: graphs are captured and differentiated, but run operation by operation."""
    real, compiled = nn.Module.compile, []

    def compile_traced(module, **settings):
        compiled.append(module)
        real(module, backend="aot_eager", **settings)

    monkeypatch.setattr(nn.Module, "compile", compile_traced)
    return compiled


def test_compiled_by_block(traced):
    assert losses(compile=True) == pytest.approx(losses(), rel=1e-5)
    assert [type(part).__name__ for part in traced] == ["Block", "Block"]


def test_a_network_without_blocks_is_compiled_whole(traced):
    network = nn.Conv2d(3, 3, 1)
    compile_blocks(network)
    assert traced == [network]


@pytest.mark.skipif(not lwd.linear.ONEDNN, reason="PyTorch was built without oneDNN")
def test_products_by_onednn(traced, monkeypatch):
    monkeypatch.setattr("lwd.linear.AVX512", False)
    expected = losses()
    monkeypatch.setattr("lwd.linear.AVX512", True)
    monkeypatch.setattr("lwd.linear.FEWEST_PRODUCTS", 0)
    assert losses() == pytest.approx(expected, rel=1e-5)
    assert losses(compile=True, recompute=1) == pytest.approx(expected, rel=1e-5)


def test_recomputed(traced):
    assert losses(recompute=2) == pytest.approx(losses(), rel=1e-6)
    assert losses(recompute=1, compile=True) == pytest.approx(losses(), rel=1e-5)


def test_in_parts():
    assert losses(accumulate=3) == pytest.approx(losses(), rel=1e-5)


def test_in_bf16():
    assert losses(precision="bf16") == pytest.approx(losses(), rel=0.02)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_attention_by_plain_products(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 12, 8, generator=generator).to(dtype)
    results = []
    for attention in (attend, F.scaled_dot_product_attention):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves)
        out.square().sum().backward()
        results.append([out.detach(), *(x.grad for x in leaves)])
    for found, expected in zip(*results, strict=True):
        assert_close(found.float(), expected.float(), tolerance)


def test_tokens_lie_in_one_piece():
    model, arguments = random_model(SMALL), inputs(SMALL)
    strides, outputs = [], []

    def look(module, given):
        strides.append(given[0].stride())

    def scatter(module, given):
        return given[0].transpose(1, 2).contiguous().transpose(1, 2), *given[1:]

    for act in (look, scatter):
        hook = model.blocks[0].register_forward_pre_hook(act)
        outputs.append(model(*arguments))
        hook.remove()
    assert strides == [(16 * 16, 16, 1)]
    assert_close(outputs[0], outputs[1], 1e-6)


def test_one_scale_needs_no_tensor():
    main, weak = random_model(SMALL), random_model(SMALL, seed=1)
    for one, many in (
        (AutoGuidance(main, weak, 1.5), AutoGuidance(main, weak, [1.5, 1.5])),
        (ClassifierFreeGuidance(main, 1.5, 3, spec=SMALL.spec), ClassifierFreeGuidance(main, [1.5, 1.5], 3)),
    ):
        torch.testing.assert_close(one(*inputs(SMALL)), many(*inputs(SMALL)))


def test_kept_memory(monkeypatch):
    before = losses(2)
    kept = keep_freed_memory()
    assert losses(2) == before
    assert isinstance(kept, bool)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()


def test_the_package_waits_for_torch_until_it_is_used():
    code = "import sys, lwd; assert 'torch' not in sys.modules; lwd.OffsetSchedule; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.gpu
def test_compiled_on_a_gpu():
    device = torch.device("cuda")
    assert losses(device=device, compile=True) == pytest.approx(losses(device=device), rel=1e-3)


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_gpu():
    device = torch.device("cuda")
    latents = torch.randn(12, 6, 4, 4, device=device)
    data = TensorLatents(SMALL.spec, latents, torch.arange(12, device=device) % 3)
    config = lwd.TrainConfig(batch_size=6, repa=0.0)
    training = _Training(random_model(SMALL).to(device), lwd.OffsetSchedule(0.3).to(device), data, config, None, device)
    training.update(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.update(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler needs a C++ compiler")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_compiled_block_has_the_derivatives_of_the_plain_one(precision):
    """With the real compiler, at sizes at which it vectorises: it can be wrong (docs/results/speed.md, rotation)."""
    config = replace(SMALL, input_size=8, hidden_size=128, num_heads=2)
    block = Block(config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.05)
        x, condition = torch.randn(2, 64, 128), torch.randn(2, 128)
    tables = rotary_tables(8, 64)

    def found(block: nn.Module) -> list[torch.Tensor]:
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            out = block(leaf, condition, *tables)
        out.square().mean().backward()
        return [out.detach(), leaf.grad, *(parameter.grad.clone() for parameter in block.parameters())]

    expected = found(block)
    block.compile(dynamic=False)
    for ours, plain in zip(found(block), expected, strict=True):
        assert float((ours - plain).norm() / plain.norm()) < (1e-5 if precision == torch.float32 else 0.05)
