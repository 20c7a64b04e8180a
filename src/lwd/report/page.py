"""The demo's page: sections of text, figures and tables, put together into one HTML file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lwd.files import write_atomically
from lwd.progress import duration
from lwd.report import figures, words
from lwd.report.inputs import Inputs, read_inputs
from lwd.report.style import stylesheet

GRID_COLUMNS = 10


def write_report(directory: Path | str) -> Path:
    """Write ``report.html`` into a demo's directory and return its path.

    Stages of the demo that have not run yet are left out of the page.

    Raises:
        FileNotFoundError: there is no demo in the directory.
        ValueError: a file of it is damaged; the message names it.
        ImportError: matplotlib is missing.
    """
    directory = Path(directory)
    page = render(read_inputs(directory))
    return write_atomically(directory / "report.html", lambda path: path.write_text(page, encoding="utf-8"))


def render(inputs: Inputs) -> str:
    """The whole page."""
    sections = (_results, _sweep, _schedules, _samples, _trajectory, _quality, _training, _what_was_run)
    body = "\n".join(text for make in sections if (text := make(inputs)))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Learning when to denoise: a demo run</title>
<style>
{stylesheet()}
</style>
</head>
<body>
<main>
{_header(inputs)}
{body}
</main>
</body>
</html>
"""


# --- building blocks ---------------------------------------------------------------------------------------------


def _section(name: str, title: str, *parts: str) -> str:
    return f'<section id="{name}">\n<h2>{title}</h2>\n' + "\n".join(part for part in parts if part) + "\n</section>"


def _text(*sentences: str) -> str:
    """A paragraph; the sentences are HTML."""
    return f"<p>{' '.join(sentences)}</p>"


def _plots(*plots: str) -> str:
    return '<div class="plots">' + "".join(f"<figure>{plot}</figure>" for plot in plots) + "</div>"


def _swatch(color: str, dashed: bool = False) -> str:
    return f'<i class="swatch{" dashed" if dashed else ""}" style="--c: var(--{color})"></i>'


def _legend(inputs: Inputs, arms: Iterable[str]) -> str:
    items = "".join(f"<li>{_swatch(arm)}{escape(inputs.title(arm))}</li>" for arm in arms)
    return f'<ul class="legend">{items}</ul>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "numbers") -> str:
    """Cells are HTML; the first of every row is its heading."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>" for row in rows
    )
    head_row = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f'<div class="scroll"><table class="{kind}">{head_row}<tbody>{body}</tbody></table></div>'


def _details(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>"


def _image(uri: str, description: str) -> str:
    return f'<img src="{uri}" alt="{escape(description)}">'


# --- sections ----------------------------------------------------------------------------------------------------


def _header(inputs: Inputs) -> str:
    config = inputs.config
    facts = [str(inputs.setting("data", "name", default=""))]
    facts += [f"{name} {config[name]:g}" for name in ("seed", "budget") if name in config]
    facts += [str(config["started"])[:10]] if "started" in config else []
    facts += [f"lwd {config['version']}"] if "version" in config else []
    paragraphs = "".join(f"<p>{escape(text)}</p>" for text in words.summary(inputs))
    line = "".join(f"<span>{escape(fact)}</span>" for fact in facts if fact)
    return f"""<header>
