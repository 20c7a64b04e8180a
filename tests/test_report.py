"""The page of a demo: complete, honest in words, self-contained, and sound in a real browser."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lwd.files import write_json
from lwd.report import write_report
from lwd.report.images import grid
from lwd.report.page import render
from lwd.report.read import read_demo
from lwd.report.style import COLOURS
from lwd.report.words import decimals, describe_sweep, listing, number, span, summary
from lwd.schedules import OffsetSchedule, PolynomialSchedule, SynchronousSchedule

CLASSES = ["T-shirt", "trouser", "<bag>"]
COLLAPSED, SETTLED = [-9.0, -9.0, -8.0, -6.0, 2.0], [-1.2, -0.2, 0.3, 0.1, 0.2]
SCORES = {
    "learned": (412.3, 6.21),
    "offset": (455.8, 5.94),
    "synchronous": (498.1, 7.73),
    "autoguidance": (361.0, 4.88),
}


def curve(rho: list[float]) -> dict[str, Any]:
    return PolynomialSchedule(4, torch.tensor(rho)).to_dict()


def make_sweep(picked: float | None = 0.04) -> dict[str, Any]:
    runs = [
        {
            "kinetic": kinetic,
            "collapsed": kinetic == 0 or picked is None,
            "delay": 0.9,
            "schedule": curve(rho),
            "history": [{"step": step, "midpoint": [0.5 - step / 100, 0.5]} for step in (10, 20)],
        }
        for kinetic, rho in ((0.0, COLLAPSED), (0.04, SETTLED))
    ]
    return {"criterion": "The weakest & calmest.", "picked": picked, "runs": runs}


def make_arm(name: str, embedded: float, judge: float) -> dict[str, Any]:
    schedules = {"offset": OffsetSchedule(0.3).to_dict(), "synchronous": SynchronousSchedule().to_dict()}
    guided = name == "autoguidance"
    final = {"fd_embedded": embedded, "fd_judge": judge, "precision": 0.74, "recall": 0.61, "accuracy": 0.871}
    points = [{"fd_embedded": embedded * k, "fd_judge": judge * k} for k in (3, 1)]
    return {
        "title": {"offset": "SFD offset 0.3"}.get(name, name),
        "schedule": schedules.get(name, curve(SETTLED)),
        "guidance": 1.5 if guided else None,
        "final": final | {"evaluations": 24, "images": 1000.0, "solver": "heun"},
        "by_step": [] if guided else [{"step": s, **p} for s, p in zip((225, 900), points, strict=True)],
        "by_evaluations": [] if guided else [{"evaluations": e, **p} for e, p in zip((4, 24), points, strict=True)],
        "steps": 900,
        "parameters": 5_010_592,
        "train_seconds": 151.2,
    }


def make_demo(directory: Path, scores: dict[str, tuple[float, float]] = SCORES) -> Path:
    """The files of a small finished demo."""
    rng = np.random.default_rng(0)
    config = {
        "command": "lwd demo --directory 'a <b>'",
        "started": "2026-01-02T03:04:05+0000",
        "machine": {"device": "cpu", "cores": 2},
        "versions": {"python": "3.11", "torch": "2.9"},
        "settings": {
            "demo": {"seed": 7, "budget": 0.5},
            "probe": {"burn_in": 15, "optimizer": {"lr": 0.001}},
            "data": {"name": "Made-up images", "class_names": CLASSES},
        },
    }
    write_json(directory / "config.json", config)
    write_json(directory / "sweep.json", make_sweep())
    floor = {
        "fd_embedded": 104.2,
        "fd_judge": 0.31,
        "precision": 0.86,
        "recall": 0.88,
        "accuracy": 0.917,
        "images": 1000,
    }
    arms = {name: make_arm(name, *values) for name, values in scores.items()}
    write_json(directory / "results.json", {"arms": arms, "floor": floor, "seconds": {"encode": 31.0, "sweep": 121.0}})
    (directory / "samples").mkdir()
    for name in (*scores, "real"):
        pictures = rng.integers(0, 256, (12, 32, 32), dtype=np.uint8)
        np.savez(directory / "samples" / f"{name}.npz", images=pictures, labels=np.arange(12) % 3)
    for name in ("learned", "weak"):
        (directory / "train" / name).mkdir(parents=True)
        rows = [{"step": s, "loss": 2 - s / 90, "loss_texture": 1 - s / 90, "loss_semantic": 1.0} for s in (20, 40, 60)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / "train" / name / "metrics.jsonl").write_text(text)
    tau = np.array([0.0, 0.5, 1.0])
    np.savez(
        directory / "trajectory.npz",
        tau=tau,
        t=np.stack([tau**2, tau], axis=1),
        texture=rng.integers(0, 256, (3, 32, 32), dtype=np.uint8),
        semantic=rng.integers(0, 256, (3, 4, 4, 3), dtype=np.uint8),
        predicted=rng.integers(0, 256, (3, 32, 32), dtype=np.uint8),
        label=np.array(2),
    )
    return directory


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def page(demo: Path) -> Path:
    return write_report(demo)


def text_of(page: str) -> str:
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", body)))


# --- content -------------------------------------------------------------------------------------------------------


def test_page_has_every_section_and_is_self_contained(page: Path) -> None:
    source = page.read_text()
    assert page.name == "report.html"
    assert re.findall(r'<section id="(\w+)">', source) == [
        "sweep", "curves", "samples", "trajectory", "quality", "results", "training", "run",
    ]  # fmt: skip
    assert source.count("<svg class=") == 4 + 4 + 3
    assert source.count("<img ") == 5 + 3 * 3  # a grid for each arm and the real images; a trajectory of 3 times
    assert len(source) < 3_000_000
    assert all(uri.startswith("data:image/png;base64,") for uri in re.findall(r'src="([^"]*)"', source))
    # Nothing is fetched: the only addresses are the names of XML dialects.
    assert not re.search(r"<script|<link|@import|url\((?!#)|<iframe", source)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', source))
    assert "FID" not in text_of(source)
    assert '<g id="' not in source  # the figures' own names would repeat from one to the next


def test_page_escapes_what_users_wrote(page: Path) -> None:
    source = page.read_text()
    assert "&lt;bag&gt;" in source
    assert "<bag>" not in source
    assert "lwd demo --directory &#x27;a &lt;b&gt;&#x27;" in source
    assert "The weakest &amp; calmest." in source


def test_numbers_of_the_results_reach_the_tables(page: Path) -> None:
    text = text_of(page.read_text())
    assert "learned 412 6.21 87.1 %" in text
    assert "offset 0.3 456 5.94 0.74 0.61 87.1 % 24 900 2 min 31 s" in text
    assert "real images 104 0.31 0.86 0.88 91.7 %" in text
    assert "seed 7 budget 0.5" in text
    assert "optimizer.lr 0.001" in text
    assert "encode 31 s sweep 2 min 01 s in all 2 min 32 s" in text


def test_pictures_of_the_page_are_the_files_pictures(demo: Path, page: Path) -> None:
    from PIL import Image

    uri = re.search(r'alt="Images by class: Learned" src="data:image/png;base64,([^"]*)"', page.read_text())
    assert uri is not None
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri[1]))))
    drawn = np.load(demo / "samples" / "learned.npz")["images"]
    assert sheet.shape == (3 * 34 - 2, 4 * 34 - 2, 2)
    np.testing.assert_array_equal(sheet[34:66, 68:100, 0], drawn[7])  # class 1, third picture: 1, 4, 7
    assert (sheet[:, 32:34, 1] == 0).all()
    assert (sheet[:32, :32, 1] == 255).all()


def test_grid_of_colour_pictures() -> None:
    pictures = np.arange(2 * 2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 2, 4, 4, 3)
    sheet = grid(list(pictures))
    assert sheet.shape == (10, 10, 4)
    np.testing.assert_array_equal(sheet[6:, :4, :3], pictures[1, 0])


def test_figures_take_their_colours_from_the_theme(page: Path) -> None:
    drawings = "".join(re.findall(r"<svg class.*?</svg>", page.read_text(), flags=re.DOTALL))
    assert "stroke: var(--learned)" in drawings
    assert not any(colour.light in drawings for colour in COLOURS.values())


def test_same_files_same_page(demo: Path) -> None:
    assert render(read_demo(demo)) == render(read_demo(demo))


# --- words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("learned", "verdict"),
    [
        ((400.0, 5.0), "first by both judges"),
        ((400.0, 6.5), "first by one judge of the two"),
        ((600.0, 9.0), "first by neither judge"),
    ],
)
def test_summary_reports_whichever_way_it_comes_out(tmp_path: Path, learned: tuple[float, float], verdict: str) -> None:
    words = " ".join(summary(read_demo(make_demo(tmp_path, SCORES | {"learned": learned}))))
    assert f"So the learned schedule comes {verdict}." in words
    assert "with one seed" in words


def test_summary_names_the_best_with_its_numbers(demo: Path) -> None:
    words = " ".join(summary(read_demo(demo)))
    assert "by the embedded network, the learned schedule is best (feature distance 412; SFD’s offset 456" in words
    assert "by the independent judge, SFD’s offset is best (feature distance 5.94; the learned schedule 6.21" in words
    assert "from 412 to 361 by the embedded network and from 6.21 to 4.88 by the independent judge" in words


def test_summary_calls_what_prints_alike_level(tmp_path: Path) -> None:
    tied = {"learned": (400.0, 5.0), "synchronous": (400.3, 6.0)}
    words = " ".join(summary(read_demo(make_demo(tmp_path, tied))))
    assert "the learned schedule and the synchronous schedule are level (feature distance 400)" in words


def test_sweep_in_words() -> None:
    middle = PolynomialSchedule(4, torch.tensor(SETTLED))(torch.tensor([0.5])).t[0, 0].item()
    found = " ".join(describe_sweep(make_sweep()))
    assert "Of two probes, one collapsed to the extreme schedule (λ\u00a0=\u00a00)." in found
    assert f"the texture has reached {middle:.2f}." in found
    none = " ".join(describe_sweep(make_sweep(picked=None)))
    assert (
        none
        == "All of two probes collapsed to the extreme schedule. No λ was stable, so the strongest, 0.04, stands in."
    )


def test_numbers_as_text() -> None:
    assert [decimals([412.3, 498.0]), decimals([5.94, 12.0]), decimals([0.31]), decimals([])] == [0, 2, 3, 2]
    assert number(1234.5, 1) == "1,234.5"
    assert [span(4.25), span(59), span(151.2), span(3900)] == ["4.2 s", "59 s", "2 min 31 s", "1 h 05 min"]
    assert [listing(["a"]), listing(["a", "b"]), listing(["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


def test_trajectory_says_that_a_group_leads_only_where_it_does(tmp_path: Path) -> None:
    make_demo(tmp_path)
    assert "The semantic group goes ahead and the texture follows." in render(read_demo(tmp_path))
    found = dict(np.load(tmp_path / "trajectory.npz"))
    found["t"][:, 0] = found["t"][:, 1]
    np.savez(tmp_path / "trajectory.npz", **found)
    assert "The semantic group and the texture go together." in render(read_demo(tmp_path))


# --- partial and damaged runs --------------------------------------------------------------------------------------


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    make_demo(tmp_path)
    for path in sorted(tmp_path.rglob("*"), reverse=True):
        if path.is_dir():
            path.rmdir()
        elif path.name != "config.json":
            path.unlink()
    source = write_report(tmp_path).read_text()
    assert re.findall(r'<section id="(\w+)">', source) == ["run"]
    assert "The run has no results yet." in source


@pytest.mark.parametrize(
    ("missing", "section"),
    [
        ("sweep.json", "sweep"),
        ("results.json", "results"),
        ("trajectory.npz", "trajectory"),
        ("samples", "samples"),
        ("train", "training"),
    ],
)
def test_what_is_missing_is_left_out(tmp_path: Path, missing: str, section: str) -> None:
    gone = make_demo(tmp_path) / missing
    if gone.is_dir():
        shutil.rmtree(gone)
    else:
        gone.unlink()
    found = re.findall(r'<section id="(\w+)">', render(read_demo(tmp_path)))
    assert section not in found
    assert "run" in found


def test_bad_directories_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no demo .*lwd demo --directory"):
        write_report(tmp_path)
    make_demo(tmp_path)
    log = tmp_path / "train" / "learned" / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 80, "lo')  # an interrupted run: its last line is dropped
    assert len(read_demo(tmp_path).logs["learned"]) == 3
    samples = tmp_path / "samples" / "learned.npz"
    samples.write_bytes(samples.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"learned\.npz is damaged"):
        write_report(tmp_path)
    (tmp_path / "sweep.json").write_text('{"runs": [')
    with pytest.raises(ValueError, match=r"sweep\.json is not readable JSON"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


# --- in a browser --------------------------------------------------------------------------------------------------

MEASURE = """<script>addEventListener("load", () => {
  const report = document.querySelector("iframe").contentDocument, root = report.documentElement;
  const images = [...report.images];
  const sizes = [...report.querySelectorAll("svg.plot, .classes img")].map(e => e.getBoundingClientRect().height);
  document.title = JSON.stringify({
    images: images.length, decoded: images.filter(i => i.complete && i.naturalWidth > 0).length,
    overflow: root.scrollWidth - root.clientWidth, smallest: Math.min(...sizes), text: report.body.innerText.length});
});</script>"""


def browse(target: Path, *options: str, profile: Path) -> str:
    # Without a sandbox (containers as root have none), and without anything that would reach for a network.
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += [f"--user-data-dir={profile}", *options, target.as_uri()]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True, env={**os.environ, "HOME": str(profile)}
    )
    return done.stdout


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [400, 1200])
def test_page_in_a_browser(page: Path, tmp_path: Path, width: int) -> None:
    from PIL import Image

    # A frame, because the browser's own window cannot be as narrow as a telephone.
    frame = tmp_path / "frame.html"
    inner = html.escape(page.read_text())
    frame.write_text(f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{inner}"></iframe>{MEASURE}')
    dom = browse(frame, "--dump-dom", "--window-size=1300,1000", profile=tmp_path / "profile")
    title = re.search(r"<title>(.*?)</title>(?=\s*</head>)", dom)
    assert title is not None
    measured = json.loads(html.unescape(title[1]))
    assert measured["images"] == measured["decoded"] == 14
    assert measured["overflow"] <= 0
    assert measured["smallest"] > 100  # nothing collapsed to a line
    assert measured["text"] > 3000
    shot = tmp_path / "page.png"
    browse(page, f"--screenshot={shot}", f"--window-size={max(width, 500)},2000", profile=tmp_path / "profile")
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    blue = tuple(int(COLOURS["learned"].light[i : i + 2], 16) for i in (1, 3, 5))
    assert (np.abs(pixels - np.array(blue)).max(axis=2) <= 3).sum() > 200  # the learned arm's marks are painted
