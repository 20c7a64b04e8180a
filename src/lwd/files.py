"""Writing so that nothing is ever half-written: beside the target first, then one rename."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

WAIT_FIRST_NOTICE, WAIT_NOTICE = 60, 600
"""Seconds until `wait_for` says for the first time, and then again, what it waits for."""


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Call ``write(temporary_path)``, flush it to disk and rename it to `path`.

    Raises:
        OSError: with the path named, when the disk is full or unwritable; an older file at `path` is untouched
            and the temporary one is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # torch and safetensors report a full disk as RuntimeError or their own class, so go by the free space too.
        if isinstance(error, Exception) and (isinstance(error, OSError) or _free_bytes(path) < 1 << 20):
            raise OSError(
                f"could not write {path}: {error} ({_free_bytes(path) / 2**20:.0f} MiB free there). What was at that "
                "path before is unchanged; free some space and run the same command again."
            ) from error
        raise
    return path


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(path.parent).free


def write_text(path: str | Path, text: str) -> Path:
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, data: Any) -> Path:
    """Readable JSON (2 spaces), refusing NaN so that every reader can parse it."""
    return write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Parsed JSON; FileNotFoundError, or ValueError that names the file when it is truncated or not JSON."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}); it may be truncated. Make it again.") from error


def differences(there: Mapping[str, Any], here: Mapping[str, Any], place: str = "there", prefix: str = "") -> list[str]:
    """Where two nested settings differ, a line each: ``train.seed: 0 there, 1 now``.

    Args:
        there: what was found, read from JSON; `place` says where.
        here: what is asked for now.
    """
    found = []
    for key in sorted(there.keys() | here.keys()):
        a, b = there.get(key, "absent"), here.get(key, "absent")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, place, f"{prefix}{key}.")
        elif a != (list(b) if isinstance(b, tuple) else b):
            found.append(f"{prefix}{key}: {_short(a)} {place}, {_short(b)} now")
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def sha256_of(path: str | Path) -> str:
    """The checksum of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def wait_for(paths: Sequence[Path]) -> None:
    """Wait until other processes have made all of `paths`; says what it waits for, every ten minutes, on stderr."""
    for second in itertools.count():
        missing = [path for path in paths if not path.exists()]
        if not missing:
            return
        if second % WAIT_NOTICE == WAIT_FIRST_NOTICE:
            more = f" and {len(missing) - 1:,} more files" if len(missing) > 1 else ""
            print(
                f"Waiting for another process to write {missing[0]}{more}. If it has failed, stop this one too; the "
                "same command goes on from what is there.",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(1)
