"""The command line: `lwd COMMAND --help`. Each command is one function; its arguments are its options."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

# Nothing heavy is imported here: `lwd --help` must not wait for torch.
from lwd.cli.encode import encode
from lwd.cli.evaluate import evaluate
from lwd.cli.path import path
from lwd.cli.report import report
from lwd.cli.sample import sample
from lwd.cli.semvae import semvae
from lwd.cli.train import probe, train
from lwd.memory import keep_freed_memory


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


def recipes() -> None:
    """List the named experiments, with what they cost and what was published for them."""
    from lwd.recipes import table

    print("\n".join(table()))


COMMANDS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (demo, encode, semvae, probe, path, train, sample, evaluate, report, recipes)
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
    keep_freed_memory()
    try:
        tyro.cli(
            COMMANDS[name],
            args=rest,
            prog=f"lwd {name}",
            config=(tyro.conf.AvoidSubcommands, tyro.conf.OmitArgPrefixes),
        )
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
