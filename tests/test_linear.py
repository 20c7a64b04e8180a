"""Products by oneDNN are those of PyTorch: values, derivatives, under the compiler, and where they are used."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import lwd.linear
from lwd.linear import Linear, by_onednn, inner_products, onednn_is_faster
from networks import SMALL, assert_close, inputs, random_model

pytestmark = pytest.mark.skipif(not lwd.linear.ONEDNN, reason="PyTorch was built without oneDNN")


def drawn(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.fixture
def everywhere(monkeypatch):
    """oneDNN for products of any size, whatever the processor; gives the list of sizes of those that were computed."""
    sizes = []

    def counted(a, b, bias):
        sizes.append((*a.shape, len(b)))
        return by_onednn(a, b, bias)

    monkeypatch.setattr(lwd.linear, "AVX512", True)
    monkeypatch.setattr(lwd.linear, "FEWEST_PRODUCTS", 0)
    monkeypatch.setattr(lwd.linear, "by_onednn", counted)
    return sizes


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_values(rows, with_bias):
    a, b, bias = drawn((rows, 40), (30, 40), (30,))
    expected = a.double() @ b.double().T + (bias.double() if with_bias else 0)
    assert_close(by_onednn(a, b, bias if with_bias else None).double(), expected, 1e-6)


def test_any_strides():
    a, b, _ = drawn((40, 7), (40, 60), (30,))
    a, b = a.T, b[:, ::2].T
    assert_close(by_onednn(a, b, None), a @ b.T, 1e-6)


def test_derivatives_of_first_and_second_order():
    leaves = drawn((7, 5), (6, 5), (6,))
    found, expected = [], []
    for product, results in ((by_onednn, found), (F.linear, expected)):
        out = product(*leaves)
        first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), leaves)
        results += [out, *first, *second]
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-5)


def test_only_the_derivatives_that_are_asked_for():
    a, b, bias = drawn((7, 5), (6, 5), (6,))
    by_onednn(a, b.detach(), bias.detach()).sum().backward()
    assert_close(a.grad, b.sum(dim=0).expand(7, 5), 1e-6)
    assert b.grad is None
    assert bias.grad is None


def test_as_an_operator():
    torch.library.opcheck(by_onednn, drawn((7, 5), (6, 5), (6,)))
    a, b = drawn((7, 5), (6, 5))
    torch.library.opcheck(by_onednn, (a, b, None))


def test_operations_are_counted():
    a, b, bias = drawn((7, 5), (6, 5), (6,))
    with FlopCounterMode(display=False) as counter:
        by_onednn(a, b, bias).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 7 * 5 * 6


def test_a_linear_map_of_any_shape(everywhere):
    x, _ = drawn((2, 3, 5), (1,))
    layer = Linear(5, 4)
    assert_close(layer(x), F.linear(x, layer.weight, layer.bias), 1e-6)
    assert_close(Linear.forward(layer, x[0, 0]), F.linear(x[0, 0], layer.weight, layer.bias), 1e-6)
    assert everywhere == [(6, 5, 4), (1, 5, 4)]


def test_a_network(everywhere):
    network, arguments = random_model(SMALL), inputs(SMALL)
    found = network(*arguments)
    products = len(everywhere)
    lwd.linear.AVX512 = False
    assert_close(found, network(*arguments), 1e-5)
    # Four in a block and its modulation; two in the last layer.
    assert products == len(everywhere) == 5 * SMALL.depth + 2


def test_where_it_is_used(monkeypatch):
    a, b = torch.ones(512, 128), torch.ones(64, 128)
    monkeypatch.setattr(lwd.linear, "AVX512", True)
    assert onednn_is_faster(a, b)
    assert onednn_is_faster(a.view(8, 64, 128), b)
    assert not onednn_is_faster(a[:511], b)
    assert not onednn_is_faster(a.double(), b.double())
    assert not onednn_is_faster(a.to("meta"), b.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not onednn_is_faster(a, b)
    monkeypatch.setattr(lwd.linear, "AVX512", False)
    assert not onednn_is_faster(a, b)
    assert torch.equal(inner_products(a, b), torch.full((512, 64), 128.0))
