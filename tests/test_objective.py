"""The losses: values by hand, what carries gradient, precision, and the reference's own numbers."""

import pytest
import torch
from torch import Tensor

import lwd
from gaussian import polynomial
from lwd import Group, LatentSpec, OffsetSchedule, SynchronousSchedule
from lwd.objective import repa_alignment

SPEC = LatentSpec([Group("texture", 2, 1.0), Group("semantic", 1, 3.0)])
SCHEDULE = OffsetSchedule(0.25)  # dt = 1.25 while a group moves
NO_LABEL = torch.zeros(1, dtype=torch.long)


def column(*channels: float) -> Tensor:
    return torch.tensor(channels, dtype=torch.float32).view(1, -1, 1, 1)


# u = (1, 2, 3); the prediction is off by (1, 3, -2), so l_tex = (1 + 9) / 2 = 5 and l_sem = 4. At tau = 0.5 both move.
X0, X1, V, TAU = column(0, 0, 1), column(1, 2, 4), column(2, 5, 1), torch.tensor([0.5])


def constant(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return V.expand_as(z)


def schedule_terms(**options) -> lwd.ScheduleTerms:
    return lwd.schedule_objective(constant, SCHEDULE, SPEC, X0, X1, NO_LABEL, TAU, **options)


# Reductions


@pytest.mark.parametrize(
    ("jacobian", "reduction", "flow"),
    [
        ("none", "groups", 1 * 5 + 3 * 4),
        ("none", "global", (1 * 2 * 5 + 3 * 1 * 4) / 3),  # one mean over the 3 channels, semantic errors times 3
        ("detached", "groups", 1.25 * (1 * 5 + 3 * 4)),
        ("detached", "global", 1.25 * (1 * 2 * 5 + 3 * 1 * 4) / 3),
        ("exact", "groups", 1.25 * (1 * 5 + 3 * 4)),
        ("information", "global", 1.25 * (2 * 5 * 3 / 5 + 4 * 5 / 3) / 3),  # t = 3/8 and 5/8; every channel counts once
    ],
)
def test_flow_loss_by_hand(jacobian, reduction, flow):
    terms = schedule_terms(jacobian=jacobian, reduction=reduction, kinetic=0.0)
    assert terms.per_group.tolist() == [[5.0, 4.0]]
    assert terms.flow.item() == pytest.approx(flow, rel=1e-6)
    denoiser_terms = lwd.denoiser_objective(
        constant, SCHEDULE, SPEC, X0, X1, NO_LABEL, TAU, jacobian=jacobian, reduction=reduction
    )
    assert denoiser_terms.flow.item() == pytest.approx(flow, rel=1e-6)
    assert torch.equal(denoiser_terms.per_group, terms.per_group)


@pytest.mark.parametrize(
    ("kinetic_reduction", "value"),
    [("groups", 1.25**2 * ((4 + 25) / 2 + 1)), ("global", 1.25**2 * (4 + 25 + 1) / 3)],
)
def test_kinetic_energy_by_hand(kinetic_reduction, value):
    """Eq. 37 with the predicted velocities, not the targets, and no loss weights."""
    terms = schedule_terms(kinetic=0.1, kinetic_reduction=kinetic_reduction)
    assert terms.kinetic.item() == pytest.approx(value, rel=1e-6)
    assert terms.total.item() == pytest.approx(terms.flow.item() + 0.1 * value, rel=1e-6)


def test_defaults_are_the_papers():
    """Detached, global mean for the flow loss, Eq. 37 as printed, lambda = 0.04."""
    explicit = schedule_terms(jacobian="detached", reduction="global", kinetic_reduction="groups", kinetic=0.04)
    assert schedule_terms().total == explicit.total


def test_a_resting_group_counts_only_without_the_correction():
    """At tau = 0.1 the texture has not started; SFD's uncorrected loss counts its error all the same."""
    options = {"reduction": "groups", "kinetic": 0.0}
    tau = torch.tensor([0.1])
    flows = {
        jacobian: lwd.schedule_objective(
            constant, SCHEDULE, SPEC, X0, X1, NO_LABEL, tau, jacobian=jacobian, **options
        ).flow.item()
        for jacobian in ("detached", "none")
    }
    assert flows == pytest.approx({"detached": 1.25 * 3 * 4, "none": 5 + 3 * 4}, rel=1e-6)


def test_imagenet_weights_make_the_groups_equal():
    """w_sem = 2 balances 32 against 16 channels: (32 l_tex + 2 * 16 l_sem) / 48 = 2/3 (l_tex + l_sem)."""
    generator = torch.Generator().manual_seed(0)
    x0, x1, v = (torch.randn(4, 48, 2, 2, generator=generator) for _ in range(3))
    terms = lwd.schedule_objective(
        lambda z, t, labels: v, SynchronousSchedule(), lwd.IMAGENET_SPEC, x0, x1, NO_LABEL.expand(4), torch.rand(4),
        kinetic=0.0,
    )  # fmt: skip
    texture = (v - x1 + x0)[:, :32].square().mean(dim=(1, 2, 3))
    semantic = (v - x1 + x0)[:, 32:].square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(terms.per_group, torch.stack([texture, semantic], 1))
    torch.testing.assert_close(terms.flow, 2 / 3 * (texture + semantic).mean())


def test_denoiser_sees_the_asynchronous_state():
    seen: list[Tensor] = []

    def spy(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        seen.extend([z, t, labels])
        return z

    labels = torch.tensor([7])
    lwd.schedule_objective(spy, SCHEDULE, SPEC, X0, X1, labels, TAU)
    z, t, passed = seen
    torch.testing.assert_close(t, torch.tensor([[0.375, 0.625]]))  # 1.25 * 0.5 - 0.25 and 1.25 * 0.5
    torch.testing.assert_close(z, column(0.375, 0.75, 0.375 + 4 * 0.625))
    assert passed is labels


# Gradients


def rho_gradient(term: str, jacobian: str) -> Tensor:
    """d term / d rho for a denoiser that ignores state and time, so only the factors t' can carry gradient."""
    schedule = polynomial([0.2, -1.0, 0.5])
    arguments = (constant, schedule, SPEC, X0.double(), X1.double(), NO_LABEL, TAU.double())
    value = getattr(lwd.schedule_objective(*arguments, jacobian=jacobian, reduction="groups"), term)
    if not value.requires_grad:
        return torch.zeros_like(schedule.rho)
    return torch.autograd.grad(value, schedule.rho)[0]


def test_what_differentiates_the_factor():
    """Eq. 33 stops the gradient of t' in the flow loss; Eq. 37 does not in the kinetic term."""
    schedule = polynomial([0.2, -1.0, 0.5])
    t_prime = schedule(TAU.double()).dt[0, 0]
    (slope,) = torch.autograd.grad(t_prime, schedule.rho)
    for jacobian in ("detached", "none"):
        assert not rho_gradient("flow", jacobian).any()
    torch.testing.assert_close(rho_gradient("flow", "exact"), 5 * slope)
    for jacobian in ("detached", "exact", "none"):
        expected = 2 * t_prime.detach() * (4 + 25) / 2 * slope
        torch.testing.assert_close(rho_gradient("kinetic", jacobian), expected)


def test_kinetic_gradient_reaches_the_network():
    v = V.clone().requires_grad_()
    terms = lwd.schedule_objective(lambda z, t, labels: v, SCHEDULE, SPEC, X0, X1, NO_LABEL, TAU)
    (gradient,) = torch.autograd.grad(terms.kinetic, v)
    torch.testing.assert_close(gradient, 1.25**2 * column(2, 5, 2 * 1))  # 2 v_c / d_g


def test_gradient_of_the_state_reaches_rho_when_the_factor_is_detached():
    schedule = polynomial([0.2, -1.0, 0.5])
    terms = lwd.schedule_objective(
        lambda z, t, labels: z, schedule, SPEC, X0.double(), X1.double(), NO_LABEL, TAU.double(), kinetic=0.0
    )
    (gradient,) = torch.autograd.grad(terms.flow, schedule.rho)
    assert gradient.abs().max() > 1e-3


# Auxiliary terms


def test_cosine_term_by_hand():
    """1 - cos over the channels of the whole composite velocity: u = (1, 2, 3), v = (2, 5, 1)."""
    terms = lwd.denoiser_objective(constant, SCHEDULE, SPEC, X0, X1, NO_LABEL, TAU, cosine=0.5)
    expected = 1 - (2 + 10 + 3) / (14**0.5 * 30**0.5)
    assert terms.cosine.item() == pytest.approx(expected, rel=1e-6)
    assert terms.repa.item() == 0
    assert terms.total.item() == pytest.approx(terms.flow.item() + 0.5 * expected, rel=1e-6)


def projecting(tokens: Tensor):
    def denoiser(z: Tensor, t: Tensor, labels: Tensor, *, return_projection: bool = False):
        return (constant(z, t, labels), tokens) if return_projection else constant(z, t, labels)

    return denoiser


def test_repa_by_hand():
    tokens = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])  # [B, N, F]
    features = torch.tensor([[[4.0, 3.0], [0.0, 2.0]]])
    cos = ((1 - 24 / 25) + (1 - 0)) / 2
    mse = (1 + 1 + 1 + 4) / 4
    grid = features.transpose(1, 2).unflatten(2, (1, 2))  # the same as [B, F, h, w]
    for given in (features, grid):
        terms = lwd.denoiser_objective(
            projecting(tokens), SCHEDULE, SPEC, X0, X1, NO_LABEL, TAU, features=given, repa=0.5, cosine=0.0
        )
        assert terms.repa.item() == pytest.approx(cos, rel=1e-6)
        assert terms.total.item() == pytest.approx(terms.flow.item() + 0.5 * cos, rel=1e-6)
        assert repa_alignment(tokens, given, "cos_mse").item() == pytest.approx((cos + mse) / 2, rel=1e-6)


