"""Groups, their channels and statistics, by hand."""

import pytest
import torch

from lwd import IMAGENET_SPEC, Group, LatentSpec, Normalization
from lwd.latents import resolve_spec

SPEC = LatentSpec([Group("texture", 2, 1.0), Group("semantic", 1, 3.0), Group("depth", 3, 0.5)])


def test_layout():
    assert (len(SPEC), SPEC.names, SPEC.sizes, SPEC.channels) == (3, ("texture", "semantic", "depth"), (2, 1, 3), 6)
    assert SPEC.index("semantic") == 1
    z = torch.arange(6.0).view(1, 6, 1, 1)
    assert [part.flatten().tolist() for part in SPEC.split(z)] == [[0, 1], [2], [3, 4, 5]]
    assert torch.equal(SPEC.weights(z), torch.tensor([1.0, 3.0, 0.5]))
    torch.testing.assert_close(SPEC.shares(z), torch.tensor([2.0, 1.0, 3.0]) / 6)


def test_imagenet():
    assert IMAGENET_SPEC.to_dict() == [
        {"name": "texture", "channels": 32, "weight": 1.0},
        {"name": "semantic", "channels": 16, "weight": 2.0},
    ]
    assert IMAGENET_SPEC.channels == 48


def test_expand_gives_every_channel_the_value_of_its_group():
    expanded = SPEC.expand(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    assert expanded.shape == (2, 6, 1, 1)
    assert expanded[:, :, 0, 0].tolist() == [[1, 1, 2, 3, 3, 3], [4, 4, 5, 6, 6, 6]]


def test_group_mean_is_over_channels_and_positions():
    z = torch.arange(12.0).view(1, 6, 1, 2)
    torch.testing.assert_close(SPEC.group_mean(z), torch.tensor([[1.5, 4.5, 8.5]]))
    assert SPEC.group_mean(z.double()).dtype == torch.float64


def test_group_mean_ignores_autocast():
    """A matrix product here would give bfloat16 losses to whoever trains under autocast."""
    z = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        means = SPEC.group_mean(z)
    assert means.dtype == torch.float32
    parts = torch.stack([part.double().mean(dim=(1, 2, 3)) for part in SPEC.split(z)], 1)
    torch.testing.assert_close(means.double(), parts, rtol=1e-5, atol=1e-7)


def test_training_after_inference_mode():
    """What inference mode puts into a cache must still serve autograd."""
    spec = LatentSpec([Group("never", 1), Group("used before", 2)])
    with torch.inference_mode():
        spec.group_mean(torch.ones(1, 3, 2, 2))
        spec.expand(torch.ones(1, 2))
    z, t = torch.ones(1, 3, 2, 2, requires_grad=True), torch.ones(1, 2, requires_grad=True)
    spec.group_mean(z * spec.expand(t)).sum().backward()
    torch.testing.assert_close(z.grad.sum(), torch.tensor(2.0))
    torch.testing.assert_close(t.grad, torch.ones(1, 2))


def test_equal_specs_are_one():
    again = LatentSpec.from_dict(SPEC.to_dict())
    assert again == SPEC
    assert hash(again) == hash(SPEC)
    assert LatentSpec(groups=SPEC.groups) == SPEC


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Group("", 2), "needs a name"),
        (lambda: Group("texture", 0), "'texture' has 0 channels"),
        (lambda: Group("texture", 2, -1.0), "weight -1.0"),
        (lambda: Group("texture", 2, float("nan")), "weight nan"),
        (lambda: LatentSpec([]), "at least one Group"),
        (lambda: LatentSpec([Group("a", 1), Group("a", 2)]), r"repeated: \['a'\]"),
        (lambda: SPEC.index("pixels"), "no group 'pixels'; this latent has texture, semantic, depth"),
        (lambda: SPEC.check(torch.zeros(1, 5, 2, 2)), r"latents have shape \(1, 5, 2, 2\).*\[B, 6, H, W\]"),
        (lambda: SPEC.check(torch.zeros(1, 6, 2), "noise"), "noise have shape .*2 texture \\+ 1 semantic \\+ 3 depth"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Which spec a caller means


class WithSpec:
    spec = SPEC


def test_resolve_spec():
    other = LatentSpec([Group("a", 3), Group("b", 2), Group("c", 1)])
    assert resolve_spec(None, WithSpec(), 6, 3) is SPEC
    assert resolve_spec(other, WithSpec(), 6, 3) is other
    assert resolve_spec(None, None, 5, 1).sizes == (5,)
    assert resolve_spec(None, None, 4, 4).sizes == (1, 1, 1, 1)
    assert resolve_spec(None, None, 48, 2) is IMAGENET_SPEC
    with pytest.raises(ValueError, match="cannot tell how 12 channels divide into 2 groups"):
        resolve_spec(None, None, 12, 2)
    with pytest.raises(ValueError, match="the latent spec has 6 channels, the tensor 12"):
        resolve_spec(None, WithSpec(), 12, 3)
    with pytest.raises(ValueError, match=r"3 groups .*, the schedule 2"):
        resolve_spec(SPEC, None, 6, 2)


# Normalisation


def test_statistics_by_hand():
    latents = torch.tensor([[[1.0, 3.0]], [[10.0, 10.0]]]).view(1, 2, 1, 2).repeat(2, 1, 1, 1)
    latents[1, 1] = 30.0
    statistics = Normalization.from_latents(latents)
    assert statistics.mean == (2.0, 20.0)
    assert statistics.std == pytest.approx(((4 / 3) ** 0.5, (400 / 3) ** 0.5))


def test_normalised_latents_have_mean_0_and_std_1_and_come_back():
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.1, 1.0, 50.0]).view(3, 1, 1)
    latents = torch.randn(64, 3, 4, 4, generator=generator) * scale + 7
    statistics = Normalization.from_latents(latents)
    normalised = statistics.normalize(latents)
    torch.testing.assert_close(normalised.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(normalised.transpose(0, 1).flatten(1).std(dim=1), torch.ones(3), rtol=1e-4, atol=0)
    torch.testing.assert_close(statistics.denormalize(normalised), latents, rtol=1e-5, atol=1e-5)
    assert Normalization.from_dict(statistics.to_dict()) == statistics


def test_different_statistics_are_named_on_both_sides():
    a, b = Normalization((0.0, 1.0), (1.0, 2.0)), Normalization((0.0, 1.5), (1.0, 2.0))
    a.require_equal(Normalization((0.0, 1.0 + 1e-7), (1.0, 2.0)), "checkpoint", "shards")
    with pytest.raises(ValueError, match=r"channel 1 has mean 1 .* in checkpoint, but 1.5 and 2 in shards"):
        a.require_equal(b, "checkpoint", "shards")
    with pytest.raises(ValueError, match="checkpoint has statistics of 2 channels, shards of 1"):
        a.require_equal(Normalization((0.0,), (1.0,)), "checkpoint", "shards")


def test_impossible_statistics():
    with pytest.raises(ValueError, match="2 means but 1"):
        Normalization((0.0, 1.0), (1.0,))
    for std in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"must be positive; it is not for channels \[1\]"):
            Normalization((0.0, 1.0), (1.0, std))
    with pytest.raises(ValueError, match="statistics of 2 channels do not fit"):
        Normalization((0.0, 1.0), (1.0, 1.0)).normalize(torch.zeros(1, 3, 2, 2))