<h1>Learning when to denoise</h1>
<div class="facts">{line}</div>
<p class="lead">A diffusion model can generate two descriptions of an image at once: <em>texture</em>, from which the
pixels are made, and <em>semantics</em>, the features of a pretrained network. Each may become clean at its own pace.
This demo learns that pace from the data and compares it with two fixed ones.</p>
<div class="summary">{paragraphs}</div>
</header>"""


SCORES = (  # key, heading, direction, is a distance
    ("fd_judge", "Feature distance,<br>independent judge", "low"),
    ("fd_embedded", "Feature distance,<br>embedded network", "low"),
    ("precision", "Precision", "high"),
    ("recall", "Recall", "high"),
    ("accuracy", "Class<br>accuracy", "high"),
)


def _score(inputs: Inputs, key: str, value: float | None) -> str:
    if value is None:
        return "–"
    return words.distance(inputs, key, value) if key.startswith("fd_") else f"{value:.2f}"


def _results(inputs: Inputs) -> str:
    if not inputs.arms:
        return ""
    finals = {arm: found.get("final", {}) for arm, found in inputs.arms.items()}
    best = {}
    for key, _, direction in SCORES:
        values = [final[key] for final in finals.values() if key in final]
        if len(values) > 1:
            best[key] = _score(inputs, key, min(values) if direction == "low" else max(values))
    rows = []
    for arm, final in finals.items():
        row = [f"{_swatch(arm)}{escape(inputs.title(arm))}"]
        for key, _, _ in SCORES:
            shown = _score(inputs, key, final.get(key))
            # Compared as shown: what looks equal is marked equally.
            row.append(f"<b>{shown}</b>" if shown == best.get(key) else shown)
        row.append(str(final.get("evaluations", "–")))
        rows.append(row)
    floor = inputs.results.get("floor", {})
    if floor:
        rows.append(
            [f"{_swatch('muted')}real training images", *(_score(inputs, k, floor.get(k)) for k, _, _ in SCORES), "–"]
        )
    arrows = {"low": "↓", "high": "↑"}
    head = ["Arm", *(f"{title}&nbsp;{arrows[way]}" for _, title, way in SCORES), "Evaluations"]
    some = next(iter(finals.values()))
    count = f"{words.thousands(some['images'])} generated images per arm" if "images" in some else "The generated images"
    return _section(
        "results",
        "Results",
        _table(head, rows),
        '<div class="note">',
        _text(
            f"{count}, compared with held-out real ones. A feature distance measures how far the distribution of a "
            "network's features of generated images is from that of real images; lower is better.",
            "The embedded network also makes the semantic latents, so it is biased towards models that generate those "
            "well. The judge is a second network, trained apart from everything else here on real images and labels; "
            "precision, recall and class accuracy are its, too. The best of each column is bold.",
            "The last row puts as many real training images through the same measurement: about the best one can "
            "hope for." if floor else "",
            "Evaluations are those of the model per image; a guided one also runs the small weak model."
            if "autoguidance" in finals
            else "",
        ),
        "</div>",
    )


def _sweep(inputs: Inputs) -> str:
    runs = inputs.runs
    if not runs:
        return ""
    rows = []
    for position, run in enumerate(runs):
        used, picked = run is inputs.used, run["kinetic"] == inputs.sweep.get("picked")
        color = "learned" if used else figures.ramp_name(position, len(runs))
        outcome = "collapsed" if run["collapsed"] else "stable"
        outcome += ", picked" if picked else ", stands in" if used else ""
        cells = [f"{figures.midpoint(run['schedule']):.2f}", f"{run['delay']:.2f}", outcome]
        name = f"{_swatch(color, run['collapsed'])}{run['kinetic']:g}"
        rows.append([name, *(f"<b>{cell}</b>" if used else cell for cell in cells)])
    history = any("midpoint" in line for run in runs for line in run["history"])
    criterion = inputs.sweep.get("criterion", "")
    return _section(
        "sweep",
        "Learning the schedule",
        _text(
            "A probe is a short training run in which the curve of texture's local time learns together with a "
            "throw-away model. The weight λ charges for fast movement: too small, and the curve runs off to the "
            "extreme of its family (it <em>collapses</em>, dashed); larger values hold it closer to the identity, "
            "where both descriptions move together.",
            escape(words.sweep_outcome(inputs)),
        ),
        _plots(figures.sweep_curves(inputs), *([figures.sweep_history(inputs)] if history else [])),
        _table(["λ", "Texture’s time at τ&nbsp;=&nbsp;0.5", "Delay", "Outcome"], rows, "numbers narrow"),
        _details("What counts as collapsed", _text(escape(criterion))) if criterion else "",
    )


def _schedules(inputs: Inputs) -> str:
    arms = [arm for arm in inputs.arms if arm != "autoguidance"]
    if not arms:
        return ""
    return _section(
        "schedules",
        "Three schedules",
        _text(
            "Local time runs from 0, pure noise, to 1, clean. On the left, when each description is how clean; on "
            "the right, how clean the texture is by the time the semantics have reached a given point. "
            "The synchronous schedule is the diagonal; the offset one, from Semantic-First Diffusion, starts the "
            "texture a fixed delay later.",
        ),
        _legend(inputs, arms),
        _plots(figures.schedule_times(inputs), figures.schedule_paths(inputs)),
    )


def _samples(inputs: Inputs) -> str:
    cards = []
    for arm, arrays in inputs.samples.items():
        columns = min(GRID_COLUMNS, int((arrays["labels"] == arrays["labels"][0]).sum()))
        uri, classes = figures.grid(arrays["images"], arrays["labels"], columns)
        title = "real, held-out images" if arm == "real" else inputs.title(arm)
        names = "".join(f"<span>{escape(inputs.class_name(label))}</span>" for label in classes)
        cards.append(
            f"<figure><figcaption>{_swatch('muted' if arm == 'real' else arm)}{escape(title)}</figcaption>"
            f'<div class="grid"><div class="names" style="--rows: {len(classes)}">{names}</div>'
            f"{_image(uri, f'{title}: {columns} images of each of {len(classes)} classes')}</div></figure>"
        )
    if not cards:
        return ""
    return _section(
        "samples",
        "Samples by class",
        _text(
            "The first images of each class, not selected. The same place in two grids of generated images means the "
            "same class and the same starting noise, so differences are due to the model and its schedule.",
        ),
        f'<div class="plots grids">{"".join(cards)}</div>',
    )


def _trajectory(inputs: Inputs) -> str:
    stored = inputs.trajectory
    if not stored:
        return ""
    label = int(stored["label"])
    rows = (
        ("texture", "Texture, decoded to pixels", "its local time", 0),
        ("semantic", "Semantics, three components as red, green and blue", "its local time", -1),
        ("predicted", "The clean image that the model predicts at this point", "", None),
    )
    count = len(stored["tau"])
    head = "".join(f'<th scope="col">{tau:.2f}</th>' for tau in stored["tau"])
    body = ""
    for name, title, below, group in rows:
        hint = f" <small>(below: {below})</small>" if below else ""
        body += f'<tr class="strip"><th scope="rowgroup" colspan="{count}">{title}{hint}</th></tr><tr>'
        for k in range(count):
            scale = max(1, 96 // stored[name].shape[1])
            image = _image(figures.png(stored[name][k], scale), f"{title}, global time {stored['tau'][k]:.2f}")
            time = "" if group is None else f"{stored['t'][k, group]:.2f}"
            body += f"<td>{image}{time}</td>"
        body += "</tr>"
    return _section(
        "trajectory",
        "One image on its way",
        _text(
            "From noise on the left to an image on the right along the learned schedule, with global time τ on top. "
            "When texture lags, the semantics decide what the picture is about before its pixels emerge.",
            f"The class asked for is <b>{escape(inputs.class_name(label))}</b>; the starting noise is that of the "
            "first image in this class’s row above.",
        ),
        f'<table class="trajectory"><thead><tr class="strip"><th colspan="{count}">Global time τ</th></tr>'
        f"<tr>{head}</tr></thead><tbody>{body}</tbody></table>",
    )


def _quality(inputs: Inputs) -> str:
    parts = []
    for rows, x, title, label in (
        ("by_step", "step", "After how much training", "training step"),
        ("by_evaluations", "evaluations", "With how many model evaluations", "model evaluations per image (log)"),
    ):
        numbers = [[arm, *row.values()] for arm, found in inputs.arms.items() for row in found.get(rows, [])]
        if not numbers:
            continue
        drawn = [
            figures.quality(inputs, rows, x, key, name, label)
            for key, name in (("fd_judge", "Independent judge"), ("fd_embedded", "Embedded network"))
        ]
        shown = [arm for arm, found in inputs.arms.items() if found.get(rows) or rows == "by_evaluations"]
        table = _table(
            ["Arm", label.removesuffix(" (log)").capitalize(), "Independent judge", "Embedded network"],
            [
                [
                    f"{_swatch(arm)}{escape(inputs.title(arm))}",
                    words.thousands(row[x]),
                    *(_score(inputs, key, row[key]) for key in ("fd_judge", "fd_embedded")),
                ]
                for arm, found in inputs.arms.items()
                for row in sorted(found.get(rows, []), key=lambda row: row[x])
            ],
        )
        explained = {
            "by_step": "Images drawn from the averaged model at several points of its training, all with the same "
            "solver. A line that lies lower learns faster.",
            "by_evaluations": "The finished models, sampled in fewer or more solver steps. A schedule that is easy to "
            "follow keeps its quality with few evaluations.",
        }[rows]
        parts += [f"<h3>{title}</h3>", _text(explained), _legend(inputs, shown), _plots(*drawn)]
        parts.append(_details("The numbers", table))
    if not parts:
        return ""
    return _section("quality", "Quality", *parts)


def _training(inputs: Inputs) -> str:
    drawn = [
        figures.training(inputs, metric, title)
        for metric, title in (("loss_texture", "Texture"), ("loss_semantic", "Semantics"))
        if any(metric in line for lines in inputs.training.values() for line in lines)
    ] or [figures.training(inputs, "flow", "Flow loss")] * bool(inputs.training)
    if not drawn:
        return ""
    return _section(
        "training",
        "Training",
        _text(
            "The error of the predicted velocities during training, by description. Compare shapes, not levels: each "
            "schedule asks for predictions at other combinations of noise, some of them easier."
        ),
        _legend(inputs, inputs.training),
        _plots(*drawn),
    )


def _what_was_run(inputs: Inputs) -> str:
    config = inputs.config
    machine, versions = config.get("machine", {}), config.get("versions", {})
    rows = [[name.capitalize(), escape(str(config[name]))] for name in ("started", "seed", "budget") if name in config]
    if "command" in config:
        rows.insert(0, ["Command", f"<code>{escape(config['command'])}</code>"])
    if machine:
        rows += [[name.capitalize(), escape(str(value))] for name, value in machine.items()]
    if versions:
        rows.append(["Versions", escape(", ".join(f"{name} {value}" for name, value in versions.items()))])
    parts = [_table([], rows, "facts-table")] if rows else []

    trained = []
    for arm, found in inputs.arms.items():
        speeds = [line["images_per_second"] for line in inputs.training.get(arm, []) if "images_per_second" in line]
        seconds = found.get("train_seconds")
        if arm != "autoguidance":
            trained.append(
                [
                    f"{_swatch(arm)}{escape(inputs.title(arm))}",
                    words.thousands(found["steps"]) if "steps" in found else "–",
                    f"{found['parameters'] / 1e6:.2f} M" if "parameters" in found else "–",
                    words.thousands(sorted(speeds)[len(speeds) // 2]) if speeds else "–",
                    duration(seconds) if seconds else "–",
                ]
            )
    if trained:
        parts += ["<h3>Models</h3>", _table(["Arm", "Steps", "Parameters", "Images per second", "Training"], trained)]
    seconds = inputs.results.get("seconds", {})
    if seconds:
        lines = [[escape(stage), duration(value)] for stage, value in seconds.items()]
        lines.append(["all", f"<b>{duration(sum(seconds.values()))}</b>"])
        parts += ["<h3>Durations</h3>", _table(["Stage", "Time"], lines, "numbers narrow")]
    settings = config.get("settings", {})
    if settings:
        listed = "".join(
            f"<h4>{escape(name.capitalize())}</h4>"
            + _table([], [[escape(key), escape(value)] for key, value in _flat(values)], "facts-table")
            for name, values in settings.items()
            if values
        )
        parts.append(_details("All settings", listed))
    return _section("run", "What was run", *parts) if parts else ""


def _flat(values: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, text)."""
    if not isinstance(values, Mapping):
        return [(prefix.rstrip("."), values if isinstance(values, str) else json.dumps(values, ensure_ascii=False))]
    return [line for name, value in values.items() for line in _flat(value, f"{prefix}{name}.")]