def test_projection_is_only_asked_for_when_needed():
    features = torch.ones(1, 1, 2)
    lwd.denoiser_objective(constant, SCHEDULE, SPEC, X0, X1, NO_LABEL, TAU)
    terms = lwd.denoiser_objective(constant, SCHEDULE, SPEC, X0, X1, NO_LABEL, TAU, features=features, repa=0.0)
    assert terms.repa == 0


# Precision


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_networks_have_float32_losses(autocast):
    """Also when the caller's whole loop runs under autocast, where a matrix product would round to 8 bits."""
    generator = torch.Generator().manual_seed(0)
    x0, x1, v = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(3))
    v = v.bfloat16()
    tau, labels = torch.tensor([0.3, 0.7]), NO_LABEL.expand(2)
    arguments = (SCHEDULE, SPEC, x0, x1, labels, tau)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        terms = lwd.schedule_objective(lambda *_: v, *arguments)
        aux = lwd.denoiser_objective(lambda *_: v, *arguments)
    exact = lwd.schedule_objective(
        lambda *_: v.double(), SCHEDULE, SPEC, x0.double(), x1.double(), labels, tau.double()
    )
    for name in ("total", "flow", "kinetic", "per_group"):
        value = getattr(terms, name)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), getattr(exact, name), rtol=1e-6, atol=0)
    assert aux.total.dtype == aux.cosine.dtype == torch.float32
    assert exact.total.dtype == torch.float64


