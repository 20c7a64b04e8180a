"""Where the numbers of a run go: always metrics.jsonl, and TensorBoard or Weights & Biases where wanted."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from lwd.files import read_json, write_json, write_text


class Watcher(Protocol):
    """Something that shows rows of metrics; `TensorBoard` and `WeightsAndBiases` are two."""

    def row(self, row: Mapping[str, Any]) -> None:
        """Numbers, and lists of numbers or None, by name; ``step`` among them."""
        ...

    def close(self) -> None: ...


class MetricsLog:
    """``metrics.jsonl`` in `directory`, one row per line, and whoever watches.

    Args:
        directory: None writes nothing and only tells the watchers.
    """

    def __init__(self, directory: Path | None, watchers: list[Watcher] | None = None) -> None:
        self.path = None if directory is None else directory / "metrics.jsonl"
        self.watchers = watchers or []

    def resume(self, step: int) -> list[dict[str, Any]]:
        """The rows up to `step`; later ones, which an interrupted run wrote past its checkpoint, are removed."""
        if self.path is None or not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        # The last line of a run that was killed may be half a line.
        rows = [row for row in map(_parse, lines) if row is not None and row["step"] <= step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        return rows

    def add(self, row: dict[str, Any]) -> None:
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        for watcher in self.watchers:
            watcher.row(row)


def flat(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row by name; those of a list as name/0, name/1 ..., without what is None."""
    found: dict[str, float] = {}
    for name, value in row.items():
        values = {f"{name}/{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
        found |= {n: float(v) for n, v in values.items() if isinstance(v, int | float)}
    return found


class TensorBoard:
    """Scalars for TensorBoard in `directory`; ImportError naming the extra when it is missing."""

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError('TensorBoard needs an extra: pip install "lwd[cli]", or pass --no-tensorboard') from error
        self.writer = SummaryWriter(str(directory))

    def row(self, row: Mapping[str, Any]) -> None:
        for name, value in flat(row).items():
            self.writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """The rows as a run of Weights & Biases in `project`; a continued run goes on under the same id."""

    def __init__(self, project: str, directory: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError('Weights & Biases needs an extra: pip install "lwd[wandb]"') from error
        # An id of its own, kept with the run: directories of different experiments often have the same name.
        note = directory / "wandb.json"
        if not note.exists():
            write_json(note, {"id": secrets.token_hex(8)})
        name = directory.resolve().name
        self.run = wandb.init(project=project, dir=str(directory), id=read_json(note)["id"], name=name, resume="allow")

    def row(self, row: Mapping[str, Any]) -> None:
        self.run.log(flat(row), step=int(row["step"]))

    def close(self) -> None:
        self.run.finish()


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return row
