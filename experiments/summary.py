"""Tables and figures of docs/results/evidence.md, from the files kept beside it.

    python -m experiments.summary

Rewrites the tables of the page in place, each between ``<!-- table NAME -->`` and ``<!-- end -->``, and the figures
beside the kept files. Needs no data: whoever has the repository can make them again.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from experiments import figures
from experiments.collect import KEPT, Evidence, Row, Spread, spread
from experiments.plans import AUTO_SCALES, CONVERGED, EVALUATIONS, FREE_SCALES, LEARNED
from experiments.sets import ENCODERS, SETS
from lwd.files import write_atomically
from lwd.schedules import Schedule

PAGE = Path("docs/results/evidence.md")
LENGTHS = ("half", "paper", "double", "fourfold")
PLAIN = "no-cosine"
LEARNED_ARM = (f"learned:{LEARNED:g}", "")
METRICS = {"fd_judge": 2, "fd_embedded": 0, "precision": 3, "recall": 3, "accuracy": 3, "memorised": 2}
TITLES = {
    "fd_judge": "distance, judge", "fd_embedded": "distance, embedded network", "precision": "precision",
    "recall": "recall", "accuracy": "class accuracy", "memorised": "memorised",
}  # fmt: skip

Table = Callable[[Evidence], str]


def arm(row: Row) -> tuple[str, str]:
    return row["schedule"], row["variant"]


def arm_name(schedule: str, variant: str) -> str:
    """What a table calls an arm: ``learned, λ 0.02``, ``offset 0.3, uncorrected`` ..."""
    if " along " in schedule:
        first, _, second = schedule.partition(" along ")
        return f"{arm_name(first, variant)} times, along {arm_name(second, '')}"
    kind, _, value = schedule.partition(":")
    kind = kind.replace("@", " from the latents called ").replace("learned/", "learned by ")
    kind = {"mix": "mixture"}.get(kind, kind).replace("path/", "best path, weights ")
    value = f", λ {value}" if kind.startswith(("learned", "best path")) else f" {value}"
    return f"{kind}{value}".strip() + (f", {variant}" if variant else "")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def lambdas(evidence: Evidence) -> str:
    """Delay by lambda, set and encoder."""
    columns = [(name, encoder) for name in evidence.sets() for encoder in ENCODERS]
    found = {
        column: spread(
            evidence.some_probes(data=column[0], encoder=column[1], variant="paper"),
            lambda row: row["kinetic"],
            lambda row: row["delay"],
        )
        for column in columns
    }
    columns = [column for column in columns if found[column]]
    kinetics = sorted({kinetic for column in columns for kinetic in found[column]})
    rows = [
        [f"{kinetic:g}", *(found[column][kinetic].text(3) if kinetic in found[column] else "" for column in columns)]
        for kinetic in kinetics
    ]
    return markdown(["λ", *(f"{name}, {encoder}" for name, encoder in columns)], rows)


def probes(evidence: Evidence) -> str:
    """Delay by variant of the probe."""
    name = evidence.sets()[0]
    rows_of = evidence.some_probes(data=name, encoder="middle")
    found = spread(rows_of, lambda row: (row["variant"], row["kinetic"]), lambda row: row["delay"])
    kinetics = (0.0, 0.01, LEARNED, 2 * LEARNED, 4 * LEARNED, 8 * LEARNED)
    variants = dict.fromkeys(variant for variant, _ in found)
    rows = [
        [variant, *(found[variant, k].text(3) if (variant, k) in found else "" for k in kinetics)]
        for variant in sorted(variants, key=lambda v: v != "paper")
    ]
    return markdown([f"{name}, delay at λ =", *(f"{k:g}" for k in kinetics)], rows)


def quality(evidence: Evidence) -> str:
    """All metrics of the arms of each set, without and with AutoGuidance, and the floor."""
    return _compared(evidence, main_arm, "")


def plain(evidence: Evidence) -> str:
    """The same for arms trained alike, with the correction and without the cosine term."""
    return _compared(evidence, lambda row: row["variant"] == PLAIN, PLAIN)


def _compared(evidence: Evidence, chosen: Callable[[Row], bool], variant: str) -> str:
    parts = []
    for name in evidence.sets():
        for scale, words in figures.GUIDANCES.items():
            rows = [row for row in evidence.some_scores(data=name, scale=scale) if chosen(row)]
            if rows:
                judges = sorted({row["judge"] for row in rows})
                floors = [] if scale else [evidence.floors[name][judge] for judge in judges]
                several = f" ({len(judges)} judges, trained alike in different runs)" if len(judges) > 1 else ""
                made = _all_metrics(rows, floors, (LEARNED_ARM[0], variant))
                parts.append(f"{name}, {words}{several}:\n\n{made}")
    return "\n\n".join(parts)


def main_arm(row: Row) -> bool:
    """Whether a row belongs to the comparison of Tables 1 and 2."""
    fixed = row["schedule"] in ("synchronous", "cascaded", "shifted:1,3") and not row["variant"]
    offset = row["schedule"].startswith("offset") and row["variant"] == "uncorrected"
    return arm(row) == LEARNED_ARM or fixed or offset


def _all_metrics(rows: Sequence[Row], floors: Sequence[Row], learned: tuple[str, str]) -> str:
    found = {metric: spread(rows, arm, lambda row, m=metric: row[m]) for metric in METRICS}  # type: ignore[misc]
    better = spread(rows, arm, lambda row: row["fd_judge"])
    lines = []
    for key in sorted(better, key=lambda key: better[key].mean):
        cells = [found[metric][key].text(digits) for metric, digits in METRICS.items()]
        lines.append([arm_name(*key), *cells, versus(rows, key, learned), str(len(better[key].values))])
    if floors:
        floors = [floor | {"memorised": floor["memorised_heldout"]} for floor in floors]  # of copies it says nothing
        cells = [Spread(tuple(floor[m] for floor in floors)).text(digits) for m, digits in METRICS.items()]
        lines.append(["real images", *cells, "", ""])
    return markdown(
        ["schedule", *TITLES.values(), "judge's distance to the learned one's, seed by seed", "seeds"], lines
    )


def versus(rows: Sequence[Row], some: tuple[str, str], reference: tuple[str, str]) -> str:
    """The judge's distance of an arm over that of the reference with the same seed, by the same judge: mean and least
    to most."""
    distances: dict[tuple[str, str], dict[tuple[int, str], float]] = {some: {}, reference: {}}
    for row in rows:
        if arm(row) in distances:
            distances[arm(row)][row["seed"], row["judge"]] = row["fd_judge"]
    ratios = [
        distance / distances[reference][pair]
        for pair, distance in distances[some].items()
        if pair in distances[reference]
    ]
    if not ratios:
        return ""
    between = f" [{min(ratios):.2f}, {max(ratios):.2f}]" if len(ratios) > 1 else ""
    return f"{sum(ratios) / len(ratios):.2f}{between}"


def evaluations(evidence: Evidence) -> str:
    """The judge's distance by solver steps and by training steps."""
    parts = []
    for name in evidence.sets():
        by: dict[str, Row] = {
            **{f"{steps} evaluations": {"steps": steps} for steps in (*EVALUATIONS, 20)},
            f"{CONVERGED} evaluations": {"steps": CONVERGED},
            **{f"{part:g} of the training": {"part": part} for part in (0.25, 0.5)},
            **{f"{n} evaluations, guided": {"steps": n, "scale": (1.5,)} for n in (EVALUATIONS[0], 20, CONVERGED)},
        }
        found = {
            title: spread(
                [row for row in evidence.some_scores(data=name, **wanted) if main_arm(row)],
                arm,
                lambda row: row["fd_judge"],
            )
            for title, wanted in by.items()
        }
        found = {title: column for title, column in found.items() if column}
        arms = list(dict.fromkeys(key for column in found.values() for key in column))
        if len(found) > 2:  # more than with and without guidance
            rows = [[arm_name(*key), *(c[key].text(2) if key in c else "" for c in found.values())] for key in arms]
            parts.append(markdown([name, *found], rows))
    return "\n\n".join(parts)


