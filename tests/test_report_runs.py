"""The report on any runs: what is compared with what, what was published beside it, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

import lwd
from lwd import cli
from lwd.evaluation.inception import NAME as INCEPTION
from lwd.files import write_json
from lwd.generation import save_npz
from lwd.report import write_comparison
from lwd.report.collect import collect
from lwd.report.comparison import Score, digits, tables

LEARNED = lwd.PolynomialSchedule(rho=[0.5, -2.0, -2.0, -2.0, 1.0]).to_dict()
OFFSET = lwd.OffsetSchedule(0.3).to_dict()
GUIDED = {"kind": "autoguidance", "scale": [1.5], "interval": None, "weak": None}


def result(
    recipe, step, fid, *, seed=0, guidance=None, protocol="complete", network=INCEPTION, count=50_000, **changes
):
    metrics = {"fid": fid, "sfid": 4.0, "inception_score": 250.0, "precision": 0.78, "recall": 0.7}
    origin = {
        "run": f"runs/{recipe}-{seed}", "recipe": recipe, "step": step, "train_seed": seed, "parameters": 674_000_000,
        "schedule": OFFSET if "sfd" in recipe else LEARNED, "guidance": guidance, "solver": "dopri5", "steps": None,
        "evaluations": 61.0, "encoders": {"semantic": {"encoder": "semvae", "network": {"network": "dinov2"}}},
    }  # fmt: skip
    return {
        "metrics": metrics if network == INCEPTION else {f"fd_{network}": fid},
        "protocol": protocol,
        "generated": {"name": "x", "sha256": None, "count": count, "shape": [3, 256, 256], "origin": origin | changes},
        "reference": {"name": "data/VIRTUAL.npz", "sha256": "abc"},
        "extractor": {"name": network},
        "machine": {"processor": "some CPU", "device": "cpu"},
        "versions": {"torch": "2.13.0"},
    }


@pytest.fixture
def scores(tmp_path):
    rows = [
        result("imagenet-xl-600ep", 70_000, 7.0),
        result("imagenet-xl-600ep", 400_000, 2.9, seed=0),
        result("imagenet-xl-600ep", 400_000, 3.1, seed=1),
        result("imagenet-sfd-xl", 70_000, 8.8),
        result("imagenet-sfd-xl", 400_000, 3.5, protocol=["10000 generated images instead of 50000"]),
        result("imagenet-xl-600ep", 400_000, 1.2, guidance=GUIDED),
    ]
    write_json(tmp_path / "scores.json", {"format": "lwd-evaluations/1", "results": rows})
    return tmp_path


def by_title(found, start):
    return next(table for table in found if table.title.startswith(start))


def test_convergence_beside_the_published_numbers(scores):
    table = by_title(tables(collect([scores]).results), "FID by training iterations")
    assert list(table.columns) == ["70000", "400000"]
    own, published = [
        {row.label.split(" · ")[0]: row for row in table.rows if row.kind == kind} for kind in ("own", "published")
    ]
    assert own["imagenet-xl-600ep"].cells["400000"].values == (2.9, 3.1)
    assert own["imagenet-xl-600ep"].cells["400000"].text() == "3.00 ± 0.14 (n = 2)"
    assert published["imagenet-xl-600ep"].cells["400000"].values == (2.87,)
    assert published["imagenet-xl-600ep"].cells["70000"].values == (6.89,)
    assert published["imagenet-sfd-xl"].cells["400000"].values == (3.53,)
    assert own["imagenet-sfd-xl"].note == "10000 generated images instead of 50000"
    assert table.is_best(own["imagenet-xl-600ep"], "400000")
    assert not table.is_best(published["imagenet-xl-600ep"], "400000")


def test_all_scores_have_the_published_rows_of_table_2(scores):
    table = by_title(tables(collect([scores]).results), "All scores")
    published = [row for row in table.rows if row.kind == "published" and row.label == "imagenet-xl-600ep"]
    guided = next(row for row in published if row.cells["guidance"] and row.cells["step"] == "400,000")
    values = [guided.cells[key].values[0] for key in ("fid", "sfid", "inception_score", "precision", "recall")]
    assert values == [1.14, 3.79, 248.4, 0.78, 0.71]
    own = next(row for row in table.rows if row.kind == "own" and row.cells["guidance"])
    assert own.cells["guidance"] == "AutoGuidance 1.5"
    assert own.cells["evaluations"] == "61"
    assert own.cells["parameters"] == "674.0M"


def test_numbers_that_cannot_be_compared_stand_apart(tmp_path):
    rows = [
        result("imagenet-xl-600ep", 400_000, 2.9),
        result("imagenet-xl-600ep", 400_000, 9.9, count=10_000),
        result("imagenet-xl-600ep", 400_000, 55.0, network="dinov2"),
    ]
    write_json(tmp_path / "scores.json", {"format": "lwd-evaluations/1", "results": rows})
    found = tables(collect([tmp_path]).results)
    assert [table.about for table in found] == [
        f"features of {INCEPTION}, reference VIRTUAL.npz, 50,000 images",
        f"features of {INCEPTION}, reference VIRTUAL.npz, 10,000 images",
        "features of dinov2, reference VIRTUAL.npz, 50,000 images",
    ]
    assert not any(row.kind == "published" for row in found[2].rows)
    assert found[2].columns["fd_dinov2"] == "distance, dinov2"


def test_encoders_side_by_side(tmp_path):
    pca = {"semantic": {"encoder": "pca", "network": {"network": "clip"}}}
    rows = [
        result("imagenet-xl-600ep", 400_000, 2.9),
        result("imagenet-sfd-xl", 400_000, 3.5),
        result("imagenet-clip-pca", 400_000, 4.6, encoders=pca),
    ]
    write_json(tmp_path / "scores.json", {"format": "lwd-evaluations/1", "results": rows})
    table = by_title(tables(collect([tmp_path]).results), "FID by semantic encoder")
    own = {row.label: row for row in table.rows if row.kind == "own"}
    semvae = own["semvae of dinov2 · 400,000 iterations"]
    assert (semvae.cells["learned"].mean, semvae.cells["offset"].mean) == (2.9, 3.5)
    assert own["pca of clip · 400,000 iterations"].cells["learned"].mean == 4.6
    published = {row.note: row for row in table.rows if row.kind == "published"}
    assert published["imagenet-clip-pca: Table 3"].cells["learned"].values == (4.54,)


def test_the_page_and_its_tables(scores, capsys):
    run = scores / "run"
    run.mkdir()
    write_json(run / "schedule.json", LEARNED)
    write_json(run / "latents.json", {})
    write_json(run / "config.json", {"settings": {"recipe": "embedded"}})
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "flow": 2.0, "loss": 2.0}\n{"step": 2, "flow": 1.0, "loss": 1.0}\n{"st'
    )
    samples = scores / "drawn"
    (samples / "images").mkdir(parents=True)
    for i in range(6):
        Image.fromarray(np.full((200, 200, 3), 40 * i, np.uint8)).save(samples / "images" / f"{i:06}.png")
    note = {"format": "lwd-samples/1", "images": 6, "form": "png", "classes": [0, 1], "origin": {"run": "run"}}
    write_json(samples / "samples.json", note)
    npz = scores / "packed"
    npz.mkdir()
    save_npz(npz / "samples.npz", arr_0=np.full((3, 8, 8), 7, np.uint8))
    names = {"class_names": ["a cat", "a dog", "a ship"], "classes": [2, 0, 2]}
    write_json(npz / "samples.json", note | names | {"images": 3, "form": "npz"})
    write_json(scores / "mine.json", {"else": 1})
    out = scores / "page" / "report.html"
    cli.main(f"report --paths {scores} --out {out}".split())
    assert capsys.readouterr().out.strip() == str(out)
    page = out.read_text()
    for heading in ("Scores", "Convergence", "Schedules", "Training", "Samples by class", "What this was made of"):
        assert f"<h2>{heading}</h2>" in page
    assert "<sup>1</sup> Not as ADM’s protocol asks: 10000 generated images instead of 50000." in page
    assert "published, Table 1" in page
    assert "mine.json" in page  # found, but not used
    assert page.count("data:image/png;base64,") == 2
    assert "<li>a cat</li><li>a ship</li>" in page
    assert "packed: 3 images; the first 2 of each class" in page
    assert len(page) < 1_000_000
    stored = json.loads(out.with_suffix(".json").read_text())
    assert stored["tables"][0]["rows"][0]["cells"]["400000"]["values"] == [3.5]
    text = out.with_suffix(".md").read_text()
    assert "| imagenet-xl-600ep · learned · dopri5 | **7.00** | **3.00 ± 0.14 (n = 2)** |" in text
    assert "| *imagenet-xl-600ep, published (Table 1)* | 6.89 | 2.87 |" in text


def test_what_cannot_be_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*absent to report on"):
        collect([tmp_path / "absent"])
    with pytest.raises(ValueError, match="nothing to report on"):
        collect([tmp_path])
    write_json(tmp_path / "else.json", {"format": "other"})
    with pytest.raises(ValueError, match="is no evaluation, sweep or set of samples"):
        collect([tmp_path / "else.json"])
    write_json(tmp_path / "schedule.json", LEARNED)
    with pytest.raises(ValueError, match="is part of a directory"):
        collect([tmp_path / "schedule.json"])
    (tmp_path / "scores.json").write_text('{"format": "lwd-eval')
    with pytest.raises(ValueError, match=r"scores\.json is not readable JSON"):
        write_comparison([tmp_path / "scores.json"], tmp_path / "report.html")


def test_digits():
    assert [digits(x) for x in (248.37, 2.868, 0.7849, 0.0)] == ["248.4", "2.87", "0.785", "0.000"]
    assert Score((1.0, 2.0)).mean == 1.5