# Global times


def test_uniform_and_logit_normal_times():
    def drawn(distribution: str) -> Tensor:
        return lwd.sample_tau(200_000, distribution, generator=torch.Generator().manual_seed(0))

    levels = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9])
    torch.testing.assert_close(drawn("uniform").quantile(levels), levels, rtol=0, atol=5e-3)
    normal_quantiles = torch.distributions.Normal(0.0, 1.0).icdf(levels)
    torch.testing.assert_close(drawn("logit_normal").quantile(levels), normal_quantiles.sigmoid(), rtol=0, atol=5e-3)
    assert torch.equal(drawn("uniform"), drawn("uniform"))


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jacobian": "detach"}, "jacobian is 'detach'; choose one of 'detached', 'exact', 'none', 'information'"),
        ({"reduction": "mean"}, "reduction is 'mean'; choose one of 'global', 'groups'"),
        ({"kinetic_reduction": "sum"}, "'global', 'groups'"),
    ],
)
def test_unknown_choices(options, message):
    with pytest.raises(ValueError, match=message):
        schedule_terms(**options)


def test_tensors_that_do_not_match():
    with pytest.raises(ValueError, match="2 texture"):
        lwd.schedule_objective(constant, SCHEDULE, SPEC, X0[:, :2], X1[:, :2], NO_LABEL, TAU)
    with pytest.raises(ValueError, match="they must agree"):
        lwd.schedule_objective(constant, SCHEDULE, SPEC, X0.expand(2, -1, -1, -1), X1, NO_LABEL, TAU)
    with pytest.raises(ValueError, match=r"local times have shape \(1, 3\), expected \[1, 2\]"):
        lwd.schedule_objective(constant, SynchronousSchedule(3), SPEC, X0, X1, NO_LABEL, TAU)
    for objective in (lwd.schedule_objective, lwd.denoiser_objective):
        with pytest.raises(ValueError, match=r"denoiser returned \(1, 1, 1, 1\)"):
            objective(lambda z, t, labels: z[:, :1], SCHEDULE, SPEC, X0, X1, NO_LABEL, TAU)
    with pytest.raises(ValueError, match="REPA features"):
        repa_alignment(torch.ones(1, 2, 3), torch.ones(1, 2, 4))
    with pytest.raises(ValueError, match="repa_loss"):
        lwd.denoiser_objective(constant, SCHEDULE, SPEC, X0, X1, NO_LABEL, TAU, repa_loss="mse")
    with pytest.raises(ValueError, match="distribution"):
        lwd.sample_tau(3, "normal")