def others(evidence: Evidence) -> str:
    """The arms that are no part of the main comparison: ablations, other curves, other encoders."""
    parts = []
    for name in evidence.sets():
        for encoder in ENCODERS:
            rows = evidence.some_scores(data=name, encoder=encoder)
            guided = evidence.some_scores(data=name, encoder=encoder, scale=(1.5,))
            if all(main_arm(row) for row in rows) and encoder == "middle":
                continue
            rows = [row for row in rows if row["variant"] != PLAIN]
            keep = [row for row in rows if not main_arm(row) or row["schedule"] in ("synchronous", LEARNED_ARM[0])]
            if keep:
                with_guidance = spread(guided, arm, lambda row: row["fd_judge"])
                unguided = spread(keep, arm, lambda row: row["fd_judge"])
                other = spread(keep, arm, lambda row: row["fd_embedded"])
                lines = [
                    [
                        arm_name(*key), unguided[key].text(2), other[key].text(0),
                        with_guidance[key].text(2) if key in with_guidance else "",
                        versus(keep, key, LEARNED_ARM), str(len(unguided[key].values)),
                    ]
                    for key in sorted(unguided, key=lambda key: unguided[key].mean)
                ]  # fmt: skip
                head = [f"{name}, {encoder} semantic latents", TITLES["fd_judge"], TITLES["fd_embedded"]]
                head += ["judge, AutoGuidance 1.5", "judge's distance to the learned one's", "seeds"]
                parts.append(markdown(head, lines))
    return "\n\n".join(parts)


