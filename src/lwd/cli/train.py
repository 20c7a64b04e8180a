"""`lwd probe` and `lwd train`: stage I and stage II."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lwd.batches import LatentSource
    from lwd.metrics import Watcher
    from lwd.recipes import Recipe
    from lwd.sweep import Sweep


def probe(
    latents: Path,
    out: Path,
    recipe: str = "embedded",
    kinetic: tuple[float, ...] = (),
    jacobian: Literal["detached", "exact", "none", "information"] | None = None,
    bisect: bool = False,
    split: bool = False,
    budget: float = 1.0,
    accumulate: int = 1,
    recompute: int = 0,
    seed: int = 0,
    device: str = "auto",
    compile: bool | None = None,
    tensorboard: bool = True,
    wandb: str | None = None,
) -> None:
    """Learn a schedule: Algorithm 1, stage I, over a sweep of lambda.

    Writes sweep.json and sweep.png and, when a value is stable, schedule.json, the schedule of the weakest stable one.
    Under torchrun all processes share each batch, or, with --split, each takes its own values of lambda.

    Args:
        latents: directory of training latents, as `lwd encode` makes it.
        out: directory of the sweep; run the same command again to continue an interrupted one.
        recipe: named experiment; `lwd recipes` lists them.
        kinetic: values of lambda; the recipe's by default.
        jacobian: the estimator of rho's gradient: detached is the paper's, none leaves the factor t' out, exact and
            information are others (docs/equations.md); the recipe's by default.
        bisect: narrow down the least stable value between the smallest and the largest of them.
        split: share out the values of lambda over the processes instead of the batch.
        budget: factor on the probe's steps.
        accumulate: parts that each process computes its share of the batch in.
        recompute: blocks whose activations are computed again in the backward pass, to save memory.
        seed: of everything random.
        device: auto, cpu, cuda, cuda:1 ...
        compile: compile the network; by default on a GPU.
        tensorboard: write TensorBoard's files beside metrics.jsonl.
        wandb: project of Weights & Biases to log to.
    """
    from dataclasses import replace

    from lwd import distributed
    from lwd.data.sharding import Share
    from lwd.files import wait_for
    from lwd.machine import default_compile, default_precision, own_device
    from lwd.recipes import get_recipe
    from lwd.runs import initial_denoiser, write_run_config
    from lwd.sweep import bisect_kinetic, sweep_kinetic

    chosen = get_recipe(recipe).scaled(budget)
    if chosen.probe is None:
        if chosen.schedule == "learned":
            raise ValueError(f"recipe {recipe!r} trains on the schedule of another: probe with that one's recipe")
        raise ValueError(f"recipe {recipe!r} has the fixed schedule {chosen.schedule!r}; there is nothing to probe")
    if bisect and split:
        raise ValueError("a bisection goes from one value to the next; it cannot be split over processes")
    values = sorted(set(kinetic or chosen.kinetics))
    share = Share.from_environment()
    with nullcontext() if split else distributed.joined(), _memory_advice():
        where = own_device(device)
        config = replace(
            chosen.probe,
            jacobian=jacobian or chosen.probe.jacobian,
            seed=seed,
            compile=default_compile(where) if compile is None else compile,
            precision=default_precision(where),
            accumulate=accumulate,
            recompute=recompute,
        )
        data = _open(latents, chosen, where)
        main = (share.rank if split else distributed.rank()) == 0
        if main:
            write_run_config(out, where, recipe=recipe, latents=str(latents), probe=config, backbone=chosen.backbone)

        def sweep_over(some: list[float]) -> Sweep:
            return sweep_kinetic(
                lambda: initial_denoiser(chosen.backbone, seed), data, config, some, directory=out, device=where,
                watch=lambda folder: _watchers(folder, tensorboard, wandb),
            )  # fmt: skip

        if split:
            if own := values[share.rank :: share.world]:
                sweep_over(own)
            if not main:
                return
            wait_for([out / f"lambda-{value:g}" / "schedule.json" for value in values])
        if bisect:
            if len(values) < 2:
                raise ValueError("a bisection needs two values of lambda: --kinetic LOW HIGH")
            sweep = bisect_kinetic(lambda value: sweep_over([value]).probes[0], values[0], values[-1])
        else:
            sweep = sweep_over(values)
    if main:
        _conclude(sweep, out, config.burn_in)


def train(
    latents: Path,
    out: Path,
    recipe: str = "embedded",
    schedule: str | None = None,
    heldout: Path | None = None,
    budget: float = 1.0,
    accumulate: int = 1,
    parallel: Literal["ddp", "fsdp"] = "ddp",
    recompute: int = 0,
    seed: int = 0,
    device: str = "auto",
    compile: bool | None = None,
    resume: bool = False,
    save_minutes: float | None = None,
    keep_every: int = 0,
    validate_every: int | None = None,
    sample_every: int | None = None,
    skip_non_finite: bool = False,
    tensorboard: bool = True,
    wandb: str | None = None,
) -> None:
    """Train a denoiser on a frozen schedule: Algorithm 1, stage II.

    Run the same command again to continue an interrupted run, on as many processes as there are. Under torchrun the
    processes share the recipe's batch, and the training is the same on any number of them.

    Args:
        latents: directory of training latents.
        out: directory of the run.
        recipe: named experiment; `lwd recipes` lists them.
        schedule: synchronous, cascaded, offset[:delta], shifted:a,b, independent (for a model that is sampled along
            any schedule) or a schedule file; the recipe's by default.
        heldout: latents that are not trained on (`lwd encode --like`), to measure a loss on that compares schedules.
        budget: factor on the training steps.
        accumulate: parts that each process computes its share of the batch in; 2 halves the activations' memory.
        parallel: ddp, or fsdp to spread weights and optimizer over the processes.
        recompute: blocks whose activations are computed again in the backward pass, to save memory.
        seed: of everything random.
        device: auto, cpu, cuda, cuda:1 ...
        compile: compile the network; by default on a GPU.
        resume: fail when there is no checkpoint to go on from, instead of beginning.
        save_minutes: between two checkpoints; the recipe's by default.
        keep_every: steps between checkpoints that are kept for good; 0 keeps the newest two only.
        validate_every: images between two measurements on --heldout.
        sample_every: images between two sheets of samples in samples/; a tenth of the run by default, 0 for none.
        skip_non_finite: leave out steps with a loss or gradient that is not finite, instead of stopping.
        tensorboard: write TensorBoard's files beside metrics.jsonl.
        wandb: project of Weights & Biases to log to.
    """
    from dataclasses import replace

    from lwd import distributed
    from lwd.generation import SampleSheets
    from lwd.machine import default_compile, default_precision, own_device
    from lwd.recipes import get_recipe, make_schedule
    from lwd.runs import initial_denoiser, write_run_config
    from lwd.training import Measure
    from lwd.training import train as run_training

    chosen = get_recipe(recipe).scaled(budget)
    text = schedule or chosen.schedule
    if text == "learned":
        raise ValueError(
            "this recipe trains on a learned schedule: pass --schedule with the file that `lwd probe` made"
        )
    with distributed.joined(), _memory_advice():
        where = own_device(device)
        data = _open(latents, chosen, where)
        held = None if heldout is None else _open(heldout, chosen, where)
        if held is not None:
            held.normalization.require_equal(data.normalization, str(heldout), str(latents))
        config = replace(
            chosen.train,
            seed=seed,
            compile=default_compile(where) if compile is None else compile,
            precision=default_precision(where),
            accumulate=accumulate,
            parallel=parallel,
            recompute=recompute,
            keep_every=keep_every,
            skip_non_finite=skip_non_finite,
            save_seconds=chosen.train.save_seconds if save_minutes is None else 60 * save_minutes,
            validate_every=validate_every or chosen.train.validate_every,
        )
        watchers: list[Watcher] = []
        if distributed.rank() == 0:
            write_run_config(out, where, recipe=recipe, latents=str(latents), train=config, backbone=chosen.backbone)
            _announce(replace(chosen, train=config), len(data), where)
            watchers = _watchers(out, tensorboard, wandb)
        path = make_schedule(text, data.spec.names)
        interval = config.steps * config.batch_size // 10 if sample_every is None else sample_every
        measures = []
        if interval and (decode := _decoder(data)) is not None:
            shape = (data.spec.channels, chosen.backbone.input_size, chosen.backbone.input_size)
            drawn = path.path().frozen().to(where)
            sheets = SampleSheets(out, drawn, decode, shape, chosen.backbone.num_classes, where)
            measures.append(Measure(interval, sheets.draw))
        run_training(
            initial_denoiser(chosen.backbone, seed), path, data, config, directory=out, device=where, heldout=held,
            measures=measures, watchers=watchers, must_resume=resume,
        )  # fmt: skip
        for watcher in watchers:
            watcher.close()
        if distributed.rank() == 0:
            print(f"The denoiser is {out / 'model'}.")


def _open(latents: Path, recipe: Recipe, device: torch.device) -> LatentSource:
    """The latent set, where training reads it fastest; ValueError when it does not fit the recipe."""
    from lwd.data import LatentDataset
    from lwd.data.loader import nearest

    data, backbone = LatentDataset.open(latents), recipe.backbone
    problems = []
    if data.spec.sizes != backbone.spec.sizes or data.spec.names != backbone.spec.names:
        found, wanted = (
            " + ".join(f"{group.channels} {group.name}" for group in spec.groups) for spec in (data.spec, backbone.spec)
        )
        problems.append(f"groups of {found} channels, the recipe expects {wanted}")
    if data.grid != (backbone.input_size, backbone.input_size):
        problems.append(f"a grid of {data.grid[0]} x {data.grid[1]}, the recipe expects {backbone.input_size} squared")
    if len(data.class_names) > backbone.num_classes:
        problems.append(f"{len(data.class_names)} classes, the recipe expects at most {backbone.num_classes}")
    if recipe.train.repa > 0 and not data.features:
        problems.append("no REPA features (encode with --repa), which the recipe aligns to")
    if problems:
        raise ValueError(f"{latents} does not fit the recipe {recipe.name!r}: it has " + "; ".join(problems))
    return nearest(data, device)


def _decoder(data: LatentSource) -> Callable[[Tensor], Tensor] | None:
    """Latents of `data` to images; None, with a note, where they cannot be decoded."""
    from lwd import distributed
    from lwd.encoders.choose import decode_texture, decoder

    encoders = getattr(data, "encoders", {})
    try:
        decoder(encoders.get(data.spec.names[0], {}))
    except (ValueError, OSError, ImportError) as error:
        if distributed.rank() == 0:
            print(f"No sheets of samples: {error}")
        return None
    return lambda latents: decode_texture(latents, data.spec, data.normalization, encoders)


def _announce(recipe: Recipe, images: int, device: torch.device) -> None:
    """What will run, before it runs."""
    from lwd import distributed
    from lwd.recipes.budget import cost_of

    config = recipe.train
    cost, processes = cost_of(recipe, recompute=config.recompute), distributed.world()
    epochs = config.steps * config.batch_size / images
    memory = cost.memory(config.batch_size // (processes * config.accumulate), config.shards(processes))
    print(
        f"{config.steps:,} steps of {config.batch_size} images ({epochs:.1f} epochs of {images:,}), "
        f"{cost.parameters / 1e6:.1f}M parameters, on {processes} x {device.type}; about "
        f"{memory / 1e9:.1f} GB each",
        flush=True,
    )


def _watchers(directory: Path, tensorboard: bool, wandb: str | None) -> list[Watcher]:
    from lwd import distributed
    from lwd.metrics import TensorBoard, WeightsAndBiases

    if distributed.rank() != 0:
        return []
    watchers: list[Watcher] = [TensorBoard(directory / "tensorboard")] if tensorboard else []
    return [*watchers, WeightsAndBiases(wandb, directory)] if wandb else watchers


@contextmanager
def _memory_advice() -> Iterator[None]:
    """Out of memory becomes an error that says what to change."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            "out of GPU memory. --accumulate with twice the number halves what activations take, and --recompute N "
            "keeps those of N blocks fewer, both without changing the training; for weights and optimizer that do not "
            f"fit, use more processes with --parallel fsdp. ({str(error).splitlines()[0]})"
        ) from error


def _conclude(sweep: Sweep, out: Path, burn_in: int) -> None:
    from lwd.report.figures import save_panels, sweep_convergence, sweep_curves

    sweep.save(out / "sweep.json")
    described: dict[str, Any] = sweep.to_dict()
    states = [
        "collapsed" if learned.collapsed else "picked" if value == sweep.picked else "stable"
        for value, learned in zip(sweep.kinetics, sweep.probes, strict=True)
    ]
    labels = [f"λ = {value:g}, {state}" for value, state in zip(sweep.kinetics, states, strict=True)]
    save_panels([sweep_curves(described), sweep_convergence(described, burn_in)], out / "sweep.png", labels)
    for value, learned, state in zip(sweep.kinetics, sweep.probes, states, strict=True):
        print(f"lambda {value:<8g} delay {learned.delay:.3f}  {state}")
    sweep.schedule.save(out / "schedule.json")
    print(f"The schedule is {out / 'schedule.json'}, the figure {out / 'sweep.png'}.")
