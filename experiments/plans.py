"""What is run, and why: each plan answers one question of docs/results/evidence.md.

Plans share tasks: what several of them name is done once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from experiments.sets import ENCODERS
from experiments.tasks import PROBES, Probe, Score, Surface, Task, Training

KINETICS = (0.0, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.16)
"""From collapse to nearly synchronous; the demo's recipe, and the paper's sweep, lie within."""
LEARNED = 0.02
"""Lambda of the learned arms: the weakest at which no probe collapsed, on any set."""
OFFSETS = ("offset:0.15", "offset:0.3", "offset:0.6")
FIXED = ("synchronous", "cascaded", "shifted:1,3")
EVALUATIONS = (6, 8, 12)
CONVERGED = 60
GUIDED = (1.5,)
AUTO_SCALES = (1.25, 1.35, 1.5, 1.7, 2.0, 3.0)
FREE_SCALES = (1.5, 2.0, 3.0, 5.0)
DETAILED = "fashion-mnist"
"""The set on which more offsets are tried, and arms also scored at few evaluations and early in the training."""
PATHS = ("path/information:0", "path/information:0.02", "path/uniform:0", "path/uniform:0.02")

Plan = Callable[[str, int], Iterator[Task]]


def lambdas(data: str, seed: int) -> Iterator[Task]:
    """Where the schedule collapses and where it settles (Figure 2)."""
    for kinetic in KINETICS:
        yield Probe(data, "middle", seed, kinetic)


def encoders(data: str, seed: int) -> Iterator[Task]:
    """Whether a richer semantic latent delays texture less (Figure 3, Table 3)."""
    for encoder in ENCODERS:
        for kinetic in (0.01, 0.02, 0.04, 0.08):
            yield Probe(data, encoder, seed, kinetic)


def probes(data: str, seed: int) -> Iterator[Task]:
    """Whether a probe finds the same curve from elsewhere, longer, with another rate, batch, degree or estimator."""
    for variant in PROBES:
        if variant != "paper":
            yield Probe(data, "middle", seed, LEARNED, variant)
    for variant in ("exact", "information", "uncorrected"):
        for kinetic in (0.0, 4 * LEARNED):
            yield Probe(data, "middle", seed, kinetic, variant)


def quality(data: str, seed: int) -> Iterator[Task]:
    """Images along the learned schedule and along fixed ones (Tables 1 and 2)."""
    for training in _main_arms(data, seed):
        yield from _scored(training, brief=data != DETAILED)


def converged(data: str, seed: int) -> Iterator[Task]:
    """Whether the order of the arms is one of the solver: three times as many evaluations."""
    for training in _main_arms(data, seed):
        score = Score(data, "middle", seed, training, steps=CONVERGED)
        yield score
        yield replace(score, scale=GUIDED)


def oracle(data: str, seed: int) -> Iterator[Task]:
    """The best of a one-parameter family of curves, by models trained on each, and where the learned ones lie."""
    for share in (0.25, 0.5, 0.75, 1.0):
        yield from _scored(Training(data, "middle", seed, f"mix:{share:g}"), brief=True)
    for kinetic in (0.04, 0.08):
        yield from _scored(Training(data, "middle", seed, f"learned:{kinetic:g}"), brief=True)


def independent(data: str, seed: int) -> Iterator[Task]:
    """One model of independent times, sampled along several schedules (Diffusion Forcing)."""
    yield Surface(data, "middle", seed)
    score = Score(data, "middle", seed, Training(data, "middle", seed, "independent"))
    for along in ("synchronous", f"learned:{LEARNED:g}", "offset:0.3", "cascaded", *PATHS):
        yield replace(score, along=along)
        yield replace(score, along=along, scale=GUIDED)


def objectives(data: str, seed: int) -> Iterator[Task]:
    """Models trained along the curves of other estimators, and of the best paths."""
    for schedule in (*PATHS, *(f"learned/{variant}:{LEARNED:g}" for variant in ("exact", "information"))):
        yield from _scored(Training(data, "middle", seed, schedule), brief=True)


def ablations(data: str, seed: int) -> Iterator[Task]:
    """What makes the difference: the correction, the cosine term."""
    learned = Training(data, "middle", seed, f"learned:{LEARNED:g}")
    yield from _scored(replace(learned, variant="uncorrected"), brief=True)
    yield from _scored(replace(learned, variant="no-cosine"), brief=True)
    yield from _scored(Training(data, "middle", seed, "synchronous", "no-cosine"), brief=True)
    yield from _scored(Training(data, "middle", seed, "offset:0.3"), brief=True)


def plain(data: str, seed: int) -> Iterator[Task]:
    """The curves alone: all arms trained alike, with the correction and without the cosine term."""
    for schedule in (f"learned:{LEARNED:g}", "offset:0.3", *FIXED):
        yield from _scored(Training(data, "middle", seed, schedule, "no-cosine"), brief=True)


def transfer(data: str, seed: int) -> Iterator[Task]:
    """Curves of one encoder's latents used with another's."""
    for encoder in ("weak", "strong"):
        for schedule in (f"learned:{LEARNED:g}", f"learned@middle:{LEARNED:g}", "synchronous"):
            yield from _scored(Training(data, encoder, seed, schedule), brief=True)


def scales(data: str, seed: int) -> Iterator[Task]:
    """Every arm at its own best scale: AutoGuidance and classifier-free guidance, constant."""
    for training in _main_arms(data, seed):
        for free, tried in ((False, AUTO_SCALES), (True, FREE_SCALES)):
            for scale in tried:
                yield Score(data, "middle", seed, training, scale=(scale,), free=free)


def guidance(data: str, seed: int) -> Iterator[Task]:
    """Guidance of one group alone, within intervals and changing along global time."""
    for schedule in (f"learned:{LEARNED:g}", "synchronous"):
        score = Score(data, "middle", seed, Training(data, "middle", seed, schedule))
        for free in (False, True):
            for scale in ((2.0, 1.0), (1.0, 2.0)):
                yield replace(score, scale=scale, free=free)
            for interval in ((0.0, 0.5), (0.25, 0.75), (0.5, 1.0)):
                yield replace(score, scale=(2.0,), interval=interval, free=free)
            yield replace(score, scale=(3.0, 1.0), scale_times=(0.0, 1.0), free=free)
            yield replace(score, scale=(1.0, 3.0), scale_times=(0.0, 1.0), free=free)


PLANS: dict[str, Plan] = {
    plan.__name__: plan
    for plan in (
        lambdas, encoders, quality, converged, scales, guidance, probes, oracle, independent, objectives, ablations,
        plain, transfer,
    )
}  # fmt: skip


def planned(names: Sequence[str], data: Sequence[str], seeds: Sequence[int]) -> list[Task]:
    """The tasks of plans with all they need, each once and after what it needs; seed by seed, so that an interrupted
    run leaves whole seeds."""
    found: dict[Task, None] = {}

    def add(task: Task) -> None:
        for needed in task.needs:
            add(needed)
        found.setdefault(task)

    for seed in seeds:
        for name in names:
            for each in data:
                for task in PLANS[name](each, seed):
                    add(task)
    return list(found)


def _main_arms(data: str, seed: int) -> Iterator[Training]:
    yield Training(data, "middle", seed, f"learned:{LEARNED:g}")
    for offset in OFFSETS if data == DETAILED else ("offset:0.3",):  # as SFD trains: without the correction
        yield Training(data, "middle", seed, offset, "uncorrected")
    for schedule in FIXED:
        yield Training(data, "middle", seed, schedule)


def _scored(training: Training, *, brief: bool = False) -> Iterator[Score]:
    score = Score(training.data, training.encoder, training.seed, training)
    yield score
    yield replace(score, scale=GUIDED)
    if not brief:
        for part in (0.25, 0.5):
            yield replace(score, part=part)
        for steps in EVALUATIONS:
            yield replace(score, steps=steps)
        yield replace(score, steps=EVALUATIONS[0], scale=GUIDED)
