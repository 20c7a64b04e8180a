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
    assert table.is_best(own["imagenet-xl-600ep"], "70000")
    assert not table.is_best(own["imagenet-xl-600ep"], "400000")  # the other one departs from the protocol
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
    assert (semvae.cells["learned"].mean, semvae.cells["offset:0.3"].mean) == (2.9, 3.5)
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
    departing = next(row for row in stored["tables"][0]["rows"] if row["kind"] == "own" and row["note"])
    assert departing["label"] == "imagenet-sfd-xl · offset:0.3 · dopri5"
    assert departing["cells"]["400000"]["values"] == [3.5]  # its complete checkpoint stands in a row of its own
    assert "70000" not in departing["cells"]
    text = out.with_suffix(".md").read_text()
    assert "| imagenet-xl-600ep · learned · dopri5 | **7.00** | 3.00 ± 0.14 (n = 2) |" in text
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


def write(path, *rows):
    write_json(path / "scores.json", {"format": "lwd-evaluations/1", "results": list(rows)})
    return tables(collect([path]).results)


def own(table):
    return [row for row in table.rows if row.kind == "own"]


def test_every_checkpoint_stands_above_what_was_published_for_it(tmp_path):
    found = write(
        tmp_path,
        result("imagenet-xl-600ep", 400_000, 1.2, guidance=GUIDED, batch_size=256),
        result("imagenet-xl-600ep", 3_000_000, 2.2),
        result("imagenet-xl-600ep", 400_000, 1.7, guidance=GUIDED | {"kind": "classifier-free"}),
    )
    guided = by_title(found, "All scores, guided")
    assert [(row.kind, row.cells["fid"].mean) for row in guided.rows[:3]] == [
        ("own", 1.2), ("published", 1.14), ("own", 1.7),
    ]  # fmt: skip
    published = guided.rows[1].cells
    assert [published[key].mean for key in ("sfid", "inception_score", "precision", "recall")] == [
        3.79, 248.4, 0.78, 0.71,
    ]  # fmt: skip
    assert guided.rows[0].cells["epochs"] == published["epochs"] == "80"
    assert published["weak"] == "imagenet-b-weak@70000"
    unguided = next(table for table in found if table.title == "All scores")
    assert [(row.kind, row.cells["fid"].mean) for row in unguided.rows] == [("own", 2.2), ("published", 2.14)]
    assert not unguided.is_best(unguided.rows[0], "fid")  # guided and unguided rows do not compete


def test_the_other_systems_of_the_paper_follow_once(tmp_path):
    guided = by_title(write(tmp_path, result("imagenet-xl-600ep", 400_000, 1.2, guidance=GUIDED)), "All scores, guided")
    others = {row.label: row.cells for row in guided.rows[2:]}
    assert others["REPA-E"]["fid"].mean == 1.12
    assert others["RAE-DiT-DH"]["parameters"] == "839M"
    assert "sfid" not in others["DDT"]
    means = [row.cells["fid"].mean for row in guided.rows if row.label == "imagenet-xl-600ep"]
    assert sorted(means) == [1.02, 1.05, 1.14]  # the row beside ours is not repeated below


def test_table_1_has_the_other_models_at_our_iterations(tmp_path):
    table = by_title(
        write(tmp_path, result("imagenet-xl-600ep", 400_000, 2.9), result("imagenet-xl-600ep", 1_000_000, 2.4)),
        "FID by training iterations",
    )
    published = [(row.label, {key: cell.mean for key, cell in row.cells.items()}) for row in table.rows[1:]]
    assert published == [
        ("imagenet-xl-600ep", {"400000": 2.87, "1000000": 2.37}),
        ("imagenet-sfd-xl", {"400000": 3.53, "1000000": 2.82}),
        ("imagenet-lightningdit", {"400000": 9.29, "1000000": 7.48}),
        ("imagenet-lightningdit-repa", {"400000": 6.94, "1000000": 6.17}),
        ("DiT-XL/2", {"400000": 19.47}),
    ]


