"""Directories by path or by name on the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path


def looks_like_repository(name: str) -> bool:
    """Whether `name` could be one on the hub: owner/name."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def directory_of(source: str | Path, wanted: Sequence[str], what: str) -> Path:
    """The directory `source`, or a local copy of the repository of that name on the hub.

    Args:
        wanted: patterns of the files to fetch.
        what: is looked for, for messages: "model directory".

    Raises:
        FileNotFoundError: neither a directory nor a hub name, or the hub does not have it or cannot be reached.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not looks_like_repository(str(source)):
        raise FileNotFoundError(f"no {what} {str(source)!r}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(
            f"no {what} {str(source)!r}; to look for it on the Hugging Face hub: pip install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(str(source), allow_patterns=list(wanted)))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"no {what} {str(source)!r}, and not found on the hub either: {error}") from error
