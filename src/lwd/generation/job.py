"""Sets of generated images: any number of processes, resumable, the same images whatever was interrupted.

The images are cut into parts before anything is drawn; processes do not talk to each other, each makes every n-th part
and leaves a record of it, and the first puts the parts together when all of them are there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lwd.data.sharding import Share
from lwd.files import differences, read_json
from lwd.generation.config import SampleConfig
from lwd.generation.draw import Drawer
from lwd.generation.store import PART, Form, SampleStore, StoreWriter, batches_of
from lwd.metrics import MetricsLog
from lwd.pipeline import Pipeline
from lwd.progress import Progress
from lwd.runs import write_run_config


def sample_to_directory(
    pipeline: Pipeline,
    directory: Path,
    config: SampleConfig,
    *,
    images: int,
    classes: Sequence[int] = (),
    form: Form = "png",
    batch: int = 64,
    part: int = PART,
    share: Share | None = None,
    title: str = "sample",
) -> dict[str, Any] | None:
    """Draw a set of images into `directory`, or go on with it; returns ``samples.json``'s content.

    Image i depends on the model, `config`, its class and i alone. A process that is not the first returns None when
    its parts are done.

    Args:
        classes: gone through in turn; all of them, so that the set is balanced, by default.
        form: see `lwd.generation.store`.
        batch: images at a time.
        part: images per part.
        share: this process's part of the work; by default as torchrun or srun set it.

    Raises:
        ValueError: `directory` holds, or was begun with, other images; a class out of range; no images.
        OSError: the disk is full; parts that are done stay.
    """
    if images < 1 or batch < 1:
        raise ValueError(f"images and batch must be at least 1, got {images} and {batch}")
    share = share or Share.from_environment()
    drawer = Drawer(pipeline, config, classes)
    store = SampleStore(directory, form, [drawer.label(i) for i in range(images)], part=part)
    origin = config.describe(pipeline)
    plan = {"images": images, "classes": drawer.classes, "form": form, "part": part, "origin": origin}
    if (finished := _compare(directory, plan)) is not None:
        return finished
    if share.rank == 0:
        write_run_config(directory, pipeline.device, **plan)
        pipeline.schedule.save(directory / "schedule.json")
    log = MetricsLog(directory if share.rank == 0 else None)
    missing = store.missing(share.rank, share.world)
    todo = sum(len(store.parts[n]) for n in missing)
    mine = sum(len(store.parts[n]) for n in range(share.rank, len(store.parts), share.world))
    start, drawn, spent = time.perf_counter(), 0, 0.0
    with StoreWriter(store) as writer, Progress(title, mine, done=mine - todo, unit="image") as progress:
        for indices in batches_of((store.parts[n] for n in missing), batch):
            result = drawer.latents(indices)
            pixels = result.latents if form == "latents" else pipeline.decode(result.latents)
            writer.put(indices, pixels, result.evaluations_per_image)
            drawn, spent = drawn + len(indices), time.perf_counter() - start
            evaluations = float(result.evaluations_per_image.double().mean())
            progress.advance(len(indices), f"{evaluations:.0f} evaluations per image")
            log.add({"step": mine - todo + drawn, "evaluations": evaluations, "images_per_second": drawn / spent})
    if share.rank:
        return None
    rate = drawn / (time.perf_counter() - start) if drawn else None
    # Of this process, since it was last started: what was drawn before an interruption is not counted.
    speed = {"images_per_second": rate, "processes": share.world, "batch": batch}
    names = list(pipeline.class_names)
    return store.finish({"classes": drawer.classes, "class_names": names, "speed": speed, "origin": origin})


def _compare(directory: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """``samples.json`` if the set is there already; ValueError if `directory` is of another plan."""
    if (directory / "config.json").is_file():
        there, here = read_json(directory / "config.json").get("settings", {}), json.loads(json.dumps(plan))
        for settings in (there, here):  # where the model lies may change
            if isinstance(settings.get("origin"), dict):
                settings["origin"].pop("run", None)
        if changed := differences(there, here):
            raise ValueError(
                f"{directory} was begun with other settings:\n  " + "\n  ".join(changed) + "\nUse those to go on, or "
                "another directory."
            )
    if (directory / "samples.json").is_file():
        return read_json(directory / "samples.json")  # type: ignore[no-any-return]
    return None
