"""What one waits for before anything happens: `lwd --help`, and `import lwd` beside `import torch`.

    python benchmarks/startup.py --json startup.json

Each in a process of its own, in turns; medians. The interpreter's own start is part of every figure.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from lwd.files import write_json
from lwd.machine import describe_machine, describe_versions

COMMANDS = {
    "python": ["-c", ""],
    "import lwd": ["-c", "import lwd"],
    "lwd --help": ["-m", "lwd", "--help"],
    "import torch": ["-c", "import torch"],
    "import lwd, everything in it": ["-c", "import lwd; [getattr(lwd, name) for name in lwd.__all__]"],
    "lwd train --help": ["-m", "lwd", "train", "--help"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the result here too")
    chosen = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(chosen.repeats + 1):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)
            if number:  # the first ones read from the disk
                times[name].append(time.perf_counter() - start)
    middle = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in middle.items():
        print(f"{name:<32}{seconds:6.2f} s   {seconds / middle['import torch']:5.2f} times import torch")
    if chosen.json is not None:
        described = {"machine": describe_machine(torch.device("cpu")), "versions": describe_versions()}
        write_json(chosen.json, {"seconds": middle, **described})


if __name__ == "__main__":
    main()
