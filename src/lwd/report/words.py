"""What the numbers say, in sentences. Nothing here is claimed beyond the one run that was made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from lwd.report.figures import midpoint
from lwd.report.inputs import UNGUIDED, Inputs

JUDGES = {"fd_judge": "the independent judge", "fd_embedded": "the embedded network"}


def joined(parts: Sequence[str]) -> str:
    """``"a"``, ``"a and b"``, ``"a, b and c"``."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def decimals(values: Iterable[float]) -> int:
    """Places that show the smallest of the values with three digits."""
    smallest = min((abs(value) for value in values if value), default=1.0)
    return min(4, max(0, 2 - math.floor(math.log10(smallest))))


def distance(inputs: Inputs, name: str, value: float) -> str:
    """A feature distance with the same places everywhere on the page."""
    finals = [arm["final"][name] for arm in inputs.arms.values() if name in arm.get("final", {})]
    return f"{value:.{decimals(finals or [value])}f}"


def thousands(number: float) -> str:
    return f"{number:,.0f}"


def summary(inputs: Inputs) -> list[str]:
    """The page's opening: what was learned, who did best by which judge, and what this cannot say."""
    return [text for text in (_about_schedule(inputs), _about_quality(inputs), _about_limits(inputs)) if text]


def sweep_outcome(inputs: Inputs) -> str:
    """Which lambdas collapsed and which was taken."""
    used = inputs.used
    if used is None:
        return ""
    collapsed = [f"{run['kinetic']:g}" for run in inputs.runs if run["collapsed"]]
    if inputs.sweep.get("picked") is None:
        which = "every probe" if len(collapsed) == len(inputs.runs) else "the probe with the strongest λ"
        return (
            f"In this run {which} collapsed, so no λ qualifies; the strongest, {used['kinetic']:g}, stands in for the "
            "rest of the page. Longer probes or larger values of λ would be needed."
        )
    if not collapsed:
        return f"No probe collapsed, so the weakest λ of the sweep was taken, {used['kinetic']:g}."
    return f"Probes with λ = {joined(collapsed)} collapsed; the weakest stable value, {used['kinetic']:g}, was taken."


def _about_schedule(inputs: Inputs) -> str:
    used = inputs.used
    if used is None:
        return ""
    half = midpoint(used["schedule"])
    if half > 0.47:
        kind = "a schedule close to synchronous"
    elif half > 0.1:
        kind = "a schedule in which texture follows semantics"
    else:
        kind = "a schedule that leaves texture almost untouched until semantics are done"
    learned = f"At λ = {used['kinetic']:g} the probe learned {kind}: with semantics half-way, texture is at {half:.2f}."
    count = len(inputs.runs)
    opening = "One short probe was run." if count == 1 else f"{count} short probes, one for each λ, were run."
    return f"{opening} {sweep_outcome(inputs)} {learned}"


def ranking(inputs: Inputs, name: str) -> list[tuple[float, str]]:
    """(distance, arm) of the unguided arms, best first."""
    finals = {arm: inputs.arms[arm]["final"] for arm in UNGUIDED if arm in inputs.arms}
    return sorted((final[name], arm) for arm, final in finals.items() if name in final)


def _about_quality(inputs: Inputs) -> str:
    orders = {name: found for name in JUDGES if (found := ranking(inputs, name))}
    sentences = []
    for name, order in orders.items():
        listed = [f"{inputs.title(arm)} {distance(inputs, name, value)}" for value, arm in order]
        sentences.append(f"By {JUDGES[name]}, the feature distances of the arms are, best first: {joined(listed)}.")
    if len(orders) == 2 and all(len(order) > 1 for order in orders.values()):
        sentences.append(_verdict(inputs, {name: [arm for _, arm in order] for name, order in orders.items()}))
    guided = inputs.arms.get("autoguidance", {}).get("final", {})
    plain = inputs.arms.get("learned", {}).get("final", {})
    changes = []
    for name in JUDGES:
        if name in guided and name in plain:
            numbers = [distance(inputs, name, final[name]) for final in (plain, guided)]
            changes.append(f"from {numbers[0]} to {numbers[1]} by {JUDGES[name]}")
    if changes:
        sentences.append(f"AutoGuidance on top of the learned schedule takes the distance {joined(changes)}.")
    return " ".join(sentences)


def _verdict(inputs: Inputs, orders: dict[str, list[str]]) -> str:
    judge, embedded = orders["fd_judge"], orders["fd_embedded"]
    if judge == embedded:
        return f"Both put {_with_article(inputs, judge[0])} first and agree on the order behind it."
    if judge[0] == embedded[0]:
        return f"Both put {_with_article(inputs, judge[0])} first; they differ on the order behind it."
    return (
        f"The two disagree: {_with_article(inputs, judge[0])} is first by one, "
        f"{_with_article(inputs, embedded[0])} by the other."
    )


def _with_article(inputs: Inputs, arm: str) -> str:
    title = inputs.title(arm)
    return f"the {title}" if title.endswith("schedule") else title


def _about_limits(inputs: Inputs) -> str:
    if not inputs.arms:
        return "The arms have not been judged yet: this page shows an unfinished demo." if inputs.config else ""
    text = "Every arm was trained once, with one seed; differences between arms may be chance."
    budget = inputs.config.get("budget", 1.0)
    if budget < 1:
        text += f" The budget was {budget:g} of the standard demo, so read the images and distances as a rehearsal."
    return text
