"""Numbers as text, and the summary in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lwd.report.read import DemoFiles
from lwd.report.style import TITLES

JUDGES = {"fd_embedded": "the embedded network", "fd_judge": "the independent judge"}
PHRASES = {
    "learned": "the learned schedule",
    "offset": "SFD’s offset",
    "synchronous": "the synchronous schedule",
}
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def decimals(values: Sequence[float]) -> int:
    """Decimals that give the smallest of these values three significant digits, so that a column aligns."""
    sizes = [abs(value) for value in values if value and math.isfinite(value)]
    return 2 if not sizes else min(3, max(0, 2 - math.floor(math.log10(min(sizes)))))


def number(value: float, places: int) -> str:
    return f"{value:,.{places}f}"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def span(seconds: float) -> str:
    """``"48 s"``, ``"2 min 31 s"``, ``"1 h 05 min"``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min"


def count(amount: int) -> str:
    return _NUMBERS[amount] if amount < len(_NUMBERS) else f"{amount:,}"


def listing(words: Sequence[str]) -> str:
    """``"a"``, ``"a and b"``, ``"a, b and c"``."""
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def title(files: DemoFiles, arm: str) -> str:
    given: str = files.arms.get(arm, {}).get("title") or TITLES.get(arm, arm)
    return given


def noun(group: str) -> str:
    """ "texture", "semantic group": how a sentence calls a group."""
    return group if group == "texture" else f"{group} group"


def summary(files: DemoFiles) -> list[str]:
    """What was learned and how the arms did, whichever way it came out; one string per paragraph."""
    paragraphs = [
        "The texture and the meaning of an image need not be denoised at the same pace. In this demo a schedule "
        "is learned that decides which of them comes when; networks are trained on it and on fixed schedules, "
        "and what they draw is judged."
    ]
    if files.sweep and files.sweep["runs"]:
        paragraphs.append(" ".join(describe_sweep(files.sweep)))
    paragraphs.append(" ".join(describe_quality(files)) if files.arms else "The run has no results yet.")
    return paragraphs


def describe_sweep(sweep: Mapping[str, Any]) -> list[str]:
    runs, picked = sweep["runs"], sweep["picked"]
    collapsed = [f"{run['kinetic']:g}" for run in runs if run["collapsed"]]
    probes = f"{count(len(runs))} probe{'s' * (len(runs) != 1)}"
    if not collapsed:
        sentences = [f"Of {probes}, none collapsed to the extreme schedule."]
    elif len(collapsed) == len(runs):
        sentences = [f"All of {probes} collapsed to the extreme schedule."]
    else:
        sentences = [
            f"Of {probes}, {count(len(collapsed))} collapsed to the extreme schedule "
            f"(λ\u00a0=\u00a0{listing(collapsed)})."
        ]
    if picked is None:
        strongest = max(run["kinetic"] for run in runs)
        return [*sentences, f"No λ was stable, so the strongest, {strongest:g}, stands in."]
    chosen = next(run for run in runs if run["kinetic"] == picked)
    first, *_, last = (noun(name) for name in chosen["schedule"]["groups"])
    middle = midpoint(chosen["schedule"])
    sentences.append(f"The weakest stable one, λ\u00a0=\u00a0{picked:g}, was picked.")
    if middle[-1] - middle[0] < 0.02:
        sentences.append(f"Its curve is all but the identity: {first} and {last} are denoised together.")
    else:
        sentences.append(
            f"On its curve the {first} waits for the {last}: half-way, when the {last} has reached local time "
            f"{middle[-1]:.2f}, the {first} has reached {middle[0]:.2f}."
        )
    return sentences


def midpoint(schedule: Mapping[str, Any]) -> list[float]:
    import torch

    from lwd.schedules import schedule_from_dict

    with torch.no_grad():
        times: list[float] = schedule_from_dict(dict(schedule))(torch.tensor([0.5])).t[0].tolist()
    return times


def describe_quality(files: DemoFiles) -> list[str]:
    unguided = {name: arm for name, arm in files.arms.items() if arm.get("guidance") is None}
    sentences = []
    if len(unguided) > 1:
        steps = {arm["steps"] for arm in unguided.values()}
        images = {round(arm["final"]["images"]) for arm in unguided.values()}
        budget = f", after {max(steps):,} training steps each" if len(steps) == 1 else ""
        judged = f", judged on {max(images):,} images each" if len(images) == 1 else ""
        verdicts = "; ".join(_verdict(files, unguided, key) for key in JUDGES)
        sentences.append(f"Without guidance{budget}{judged}: {verdicts}.")
        if "learned" in unguided:
            wins = sum("learned" in _leaders(unguided, key) for key in JUDGES)
            by = ("neither judge", "one judge of the two", "both judges")[wins]
            sentences.append(f"So the learned schedule comes first by {by}.")
    for name, arm in files.arms.items():
        if name == "autoguidance" and "learned" in files.arms:
            pairs = {judge: (files.arms["learned"]["final"][key], arm["final"][key]) for key, judge in JUDGES.items()}
            changes = [f"from {_from_to(*pair)} by {judge}" for judge, pair in pairs.items()]
            sentences.append(f"AutoGuidance takes the learned schedule’s feature distance {listing(changes)}.")
    sentences.append(
        "Each model was trained once, with one seed: small differences may be chance, and none is claimed to be "
        "significant."
    )
    return sentences


def _from_to(a: float, b: float) -> str:
    places = decimals([a, b])
    return f"{number(a, places)} to {number(b, places)}"


def _leaders(arms: Mapping[str, Any], key: str) -> list[str]:
    """The arms whose value, as printed, is the lowest: usually one."""
    values = {name: arm["final"][key] for name, arm in arms.items()}
    places = decimals(list(values.values()))
    lowest = number(min(values.values()), places)
    return [name for name, value in values.items() if number(value, places) == lowest]


def _verdict(files: DemoFiles, arms: Mapping[str, Any], key: str) -> str:
    values = {name: arm["final"][key] for name, arm in arms.items()}
    places = decimals(list(values.values()))
    leaders = _leaders(arms, key)
    phrase = {name: PHRASES.get(name, title(files, name)) for name in values}
    rest = [name for name in sorted(values, key=lambda name: values[name]) if name not in leaders]
    others = listing([f"{phrase[name]} {number(values[name], places)}" for name in rest])
    verb = "is best" if len(leaders) == 1 else "are level"
    lowest = number(values[leaders[0]], places)
    return (
        f"by {JUDGES[key]}, {listing([phrase[name] for name in leaders])} {verb} "
        f"(feature distance {lowest}{'; ' + others if others else ''})"
    )
