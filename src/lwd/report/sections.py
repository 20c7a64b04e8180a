"""The sections of the page: each takes the demo's files and gives HTML, empty where the run lacks what it shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from itertools import chain, repeat

import numpy as np

from lwd.report import figures, images, tables
from lwd.report.read import DemoFiles
from lwd.report.style import MARKERS, TITLES, variable
from lwd.report.words import capitalised, noun, span, title

SAMPLES_PER_CLASS = 6
MOST_CLASSES = 12


def figure(panels: Iterable[str], caption: str, legend: str = "", kind: str = "panels") -> str:
    drawn = "".join(f"<div>{panel}</div>" for panel in panels)
    return f'<figure>{legend}<div class="{kind}">{drawn}</div><figcaption>{caption}</figcaption></figure>\n'


SHAPES = {
    "o": '<circle cx="15" cy="7" r="4.5"/>',
    "s": '<rect x="11" y="3" width="8" height="8"/>',
    "^": '<path d="M15 2l5 9h-10z"/>',
    "D": '<path d="M15 1.5l5.5 5.5-5.5 5.5-5.5-5.5z"/>',
}
"""The markers of the figures, for legends."""


def legend(entries: Iterable[tuple[str, str]], marks: Iterable[str] = ()) -> str:
    """Line samples with their names.

    Args:
        entries: (style of an SVG line, HTML) each.
        marks: a shape on each line, if any.
    """
    items = "".join(
        f'<li><svg viewBox="0 0 30 14" aria-hidden="true"><g style="{style}">'
        f'<line x1="1" x2="29" y1="7" y2="7"/>{mark}</g></svg>{name}</li>'
        for (style, name), mark in zip(entries, chain(marks, repeat("")), strict=False)
    )
    return f'<ul class="legend">{items}</ul>\n'


def arm_legend(files: DemoFiles, arms: Iterable[str], *, marked: bool = False) -> str:
    names = list(arms)
    style = "stroke:{0};fill:{0};stroke-width:3" if marked else "stroke:{0};stroke-width:3.5"
    entries = [(style.format(variable(arm)), escape(title(files, arm))) for arm in names]
    return legend(entries, [SHAPES.get(MARKERS.get(arm, "o"), "") for arm in names] if marked else ())


# --- schedules -----------------------------------------------------------------------------------------------------


def sweep(files: DemoFiles) -> str:
    if not files.sweep or not files.sweep["runs"]:
        return ""
    runs, picked = files.sweep["runs"], files.sweep["picked"]
    first, *_, last = (escape(noun(name)) for name in runs[0]["schedule"]["groups"])
    burn_in = files.settings.get("probe", {}).get("burn_in")
    entries = []
    for run, rank in zip(runs, figures.ranks(runs), strict=True):
        style = figures.run_style(run, picked, rank)
        state = "picked" if run["kinetic"] == picked else "collapsed" if run["collapsed"] else ""
        stroke = (
            "stroke:var(--learned);stroke-width:4"
            if run["kinetic"] == picked
            else f"stroke:var(--ink);stroke-width:2.2;opacity:{style['alpha']:.2f}"
            + (";stroke-dasharray:6 3.5" if run["collapsed"] else "")
        )
        entries.append((stroke, f"λ = {run['kinetic']:g} <small>{state}</small>"))
    burned = f" After {burn_in:,} steps the curve’s parameters are averaged." if burn_in else ""
    caption = (
        f"First plot: the {first}’s curve that each λ led to; the {last} runs on the global time itself, the "
        "dotted diagonal. Dashed curves ran off to the extreme of the family, where nearly everything happens at "
        "the end; larger λ keeps the curve closer to the diagonal. Second plot: the middle of each curve while "
        f"its probe ran: a flat line has converged.{burned}"
    )
    criterion = files.sweep.get("criterion", "")
    return (
        f"<p>A schedule says how far each part of the representation has come, from noise (0) to image (1), at every "
        f"moment of the global time τ. A short probe trains a network and the curve of the {first} together. The "
        "weight λ of a penalty on fast motion decides how far the curve may bend, so several values are tried.</p>"
        + figure(
            [
                figures.panel(*figures.sweep_curves(files.sweep)),
                figures.panel(*figures.sweep_convergence(files.sweep, burn_in)),
            ],
            caption,
            legend(entries),
        )
        + (f"<details><summary>How λ was picked</summary><p>{escape(criterion)}</p></details>" if criterion else "")
    )


def curves(files: DemoFiles) -> str:
    arms = {name: arm for name, arm in files.arms.items() if arm.get("guidance") is None}
    if not arms:
        return ""
    first, *_, last = (escape(noun(name)) for name in next(iter(arms.values()))["schedule"]["groups"])
    dash = [("stroke:var(--muted);stroke-width:2.4", f"<small>{first}</small>")]
    dash += [("stroke:var(--muted);stroke-width:2.4;stroke-dasharray:4 4", f"<small>{last}</small>")]
    entries = [(f"stroke:{variable(arm)};stroke-width:3.5", escape(title(files, arm))) for arm in arms]
    return (
        f"<p>All schedules start both groups as noise and end with both as data; they differ in how long the {first} "
        f"waits for the {last}.</p>"
        + figure(
            [figures.arm_clocks(arms), figures.arm_paths(arms)],
            f"First plot: how far the {first} (solid) and the {last} (dashed) have come at each moment. Second "
            f"plot: the same without the clock, the {first} against the {last}: the further below the diagonal, "
            f"the more of the {last} is settled before the {first} takes shape.",
            legend(entries + dash),
        )
    )


# --- images --------------------------------------------------------------------------------------------------------


def samples(files: DemoFiles) -> str:
    names = [name for name in TITLES if name in files.samples]
    names += [name for name in files.samples if name not in [*TITLES, "real"]]
    if not names:
        return ""
    labels = files.samples[names[0]]["labels"]
    classes = [int(label) for label in np.unique(labels)][:MOST_CLASSES]
    shown = [*names, *(["real"] if "real" in files.samples else [])]
    least = min(int((files.samples[name]["labels"] == c).sum()) for name in shown for c in classes)
    if least == 0:
        return ""
    rows = "".join(f"<li>{escape(_class_name(files, label))}</li>" for label in classes)
    cells = ""
    for name in shown:
        drawn = files.samples[name]
        sheet = images.grid(images.by_class(drawn["images"], drawn["labels"], classes, min(least, SAMPLES_PER_CLASS)))
        head = "Real images, held out" if name == "real" else capitalised(title(files, name))
        swatch = "" if name == "real" else f'<span class="swatch" style="--swatch:{variable(name)}"></span>'
        cells += (
            f'<figure><h3>{swatch}{escape(head)}</h3><div class="classes"><ol>{rows}</ol>'
            f'<img alt="Images by class: {escape(head)}" src="{images.png_uri(sheet)}" '
            f'width="{sheet.shape[1]}" height="{sheet.shape[0]}"></div></figure>\n'
        )
    return (
        "<p>One row per class, nothing selected by hand: the first images of each class. Equal places in the "
        "grids of the models have equal seeds, so they start from the same noise and ask for the same class. The "
        "real images are "
        f'others at every place.</p><div class="grids">{cells}</div>\n'
    )


def _class_name(files: DemoFiles, label: int) -> str:
    return files.class_names[label] if label < len(files.class_names) else f"class {label}"


def trajectory(files: DemoFiles) -> str:
    if files.trajectory is None:
        return ""
    found = files.trajectory
    tau, t = found["tau"], found["t"]
    schedule = files.arms.get("learned", {}).get("schedule", {})
    first, *_, last = (escape(noun(name)) for name in schedule.get("groups", ["texture", "semantic"]))
    cells = "<h3>global time τ</h3>" + "".join(f"<span>{value:.2f}</span>" for value in tau)
    rows: list[tuple[str, str, str, int | None]] = [
        (last, "first three channels as red, green, blue", "semantic", -1),
        (first, "as pixels", "texture", 0),
        ("predicted image", "if it ended now", "predicted", None),
    ]
    for heading, explanation, key, group in rows:
        cells += f"<h3>{heading}<small>{explanation}</small></h3>"
        for k, pixels in enumerate(found[key]):
            clock = ""
            if group is not None:
                part = f"--swatch:var(--learned);--part:{100 * t[k, group]:.1f}%"
                clock = f'<i class="clock" style="{part}"></i>{t[k, group]:.2f}'
            cells += (
                f'<span><img alt="{heading} at τ = {tau[k]:.2f}" src="{images.png_uri(pixels)}" '
                f'width="{pixels.shape[1]}" height="{pixels.shape[0]}">{clock}</span>'
            )
    label = escape(_class_name(files, int(found["label"])))
    leads = float((t[:, -1] - t[:, 0]).max()) >= 0.02
    order = f"The {last} goes ahead and the {first} follows." if leads else f"The {last} and the {first} go together."
    return (
        f"<p>The learned model draws one image of the class “{label}”. Time runs from left to right. Under each "
        "picture stands its local time: 0 is noise, 1 is finished.</p>"
        f'<figure><div class="trajectory" style="--columns:{len(tau)}">{cells}</div>'
        f"<figcaption>{order} The last row is the image that the network would arrive at if it went straight on from "
        "there.</figcaption></figure>\n"
    )


# --- scores --------------------------------------------------------------------------------------------------------

BIAS = (
    "A feature distance is the Fréchet distance between the features of drawn and of real images; lower is "
    "better, and it compares only with distances in the same network and on equally many images. The embedded "
    "network also made the semantic latents that the models learn to draw, so it is biased in favour of what "
    "follows them closely. The judge is a second network that had no part in any of this: the independent opinion."
)


def quality(files: DemoFiles) -> str:
    if not files.arms:
        return ""
    floor = files.results.get("floor") or {}
    judges = {"fd_embedded": "embedded network", "fd_judge": "independent judge"}
    body = f"<p>{BIAS}</p>"
    for series, x, xlabel, caption in (
        (
            "by_step",
            "step",
            "training step",
            "The distance of each model’s images after a part of its training and at the end. The dotted line is the "
            "distance of as many real training images: nothing drawn should be expected below it.",
        ),
        (
            "by_evaluations",
            "evaluations",
            "model evaluations per image",
            "The finished models with fewer steps of the solver: further left is faster. With guidance, each "
            "evaluation runs the weak model too.",
        ),
    ):
        if not any(arm.get(series) for arm in files.arms.values()):
            continue
        panels = [
            figures.quality(
                files.arms, key, series, x, floor.get(key), title=f"feature distance, {judge}", xlabel=xlabel
            )
            for key, judge in judges.items()
        ]
        body += figure(panels, caption, arm_legend(files, files.arms, marked=True))
    return body


def results(files: DemoFiles) -> str:
    if not files.arms:
        return ""
    finals = [arm["final"] for arm in files.arms.values()]
    counted = sorted({f"{round(final['images']):,}" for final in finals})
    solvers = sorted({final["solver"] for final in finals})
    floor = files.results.get("floor")
    note = (
        f"Judged on {' or '.join(counted)} images per model, drawn with {' or '.join(solvers)}. Precision: the "
        "share of drawn images that lie among real ones in the judge’s features; recall: the share of real "
        "images that lie among drawn ones. Class accuracy: how often the judge sees the class that was asked "
        "for. Bold is the best of the column."
    )
    if "offset" in files.arms:
        note += " The offset model is trained as SFD trains, with its uncorrected loss."
    if floor:
        note += (
            f" The last row scores {round(floor['images']):,} real training images in the same way: the floor that "
            "sampling noise alone sets."
        )
    return f'{tables.results_table(files)}<p class="note" style="margin-top:14px">{note}</p>\n'


def training(files: DemoFiles) -> str:
    logs = {name: files.logs[name] for name in (*TITLES, *files.logs) if files.logs.get(name)}
    keys = {key: None for rows in logs.values() for key in rows[-1] if key.startswith("loss")}
    if not keys:
        return ""
    ordered = sorted(keys, key=lambda key: key != "loss")
    panels = [
        figures.training_curve(
            logs, key, "loss" if key == "loss" else f"error of the {noun(key.removeprefix('loss_'))}"
        )
        for key in ordered
    ]
    return figure(
        panels,
        "What each model minimised, and the squared error of each group’s velocity in it. Losses of different "
        "schedules are not comparable: each schedule asks for other mixtures of local times, easier or harder "
        "ones. They show whether training ran smoothly and had come to rest.",
        arm_legend(files, logs),
        kind="panels three" if len(panels) > 2 else "panels",
    )


# --- what was run --------------------------------------------------------------------------------------------------


def run(files: DemoFiles) -> str:
    config, settings = files.config, files.settings
    demo = settings.get("demo", {})
    seconds: Mapping[str, float] = files.results.get("seconds") or {}
    machine, versions = config.get("machine", {}), config.get("versions", {})
    arms = [name for name in files.arms if files.arms[name].get("guidance") is None]
    parameters = {f"{files.arms[name]['parameters'] / 1e6:.2f} million" for name in arms}
    about = {
        "command": config.get("command"),
        "started": str(config.get("started", "")).replace("T", " "),
        "seed": demo.get("seed", config.get("seed")),
        "budget": demo.get("budget", config.get("budget")),
        "parameters": " or ".join(sorted(parameters)) + " per model" if parameters else None,
        "device": machine.get("device"),
        "processor": machine.get("processor"),
        "cores": machine.get("cores"),
        "platform": machine.get("platform"),
        **{name: version for name, version in versions.items()},
    }
    body = f"<div><h3>Run</h3>{tables.facts(about)}</div>"
    if seconds:
        durations = {name: span(value) for name, value in seconds.items()} | {"in all": span(sum(seconds.values()))}
        body += f"<div><h3>Durations</h3>{tables.facts(durations)}</div>"
    details = "".join(
        f"<details><summary>{escape(capitalised(name))}</summary>{tables.facts(tables.flattened(values))}</details>"
        for name, values in settings.items()
        if isinstance(values, dict)
    )
    return f'<div class="columns">{body}</div><div class="settings"><h3>All settings</h3>{details}</div>\n'
