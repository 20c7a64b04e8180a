"""Guidance: the formula, when the second evaluation is saved, intervals, and the reference's guided velocities."""

import pytest
import torch
from torch import Tensor

from lwd import AutoGuidance, ClassifierFreeGuidance, Group, LatentSpec, LightningDiT, ScaleCurve

SPEC = LatentSpec([Group("texture", 2), Group("semantic", 1)])
Z = torch.zeros(2, 3, 1, 1)
T = torch.tensor([[0.25, 0.625], [0.5, 0.875]])
LABELS = torch.tensor([3, 5])
NULL = 10


class Fake:
    """A denoiser that predicts one number, or its label, and remembers how it was called."""

    def __init__(self, value: float | None = None, spec: LatentSpec | None = None) -> None:
        self.value, self.calls = value, []
        if spec is not None:
            self.spec = spec

    def __call__(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.calls.append((z, t, labels))
        values = labels.float() if self.value is None else torch.full((len(z),), self.value)
        return values[:, None, None, None].expand_as(z).clone()


def channels(v: Tensor) -> list[list[float]]:
    return v[:, :, 0, 0].tolist()


def test_autoguidance_extrapolates_from_weak_to_main():
    main, weak = Fake(3.0), Fake(1.0)
    v = AutoGuidance(main, weak, 1.5)(Z, T, LABELS)
    assert channels(v) == [[4.0] * 3] * 2  # 1 + 1.5 (3 - 1)
    assert torch.equal(weak.calls[0][2], LABELS)  # the same label, unlike classifier-free guidance
    assert torch.equal(weak.calls[0][1], T)


def test_scale_one_is_the_main_model_and_the_weak_one_is_not_called():
    main, weak = Fake(3.0), Fake(1.0)
    for scale in (1, 1.0, (1.0, 1.0)):
        assert channels(AutoGuidance(main, weak, scale, spec=SPEC)(Z, T, LABELS)) == [[3.0] * 3] * 2
    assert weak.calls == []
    model = Fake()
    assert channels(ClassifierFreeGuidance(model, 1.0, NULL)(Z, T, LABELS)) == [[3.0] * 3, [5.0] * 3]
    assert [len(z) for z, _, _ in model.calls] == [2]


def test_scale_zero_is_the_weak_model():
    assert channels(AutoGuidance(Fake(3.0), Fake(1.0), 0.0)(Z, T, LABELS)) == [[1.0] * 3] * 2


def test_one_scale_per_group():
    v = AutoGuidance(Fake(3.0), Fake(1.0), (1.5, 2.0), spec=SPEC)(Z, T, LABELS)
    assert channels(v) == [[4.0, 4.0, 5.0]] * 2
    # A scale of 1 for one group leaves it exactly alone.
    v = AutoGuidance(Fake(0.1), Fake(0.7), (1.0, 3.0), spec=SPEC)(Z, T, LABELS)
    assert (v[:, :2] == 0.1).all()
    # The groups come from the main model when it knows them.
    v = AutoGuidance(Fake(3.0, SPEC), Fake(1.0), (1.5, 2.0))(Z, T, LABELS)
    assert channels(v) == [[4.0, 4.0, 5.0]] * 2


def test_interval_is_in_the_local_time_of_each_group():
    """Texture at 0.25 and 0.5, semantic at 0.625 and 0.875; guided from 0.5 to 0.625, ends included."""
    v = AutoGuidance(Fake(3.0), Fake(1.0), 1.5, interval=(0.5, 0.625), spec=SPEC)(Z, T, LABELS)
    assert channels(v) == [[3.0, 3.0, 4.0], [4.0, 4.0, 3.0]]
    weak = Fake(1.0)
    v = AutoGuidance(Fake(3.0), weak, 1.5, interval=(0.3, 0.4), spec=SPEC)(Z, T, LABELS)
    assert channels(v) == [[3.0] * 3] * 2
    assert weak.calls == []


def test_one_interval_per_group():
    """Texture guided from 0 to 0.3, semantic from 0.8 to 1."""
    v = AutoGuidance(Fake(3.0), Fake(1.0), 1.5, interval=[(0.0, 0.3), (0.8, 1.0)], spec=SPEC)(Z, T, LABELS)
    assert channels(v) == [[4.0, 4.0, 3.0], [3.0, 3.0, 4.0]]
    with pytest.raises(ValueError, match="3 intervals for 2 groups"):
        AutoGuidance(Fake(3.0), Fake(1.0), 1.5, interval=[(0.0, 0.3)] * 3, spec=SPEC)(Z, T, LABELS)


def test_scale_along_global_time():
    """1 until tau = 0.2, then rising to 2 at 0.6, then flat; and per group."""
    curve = ScaleCurve([0.2, 0.6], [1.0, 2.0])
    tau = torch.tensor([0.0, 0.2, 0.3, 0.5, 0.6, 1.0], dtype=torch.float64)
    assert curve(tau)[:, 0].tolist() == pytest.approx([1.0, 1.0, 1.25, 1.75, 2.0, 2.0])
    assert ScaleCurve([0.5], [3.0])(tau)[:, 0].tolist() == [3.0] * 6
    v = AutoGuidance(Fake(3.0), Fake(1.0), curve)(Z, T, LABELS, tau=torch.tensor([0.4, 0.6]))
    assert channels(v) == [[pytest.approx(4.0)] * 3, [pytest.approx(5.0)] * 3]  # 1 + 1.5 * 2, 1 + 2 * 2
    groups = ScaleCurve([0.0, 1.0], [[1.0, 2.0], [3.0, 2.0]])
    v = ClassifierFreeGuidance(Fake(), groups, NULL, spec=SPEC)(Z, T, LABELS, tau=torch.tensor([0.0, 0.5]))
    assert channels(v) == [[3.0, 3.0, -4.0], [0.0, 0.0, 0.0]]  # 10 + w (label - 10), w = (1, 2) and (2, 2)
    assert groups.to_dict() == {"tau": [0.0, 1.0], "scale": [[1.0, 2.0], [3.0, 2.0]]}


def test_the_weak_model_rests_while_a_varying_scale_is_one():
    weak = Fake(1.0)
    guided = AutoGuidance(Fake(3.0), weak, ScaleCurve([0.5, 0.6], [1.0, 2.0]))
    assert guided.needs_tau
    assert channels(guided(Z, T, LABELS, tau=torch.tensor([0.1, 0.5]))) == [[3.0] * 3] * 2
    assert weak.calls == []


def test_errors_of_a_scale_curve():
    for tau in ([0.5, 0.5], [0.6, 0.5], [-0.1, 0.5], [0.5, 1.5], []):
        with pytest.raises(ValueError, match="global times that increase"):
            ScaleCurve(tau, [1.0] * len(tau))
    with pytest.raises(ValueError, match="2 knots need as many finite guidance scales"):
        ScaleCurve([0.0, 1.0], [1.0])
    with pytest.raises(ValueError, match="varies along global time: call it with tau="):
        AutoGuidance(Fake(3.0), Fake(1.0), ScaleCurve([0.0], [2.0]))(Z, T, LABELS)


def test_classifier_free_guidance_takes_both_in_one_batch():
    model = Fake()
    v = ClassifierFreeGuidance(model, 2.0, NULL)(Z, T, LABELS)
    assert channels(v) == [[-4.0] * 3, [0.0] * 3]  # 10 + 2 (3 - 10) and 10 + 2 (5 - 10)
    ((z, t, labels),) = model.calls
    assert labels.tolist() == [3, 5, NULL, NULL]
    assert labels.dtype == torch.int64
    assert torch.equal(t, T.repeat(2, 1))
    assert len(z) == 4


def test_classifier_free_guidance_in_an_interval_and_per_group():
    v = ClassifierFreeGuidance(Fake(), (2.0, 3.0), NULL, (0.5, 0.8), spec=SPEC)(Z, T, LABELS)
    # semantic of image 0: 10 + 3 (3 - 10) = -11; texture of image 1: 10 + 2 (5 - 10) = 0
    assert channels(v) == [[3.0, 3.0, -11.0], [0.0, 0.0, 5.0]]


def test_guidance_is_itself_a_denoiser_and_can_be_guided():
    inner = AutoGuidance(Fake(3.0, SPEC), Fake(1.0), 1.5)
    v = AutoGuidance(inner, Fake(2.0), (2.0, 1.0))(Z, T, LABELS)
    assert channels(v) == [[6.0, 6.0, 4.0]] * 2


def test_bfloat16_and_float32_times():
    """The network's precision decides: w is never promoted into the state."""
    v = AutoGuidance(Fake(3.0), Fake(1.0), (1.5, 2.0), spec=SPEC)(Z.bfloat16(), T, LABELS)
    assert v.dtype == torch.bfloat16 or v.dtype == torch.float32
    assert channels(v.float()) == [[4.0, 4.0, 5.0]] * 2


@pytest.mark.parametrize("guidance", [AutoGuidance, ClassifierFreeGuidance])
def test_errors(guidance):
    def make(scale, **options):
        second = NULL if guidance is ClassifierFreeGuidance else Fake(1.0)
        arguments = (scale, second) if guidance is ClassifierFreeGuidance else (second, scale)
        return guidance(Fake(3.0), *arguments, **options)

    with pytest.raises(ValueError, match="3 guidance scales for 2 groups; give one, or one per group"):
        make((1.5, 2.0, 1.0), spec=SPEC)(Z, T, LABELS)
    with pytest.raises(ValueError, match="pass spec="):
        make((1.5, 2.0))(Z, T, LABELS)
    for scale in (float("nan"), float("inf"), ()):
        with pytest.raises(ValueError, match="must be finite"):
            make(scale)
    for interval in ((0.5, 0.5), (0.8, 0.2), (-0.1, 0.5), (0.5, 1.5)):
        with pytest.raises(ValueError, match="guidance interval"):
            make(1.5, interval=interval)


def test_weak_model_of_other_groups_is_refused():
    with pytest.raises(ValueError, match=r"the weak model denoises groups of \(1, 2\) channels, the main one \(2, 1\)"):
        AutoGuidance(Fake(1.0, SPEC), Fake(1.0, LatentSpec([Group("a", 1), Group("b", 2)])), 1.5)


# The reference


@pytest.fixture(scope="module")
def at_x1(semantic_first):
    model, values = semantic_first
    times = torch.stack([values["t_tex"], values["t_sem"]], dim=1)
    return model, values, (values["x1"], times, values["y"])


def assert_equal_to_1e_5(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("name", "scale"),
    [("autoguidance_1.5", 1.5), ("autoguidance_1.5", (1.5, 1.5)), ("autoguidance_tex1.3_sem1.9", (1.3, 1.9))],
)
def test_autoguidance_of_the_reference(at_x1, name, scale):
    model, values, arguments = at_x1
    weak = LightningDiT.from_sfd(values.under("weak")).requires_grad_(False)
    assert_equal_to_1e_5(AutoGuidance(model, weak, scale)(*arguments), values[name])


def test_classifier_free_guidance_of_the_reference(at_x1):
    model, values, arguments = at_x1
    assert_equal_to_1e_5(ClassifierFreeGuidance(model, 2.0, model.null_label)(*arguments), values["cfg_2.0"])
    assert_equal_to_1e_5(ClassifierFreeGuidance(model, 1.0, model.null_label)(*arguments), values["velocity"])
