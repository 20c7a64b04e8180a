"""Writing whole files or none."""

import errno
import json
import os
from pathlib import Path

import pytest

from lwd import files
from lwd.files import read_json, write_atomically, write_json, write_text


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_writes_and_makes_the_folder(tmp_path):
    assert write_text(tmp_path / "a" / "b.txt", "new é") == tmp_path / "a" / "b.txt"
    assert (tmp_path / "a" / "b.txt").read_bytes() == "new é".encode()
    assert contents(tmp_path / "a") == {"b.txt": "new é"}


def test_full_disk_leaves_the_old_file(tmp_path):
    path = write_text(tmp_path / "model.bin", "old")

    def fill(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left") as error:
        write_atomically(path, fill)
    assert str(path) in str(error.value)
    assert "unchanged" in str(error.value)
    assert contents(tmp_path) == {"model.bin": "old"}


def test_full_disk_reported_as_something_else(tmp_path, monkeypatch):
    """torch and safetensors raise their own classes; with no space left those are OSErrors too."""

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    with pytest.raises(RuntimeError, match="PytorchStreamWriter"):
        write_atomically(tmp_path / "model.pt", fail)
    monkeypatch.setattr(files, "_free_bytes", lambda path: 1000)
    with pytest.raises(OSError, match=r"model\.pt.*PytorchStreamWriter"):
        write_atomically(tmp_path / "model.pt", fail)
    assert contents(tmp_path) == {}


def test_failure_between_writing_and_renaming(tmp_path, monkeypatch):
    path = write_text(tmp_path / "a.txt", "old")

    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="Input/output error"):
                write_text(path, "new")
        assert contents(tmp_path) == {"a.txt": "old"}


def test_interruption_is_passed_on_and_leaves_nothing(tmp_path):
    def interrupt(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.txt", interrupt)
    assert contents(tmp_path) == {}


def test_folder_that_cannot_be_made(tmp_path):
    write_text(tmp_path / "file", "x")
    with pytest.raises(OSError, match="file"):
        write_text(tmp_path / "file" / "below.txt", "y")


def test_json_round_trip_and_nan(tmp_path):
    data = {"a": [1, 2.5, None, True], "é": "ü", "third": 1 / 3}
    path = write_json(tmp_path / "a.json", data)
    assert read_json(path) == data
    assert path.read_text().startswith('{\n  "a"')
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write_json(path, {"loss": value})
    assert read_json(path) == data
    assert list(contents(tmp_path)) == ["a.json"]


def test_truncated_json_names_the_file(tmp_path):
    path = tmp_path / "a.json"
    text = json.dumps({"kind": "offset", "parameters": {"delta": 0.3}})
    for broken in (text[:-1], text[:10], "", "not json"):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"a\.json.*truncated"):
            read_json(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"a\.json"):
        read_json(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def test_writers_of_one_file_do_not_meet(tmp_path):
    """Processes of several machines often have the same number."""
    seen = []

    def write(temporary: Path) -> None:
        seen.append(temporary)
        temporary.write_text("inner" if len(seen) == 2 else "outer")
        if len(seen) == 1:
            write_atomically(tmp_path / "plan.json", write)

    write_atomically(tmp_path / "plan.json", write)
    assert seen[0] != seen[1]
    assert contents(tmp_path) == {"plan.json": "outer"}


def test_waiting_says_what_for(tmp_path, monkeypatch, capsys):
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 70:
            (tmp_path / "a").touch()
            (tmp_path / "b").touch()

    monkeypatch.setattr(files.time, "sleep", sleep)
    files.wait_for([tmp_path / "a", tmp_path / "b"])
    assert len(slept) == 70
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1
    assert printed[0].startswith(f"Waiting for another process to write {tmp_path / 'a'} and 1 more files.")