# The reference's losses


def check_gradients(model: lwd.LightningDiT, values) -> None:
    ours = dict(model.named_parameters())
    expected = values.under("grad")
    assert len(expected) > 4
    for theirs, gradient in expected.items():
        name = theirs.replace("x_embedder.proj", "x_embedder").replace("t_embedder.", "t_embedders.0.")
        name = name.replace("t_embedder_tex", "t_embedders.0").replace("t_embedder_sem", "t_embedders.1")
        name = name.replace("embedding_table.", "")
        assert (ours[name].grad - gradient).norm() < 1e-5 * gradient.norm(), theirs


def test_losses_and_gradients_of_semantic_first_diffusion(semantic_first):
    """SFD's own training loss: offset 0.3, uncorrected, semantic weight 2, cosine and REPA."""
    frozen, values = semantic_first
    model = lwd.LightningDiT.from_sfd(values.under("state"))
    arguments = [values[name] for name in ("x0", "x1", "y", "tau")]
    schedule, features = OffsetSchedule(0.3), values["repa_features"]
    for i in range(len(features)):
        row = slice(i, i + 1)
        terms = lwd.denoiser_objective(
            frozen, schedule, frozen.spec, *(x[row] for x in arguments), features=features[row], jacobian="none"
        )
        found = torch.stack([terms.flow, terms.cosine, terms.repa])
        expected = torch.stack([values[f"train.{name}"][i] for name in ("loss", "cos_loss", "repa_loss")])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    total = lwd.denoiser_objective(model, schedule, model.spec, *arguments, features=features, jacobian="none").total
    torch.testing.assert_close(total, values["train.total"][0], rtol=1e-5, atol=0)
    total.backward()
    check_gradients(model, values)


def test_losses_and_gradients_of_the_synchronous_lightningdit(one_clock):
    frozen, values = one_clock
    model = lwd.LightningDiT.from_sfd(values.under("state"))
    arguments = [values[name] for name in ("x0", "x1", "y", "tau")]
    terms = [
        lwd.denoiser_objective(
            frozen, SynchronousSchedule(1), frozen.spec, *(x[i : i + 1] for x in arguments), jacobian="none"
        )
        for i in range(4)
    ]
    torch.testing.assert_close(torch.stack([x.flow for x in terms]), values["train.loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.stack([x.cosine for x in terms]), values["train.cos_loss"], rtol=1e-5, atol=0)
    # On one clock the factor is 1: correcting changes nothing.
    total = lwd.denoiser_objective(model, SynchronousSchedule(1), model.spec, *arguments).total
    torch.testing.assert_close(total, values["train.total"][0], rtol=1e-5, atol=0)
    total.backward()
    check_gradients(model, values)