def scales(evidence: Evidence) -> str:
    """The judge's distance of every arm by the scale of guidance; the best scale of each in bold."""
    parts = []
    for name in evidence.sets():
        rows = [row for row in evidence.some_scores(data=name, scale=None, free=None) if main_arm(row)]
        rows = [row for row in rows if len(row["scale"]) < 2]
        ways: dict[str, tuple[bool, tuple[float, ...]]] = {"none": (False, ())}
        ways |= {f"AutoGuidance {w:g}": (False, (w,)) for w in AUTO_SCALES}
        ways |= {f"CFG {w:g}": (True, (w,)) for w in FREE_SCALES}
        found = spread(rows, lambda row: (arm(row), row["free"], row["scale"]), lambda row: row["fd_judge"])
        ways = {title: way for title, way in ways.items() if any(key[1:] == way for key in found)}
        if len(ways) < 3:
            continue
        lines = []
        for key in sorted(
            {key[0] for key in found}, key=lambda key: min(v.mean for k, v in found.items() if k[0] == key)
        ):
            mine = {title: found[key, *way] for title, way in ways.items() if (key, *way) in found}
            best = {
                min(some, key=lambda title: mine[title].mean)
                for some in ([t for t in mine if kind in t] for kind in ("AutoGuidance", "CFG"))
                if some
            }
            cells = [mine[title].text(2) if title in mine else "" for title in ways]
            lines.append([arm_name(*key), *(f"**{c}**" if t in best else c for t, c in zip(ways, cells, strict=True))])
        parts.append(markdown([name, *ways], lines))
    return "\n\n".join(parts)


def guidance(evidence: Evidence) -> str:
    """Every guidance on the learned and the synchronous schedule."""
    name = evidence.sets()[0]
    arms = [LEARNED_ARM, ("synchronous", "")]
    rows = evidence.some_scores(data=name, scale=None, interval=None, scale_times=None, free=None)
    rows = [row for row in rows if arm(row) in arms]

    def how(row: Row) -> str:
        if not row["scale"]:
            return "none"
        kind = "CFG" if row["free"] else "AutoGuidance"
        scale = ", ".join(f"{w:g}" for w in row["scale"])
        if row["scale_times"]:
            return f"{kind}, w from {scale.replace(', ', ' to ')} along τ"
        if len(row["scale"]) > 1:
            scale = f"texture {row['scale'][0]:g}, semantic {row['scale'][1]:g}"
        within = f", t in [{row['interval'][0]:g}, {row['interval'][1]:g}]" if row["interval"] else ""
        return f"{kind}, w = {scale}{within}"

    found = {metric: spread(rows, lambda row: (arm(row), how(row)), lambda row, m=metric: row[m]) for metric in METRICS}  # type: ignore[misc]
    hows = list(dict.fromkeys(h for _, h in found["fd_judge"]))
    metrics = ("fd_judge", "precision", "recall")
    lines = []
    for each in hows:
        cells = [
            found[m][a, each].text(METRICS[m]) if (a, each) in found[m] else "" for a in arms for m in metrics
        ]  # fmt: skip
        lines.append([each, *cells])
    head = [f"{arm_name(*a)}: {TITLES[m]}" for a in arms for m in metrics]
    return markdown(["guidance", *head], lines) if lines else ""


