"""The command line: `lwd COMMAND --help`. Each command is one function; its arguments are its options."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

# Nothing heavy is imported here: `lwd --help` must not wait for torch.
from lwd.cli.encode import encode, semvae


def demo(
    directory: Path = Path("runs/demo"),
    budget: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    compile: bool = False,
) -> None:
    """The whole method on embedded images, ending with a page to look at (minutes).

    Run the same command again to continue an interrupted demo.

    Args:
        directory: where everything goes; the page is report.html in it.
        budget: factor on training steps and image counts; 0.1 for a quick look, 4 for better images.
        seed: of everything random.
        device: auto, cpu, cuda, cuda:1 ...
        compile: compile the networks; takes a minute or more, which only large budgets earn back.
    """
    from lwd.demo import run_demo

    page = run_demo(directory, budget=budget, seed=seed, device=device, compiled=compile)
    print(f"The page is ready: {page.resolve()}")


def probe(
    latents: Path,
    out: Path,
    recipe: str = "embedded",
    kinetic: tuple[float, ...] = (),
    budget: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    compile: bool | None = None,
) -> None:
    """Learn a schedule: Algorithm 1, stage I, over a sweep of lambda.

    Writes sweep.json and, when a value is stable, schedule.json, the schedule of the weakest stable one.

    Args:
        latents: directory of training latents, as `lwd encode` makes it.
        out: directory of the sweep; run the same command again to continue an interrupted one.
        recipe: named experiment; `lwd recipes` lists them.
        kinetic: values of lambda; the recipe's by default.
        budget: factor on the probe's steps.
        seed: of everything random.
        device: auto, cpu, cuda, cuda:1 ...
        compile: compile the network; by default on a GPU.
    """
    from lwd.data import LatentDataset
    from lwd.data.loader import nearest
    from lwd.probe import sweep_kinetic
    from lwd.recipes import get_recipe
    from lwd.runs import default_compile, default_precision, initial_denoiser, pick_device, write_run_config

    chosen = get_recipe(recipe).scaled(budget)
    if chosen.probe is None:
        raise ValueError(f"recipe {recipe!r} has the fixed schedule {chosen.schedule!r}; there is nothing to probe")
    where = pick_device(device)
    compiled = default_compile(where) if compile is None else compile
    config = replace(chosen.probe, seed=seed, compile=compiled, precision=default_precision(where))
    data = nearest(LatentDataset.open(latents), where)
    write_run_config(out, where, recipe=recipe, latents=str(latents), probe=config, backbone=chosen.backbone)
    sweep = sweep_kinetic(
        lambda: initial_denoiser(chosen.backbone, seed),
        data,
        config,
        kinetic or chosen.kinetics,
        directory=out,
        device=where,
    )
    sweep.save(out / "sweep.json")
    for value, learned in zip(sweep.kinetics, sweep.probes, strict=True):
        state = "collapsed" if learned.collapsed else "picked" if value == sweep.picked else "stable"
        print(f"lambda {value:<8g} delay {learned.delay:.3f}  {state}")
    sweep.schedule.save(out / "schedule.json")
    print(f"The schedule is {out / 'schedule.json'}.")


def train(
    latents: Path,
    out: Path,
    recipe: str = "embedded",
    schedule: str | None = None,
    budget: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    compile: bool | None = None,
) -> None:
    """Train a denoiser on a frozen schedule: Algorithm 1, stage II.

    Args:
        latents: directory of training latents.
        out: directory of the run; run the same command again to continue an interrupted one.
        recipe: named experiment; `lwd recipes` lists them.
        schedule: synchronous, cascaded, offset[:delta], shifted:a,b or a schedule file; the recipe's by default.
        budget: factor on the training steps.
        seed: of everything random.
        device: auto, cpu, cuda, cuda:1 ...
        compile: compile the network; by default on a GPU.
    """
    from lwd.data import LatentDataset
    from lwd.data.loader import nearest
    from lwd.recipes import get_recipe, make_schedule
    from lwd.runs import default_compile, default_precision, initial_denoiser, pick_device, write_run_config
    from lwd.training import train as run_training

    chosen = get_recipe(recipe).scaled(budget)
    text = schedule or chosen.schedule
    if text == "learned":
        raise ValueError(
            "this recipe trains on a learned schedule: pass --schedule with the file that `lwd probe` made"
        )
    where = pick_device(device)
    data = nearest(LatentDataset.open(latents), where)
    compiled = default_compile(where) if compile is None else compile
    config = replace(chosen.train, seed=seed, compile=compiled, precision=default_precision(where))
    denoiser = initial_denoiser(chosen.backbone, seed)
    write_run_config(out, where, recipe=recipe, latents=str(latents), train=config, backbone=chosen.backbone)
    epochs = config.steps * config.batch_size / len(data)
    parameters = sum(p.numel() for p in denoiser.parameters())
    print(
        f"{config.steps} steps of {config.batch_size} images ({epochs:.1f} epochs of {len(data)}), "
        f"{parameters / 1e6:.1f}M parameters, on {where}"
    )
    run_training(denoiser, make_schedule(text, data.spec.names), data, config, directory=out, device=where)
    print(f"The denoiser is {out / 'model'}.")


def sample(
    run: Path,
    out: Path,
    images: int = 100,
    labels: tuple[int, ...] = (),
    solver: str = "dopri5",
    steps: int | None = None,
    weak: Path | None = None,
    scale: float = 1.5,
    seed: int = 0,
    batch: int = 250,
    device: str = "auto",
) -> None:
    """Draw images from a trained run.

    Image i depends on the seed and i alone, not on how many are drawn or how they are batched.

    Args:
        run: directory that `lwd train` made.
        out: npz file to write: images (uint8), labels, latents, evaluations per image.
        images: how many.
        labels: classes, repeated over the images; all in turn by default.
        solver: dopri5, heun, midpoint or euler.
        steps: steps of a fixed-step solver.
        weak: run of a weak model, for AutoGuidance.
        scale: of AutoGuidance.
        seed: of the noise.
        batch: images at a time; does not change them.
        device: auto, cpu, cuda, cuda:1 ...
    """
    from lwd.generation import draw_images
    from lwd.runs import load_run, pick_device

    where = pick_device(device)
    drawn = draw_images(
        load_run(run, where),
        count=images,
        device=where,
        labels=labels,
        weak=None if weak is None else load_run(weak, where),
        solver=solver,
        steps=steps,
        scale=scale,
        seed=seed,
        batch=batch,
    )
    drawn.save(out)
    print(f"{images} images in {out}, at most {int(drawn.evaluations.max())} model evaluations each.")


def evaluate(samples: Path, reference: Path, judge: Path, out: Path | None = None) -> None:
    """Compare generated with real images: two feature distances, precision, recall, class accuracy.

    For small data, with the embedded network and a judge trained by `lwd demo`; these are not FID.

    Args:
        samples: npz with images and labels, as `lwd sample` makes it.
        reference: npz with real images, for example samples/real.npz of a demo.
        judge: judge.safetensors of a demo.
        out: JSON file for the result.
    """
    import json

    from lwd.evaluation import evaluate_files
    from lwd.files import write_json

    result = evaluate_files(samples, reference, judge)
    if out is not None:
        write_json(out, result)
    print(json.dumps(result, indent=2))


def report(directory: Path) -> None:
    """Write the page of a demo again from its files.

    Args:
        directory: of the demo.
    """
    from lwd.report import write_report

    print(write_report(directory))


def recipes() -> None:
    """List the named experiments."""
    from lwd.recipes import RECIPES

    for make in RECIPES.values():
        recipe = make()
        print(f"{recipe.name:<24}{recipe.train.steps:>10} steps x {recipe.train.batch_size}   {recipe.summary}")


COMMANDS: dict[str, Callable[..., None]] = {
    function.__name__: function for function in (demo, encode, semvae, probe, train, sample, evaluate, report, recipes)
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `lwd`. Exits with 2 and one line on standard error when the user can mend what went wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return
    name, *rest = arguments
    if name == "--version":
        from lwd import __version__

        print(__version__)
        return
    if name not in COMMANDS:
        _fail(f"there is no command {name!r}.\n\n{_overview()}")
    try:
        import tyro
    except ImportError:
        _fail('the command line needs an extra: pip install "lwd[cli]"')
    try:
        tyro.cli(COMMANDS[name], args=rest, prog=f"lwd {name}", config=(tyro.conf.AvoidSubcommands,))
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again to continue.", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        _fail(str(error))


def _overview() -> str:
    lines = [f"  {name:<10}{(function.__doc__ or '').splitlines()[0]}" for name, function in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lwd COMMAND [OPTIONS]",
            "",
            "Learning When to Denoise: learned asynchronous schedules for latent diffusion.",
            "",
            *lines,
            "",
            "`lwd COMMAND --help` explains a command's options.",
        ]
    )


def _fail(message: str) -> None:
    print(f"lwd: {message}", file=sys.stderr)
    raise SystemExit(2)
