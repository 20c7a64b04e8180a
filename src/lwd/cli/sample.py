"""`lwd sample`: sets of generated images."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lwd.cli.options import DrawOptions, ModelOptions, classes_of


def sample(
    run: Path,
    out: Path,
    images: int | None = None,
    labels: tuple[str, ...] = (),
    at_step: int | None = None,
    form: Literal["png", "npz", "latents"] = "png",
    model: ModelOptions = ModelOptions(),  # noqa: B008 (frozen)
    draw: DrawOptions = DrawOptions(),  # noqa: B008
) -> None:
    """Draw images from a trained model into a directory.

    Image i depends on the model, the seed, its class and i alone: not on how many are drawn, in what batches or by how
    many processes. Under torchrun (or srun) the processes share the images; interrupted, or killed, the same command
    goes on. `lwd evaluate` scores the directory.

    Args:
        run: directory that `lwd train` made, a saved pipeline by path or hub name, or a checkpoint file of SFD.
        out: directory for the images, with samples.json, config.json and schedule.json.
        images: how many: 100 by default, 50000 for published numbers; with --labels from a file, as many as it lists.
        labels: classes, gone through in turn: numbers, ranges (0-9), names, or a text file with one per line. All of
            them by default, so that the set is balanced.
        at_step: of a run: the averaged weights after this step instead of the finished model.
        form: png files, one npz as ADM's evaluator takes it, or safetensors with the latents.
    """
    from lwd.generation import sample_to_directory

    pipeline = model.open(run, at_step)
    classes = classes_of(labels, pipeline)
    if images is None:
        images = len(classes) if any(Path(label).is_file() for label in labels) else 100
    summary = sample_to_directory(
        pipeline, out, draw.config, images=images, classes=classes, form=form, batch=draw.batch
    )
    if summary is None:  # another process puts the parts together
        return
    used = summary["evaluations"]
    print(f"{images} images are in {out}: {used['mean']:.1f} model evaluations each on average, {used['max']} at most.")
    if uneven := images % len(summary["classes"]):
        print(f"Not balanced: {uneven} classes have one image more than the others.")