def test_only_seeds_are_pooled(tmp_path):
    def probed(kinetic, rho):
        schedule = lwd.PolynomialSchedule(rho=rho).to_dict()
        return schedule | {"provenance": {"probe": {"kinetic": kinetic}}}

    curves = [probed(0.04, [0.5, -2.0, -2.0, -2.0, 1.0]), probed(0.04, [0.6, -2.0, -2.0, -2.0, 1.0])]
    found = write(
        tmp_path,
        result("imagenet-xl-80ep", 400_000, 2.8, seed=0, schedule=curves[0]),
        result("imagenet-xl-80ep", 400_000, 3.0, seed=1, schedule=curves[1]),
        result("imagenet-xl-80ep", 400_000, 3.9, seed=2, schedule=probed(0.1, [0.9, -2.0, -2.0, -2.0, 1.0])),
        result("imagenet-xl-80ep", 400_000, 9.9, seed=3, protocol=["chunk = 10 instead of 5000"]),
        result("imagenet-xl-80ep", 400_000, 4.4, batch_size=512),
        result("imagenet-xl-80ep", 400_000, 4.8, batch_size=128),
        result("imagenet-xl-80ep", 400_000, 4.8, batch_size=128),  # the same set, scored twice
    )
    rows = {row.label: row.cells["fid"].values for row in own(by_title(found, "All scores")) if not row.note}
    assert rows == {
        "imagenet-xl-80ep · learned, λ 0.04 · dopri5": (2.8, 3.0),
        "imagenet-xl-80ep · learned, λ 0.1 · dopri5": (3.9,),
        "imagenet-xl-80ep · learned · dopri5 · batch 512 · 674.0M · semvae of dinov2": (4.4,),
        "imagenet-xl-80ep · learned · dopri5 · batch 128 · 674.0M · semvae of dinov2": (4.8,),
    }
    assert [row.cells["fid"].values for row in own(by_title(found, "All scores")) if row.note] == [(9.9,)]


def test_nothing_published_beside_another_schedule_than_the_recipes(tmp_path):
    found = write(tmp_path, result("imagenet-xl-80ep", 400_000, 3.4, schedule=OFFSET))
    assert [row.kind for row in by_title(found, "All scores").rows] == ["own"]


def test_judges_of_small_data_do_not_mix(tmp_path):
    def judged(judge, distance):
        row = result("embedded", 1400, distance)
        settings = {"judge": {"path": "judge.safetensors", "sha256": judge * 8}, "reference": row.pop("reference")}
        del row["extractor"], row["protocol"]
        return row | {"metrics": {"fd_judge": distance, "precision": 0.7}, "settings": settings}

    found = write(tmp_path, judged("a1", 7.0), judged("b2", 8.0))
    assert [table.about for table in found] == [
        "features of judge a1a1a1a1 of small data, reference VIRTUAL.npz, 50,000 images",
        "features of judge b2b2b2b2 of small data, reference VIRTUAL.npz, 50,000 images",
    ]
    assert list(found[0].columns)[:2] == ["fd_judge", "precision"]


def test_two_lambda_on_one_encoder_are_two_rows(tmp_path):
    probed = LEARNED | {"provenance": {"probe": {"kinetic": 0.02}}}
    pca = {"semantic": {"encoder": "pca", "network": {"network": "clip"}}}
    found = write(
        tmp_path,
        result("imagenet-semvae", 400_000, 2.9, schedule=probed),
        result("imagenet-semvae", 400_000, 3.3, schedule=LEARNED | {"provenance": {"probe": {"kinetic": 0.1}}}),
        result("imagenet-sfd-xl", 400_000, 3.5),
        result("imagenet-clip-pca", 400_000, 4.6, encoders=pca),
    )
    table = by_title(found, "FID by semantic encoder")
    rows = [{key: cell.mean for key, cell in row.cells.items()} for row in own(table)]
    assert rows == [{"learned": 4.6}, {"learned": 2.9, "offset:0.3": 3.5}, {"learned": 3.3}]
    published = [row.cells for row in table.rows if row.kind == "published"]
    assert {"offset:0.3": Score((3.53,))} in published  # in the column of our own offset
    assert list(table.columns) == ["learned", "offset:0.3"]


def test_images_of_unknown_origin_stand_apart(tmp_path):
    stray = result("imagenet-xl-80ep", 400_000, 5.5)
    del stray["generated"]["origin"]
    found = write(tmp_path, stray, result("imagenet-xl-80ep", 400_000, 2.9))
    assert [row.cells["fid"].mean for row in by_title(found, "Images of unknown origin").rows] == [5.5]
    assert [row.cells["fid"].mean for row in own(by_title(found, "All scores"))] == [2.9]


def test_a_damaged_result_is_named(tmp_path):
    write_json(tmp_path / "scores.json", {"format": "lwd-evaluations/1", "results": [{"metrics": {"fid": 1.0}}]})
    with pytest.raises(ValueError, match=r"scores\.json is a damaged file of evaluations"):
        collect([tmp_path])


def test_runs_of_one_name_are_lines_of_their_own(tmp_path):
    for seed, name in (("seed0", "main"), ("seed1", "main"), ("seed0", "weak")):
        folder = tmp_path / seed / name
        folder.mkdir(parents=True)
        write_json(folder / "config.json", {"settings": {}})
        write_json(folder / "schedule.json", LEARNED)
        write_json(folder / "latents.json", {})
        rows = [{"step": step, "loss": 1.0, "flow": 1 / step} for step in (1, 2, 3)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_comparison([tmp_path], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for label in ("seed0/main", "seed1/main", "weak"):
        assert page.count(f">{label}<") >= 1, label