def cost(evidence: Evidence) -> str:
    """What probes of several lengths find, and how far that is from what the longest finds."""
    lines = []
    for name in evidence.sets():
        rows = evidence.some_probes(data=name, encoder="middle", kinetic=LEARNED)
        longest = {row["seed"]: figures.curve_of(row) for row in rows if row["variant"] == LENGTHS[-1]}
        rows = [
            row | {"apart": _apart(figures.curve_of(row), longest[row["seed"]])}
            for row in rows
            if row["variant"] in LENGTHS and row["seed"] in longest
        ]
        delays = spread(rows, lambda row: row["steps"], lambda row: row["delay"])
        apart = spread(rows, lambda row: row["steps"], lambda row: row["apart"])
        for steps in sorted(delays):
            lines.append(
                [
                    name,
                    str(steps),
                    f"{100 * steps / SETS[name].steps:.0f} %",
                    delays[steps].text(3),
                    apart[steps].text(3),
                ]
            )
    head = ["", "steps of the probe", "as a share of the training's, same batch", "delay"]
    return markdown([*head, "farthest from the longest probe's curve"], lines)


def _apart(one: Schedule, other: Schedule) -> float:
    tau = torch.linspace(0, 1, 501)
    return float((one(tau).t - other(tau).t).abs().max())


def paths(evidence: Evidence) -> str:
    """What curves cost on the error surface, less than or beyond the synchronous one, and the delay of the best."""
    parts = []
    for name in evidence.sets():
        rows = [row for row in evidence.surfaces if row["data"] == name and row["encoder"] == "middle"]
        lines = []
        if not rows:
            continue
        asked = dict.fromkeys((path["weights"], path["kinetic"]) for path in rows[0]["paths"])
        curves = [c for c in dict.fromkeys(path["curve"] for path in rows[0]["paths"]) if c != "synchronous"]
        for weights, kinetic in asked:
            costs, delays = dict[str, list[float]](), list[float]()
            for row in rows:
                mine = [p for p in row["paths"] if (p["weights"], p["kinetic"]) == (weights, kinetic)]
                zero = next(p["cost"] for p in mine if p["curve"] == "synchronous")
                for path in mine:
                    costs.setdefault(path["curve"], []).append(1000 * (path["cost"] - zero))
                    if path["curve"] == "path":
                        delays.append(figures.delay_of(figures.curve_of(path)))
            cells = [Spread(tuple(costs[curve])).text(1) for curve in curves]
            lines.append([weights, f"{kinetic:g}", Spread(tuple(delays)).text(2), *cells])
        shown = [{"path": "best path", "polynomial": "best of the family"}.get(c, c) for c in curves]
        parts.append(markdown([f"{name}: weights", "λ", "delay of the best path", *shown], lines))
    return "\n\n".join(parts)


TABLES: dict[str, Table] = {
    table.__name__: table
    for table in (lambdas, probes, quality, plain, evaluations, others, paths, scales, guidance, cost)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=Path, default=KEPT)
    parser.add_argument("--page", type=Path, default=PAGE)
    chosen = parser.parse_args()
    evidence = Evidence.load(chosen.kept)
    if chosen.page.exists():
        text = chosen.page.read_text(encoding="utf-8")
        for name, table in TABLES.items():
            pattern = re.compile(rf"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
            made = table(evidence)
            text = pattern.sub(lambda found, made=made: f"{found[1]}\n{made}\n\n{found[2]}", text)  # type: ignore[misc]
        write_atomically(chosen.page, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    for path in figures.draw(evidence, chosen.kept):
        print(path)


if __name__ == "__main__":
    main()
