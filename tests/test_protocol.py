"""Image sources, stored features, references and the five scores, with networks whose features are known."""

import gc
import json
import math
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lwd.evaluation import (
    ADM,
    FeatureStatistics,
    FunctionExtractor,
    ImageFeatures,
    PrecisionRecall,
    ProtocolSettings,
    extract_features,
    frechet_distance,
    inception_score,
    load_reference,
    open_images,
    precision_recall,
    protocol,
    score_images,
)
from lwd.evaluation.images import NpzImages, PNGFolder, TensorImages
from lwd.evaluation.inception import NAME as INCEPTION
from lwd.files import write_json


def pictures(count: int, seed: int = 0, size: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).byte()


def corner(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Three pixels' colours, a row, and logits that a class of ten can be read from."""
    x = images.float() / 255
    return {
        "pool": torch.cat([x[:, :, 0, 0], x[:, :, 3, 3]], dim=1),
        "spatial": x[:, 0, 0],
        "logits": 30 * torch.nn.functional.one_hot(images[:, 0, 0, 0].long() % 10, 10).float(),
    }


class Counting:
    """Names, a hash, and how many images went through."""

    def __init__(self, name: str = "corner", sha256: str = "c0ffee00", function=corner) -> None:
        self.name, self.sha256, self.function = name, sha256, function
        self.settings: dict[str, object] = {"resize": "none"}
        self.seen = 0

    def features(self, images: torch.Tensor):
        self.seen += len(images)
        return self.function(images)


def write_pngs(folder: Path, images: torch.Tensor) -> Path:
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:06}.png")
    return folder


def write_npz(path: Path, images: torch.Tensor, save=np.savez, **arrays: np.ndarray) -> Path:
    save(path, images.permute(0, 2, 3, 1).numpy(), **arrays)  # unnamed: arr_0
    return path


# --- images -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_every_source_gives_the_same_images_in_order(tmp_path, size):
    images = pictures(7)
    sources = [
        images,
        images.permute(0, 2, 3, 1).numpy(),
        write_npz(tmp_path / "stored.npz", images),
        write_npz(tmp_path / "packed.npz", images, np.savez_compressed),
        write_pngs(tmp_path / "pngs", images),
    ]
    opened = [open_images(source) for source in sources]
    for source in opened:
        assert (len(source), source.shape) == (7, (3, 8, 8))
        batches = list(source.batches(size))
        assert {len(batch) for batch in batches[:-1]} <= {size}
        assert torch.equal(torch.cat(batches), images)
    assert len({source.sha256() for source in opened[:4]}) == 1  # by content, wherever it is kept
    assert open_images(images.flip(0)).sha256() != opened[0].sha256()
    assert open_images(opened[0]) is opened[0]


def test_stored_npz_is_mapped_and_not_read_whole(tmp_path, monkeypatch):
    path = write_npz(tmp_path / "stored.npz", pictures(5), labels=np.arange(5))
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("read whole"))
    source = NpzImages(path)
    assert source._offset is not None
    assert torch.equal(next(source.batches(2)), pictures(5)[:2])


def test_grey_images_keep_one_channel_and_get_three_among_images_in_colour(tmp_path):
    grey = pictures(4)[:, 0]
    np.savez(tmp_path / "grey.npz", images=grey.numpy(), labels=np.arange(4))
    assert torch.equal(next(open_images(tmp_path / "grey.npz").batches(4)), grey[:, None])
    folder = tmp_path / "grey"
    folder.mkdir()
    for i, image in enumerate(grey):
        Image.fromarray(image.numpy()).save(folder / f"{i}.png")
    opened = PNGFolder(folder)
    assert opened.shape == (1, 8, 8)
    assert torch.equal(next(opened.batches(4)), grey[:, None])
    colour = pictures(1)[0]
    Image.fromarray(colour.permute(1, 2, 0).numpy()).save(folder / "4.png")
    mixed = torch.cat(list(PNGFolder(folder).batches(2)))
    assert torch.equal(mixed, torch.cat([grey[:, None].expand(-1, 3, -1, -1), colour[None]]))


def test_bad_images_are_named(tmp_path):
    folder = write_pngs(tmp_path / "pngs", pictures(5))
    (folder / "000003.png").write_bytes(b"\x89PNG no")
    with pytest.raises(ValueError, match=r"000003\.png cannot be read"):
        list(open_images(folder).batches(2))
    Image.fromarray(np.zeros((4, 8, 3), np.uint8)).save(folder / "000003.png")
    with pytest.raises(ValueError, match=r"000003\.png has 8x4 pixels, 000000\.png 8x8"):
        list(open_images(folder).batches(2))
    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(folder / "000003.png")
    with pytest.raises(ValueError, match=r"000003\.png .* mode is RGBA"):
        list(open_images(folder).batches(2))


def test_what_holds_no_images_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no PNG files$"):
        open_images(tmp_path / "empty")
    (tmp_path / "empty" / "a.jpg").touch()
    with pytest.raises(ValueError, match=r"no PNG files \(but \.jpg\)"):
        open_images(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="absent"):
        open_images(tmp_path / "absent")
    with pytest.raises(ValueError, match="neither a folder"):
        open_images(tmp_path / "empty" / "a.jpg")
    path = tmp_path / "x.npz"
    np.savez(path, mu=np.zeros(3))
    with pytest.raises(ValueError, match="no array arr_0 or images, only mu"):
        open_images(path)
    np.savez(path, np.zeros((2, 8, 8, 3)))
    with pytest.raises(ValueError, match=r"arr_0 must be uint8 .* got float64 \[2, 8, 8, 3\]"):
        open_images(path)
    np.savez(path, np.zeros((2, 3, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="8 channels in its last axis"):
        open_images(path)
    path.write_bytes(write_npz(tmp_path / "good.npz", pictures(9)).read_bytes()[:200])
    with pytest.raises(ValueError, match=r"x\.npz is not an npz of images or is damaged"):
        open_images(path)
    with pytest.raises(ValueError, match=r"uint8 \[N, C, H, W\].*float32"):
        open_images(torch.zeros(1, 3, 8, 8))


# --- sets that `lwd sample` wrote ---------------------------------------------------------------------------------

ORIGIN = {"run": "runs/xl", "step": 400_000, "schedule": {"kind": "polynomial"}, "evaluations": 61.5}


def write_samples(directory: Path, images: torch.Tensor, form: str, **changed: object) -> Path:
    directory.mkdir(parents=True)
    write_json(directory / "config.json", {"command": "lwd sample runs/xl --out fakes", "settings": {}})
    if form == "png":
        write_pngs(directory / "images", images)
    elif form == "npz":
        write_npz(directory / "samples.npz", images, arr_1=np.arange(len(images)) % 3)
    note = {"format": "lwd-samples/1", "images": len(images), "form": form, "classes": [0, 1, 2], "origin": ORIGIN}
    write_json(directory / "samples.json", note | changed)
    return directory


@pytest.mark.parametrize("form", ["png", "npz"])
def test_samples_are_scored_with_their_origin(tmp_path, form):
    images, real = pictures(20), pictures(40, seed=1)
    path = write_samples(tmp_path / "fakes", images, form)
    source = open_images(path)
    assert torch.equal(torch.cat(list(source.batches(7))), images)
    result = score_images(path, real, Counting(), cache=tmp_path / "cache")
    assert result.to_dict()["generated"] == {
        "name": str(path),
        "sha256": source.sha256(),
        "count": 20,
        "shape": [3, 8, 8],
        "origin": ORIGIN,
    }
    assert result.metrics == score_images(images, real, Counting()).metrics
    # The same images out of the cache: once with their origin, once without.
    again = write_samples(tmp_path / "again", images, form, origin={"run": "runs/other"})
    assert score_images(again, real, Counting(), cache=tmp_path / "cache").generated["origin"] == {"run": "runs/other"}
    bare = again / ("images" if form == "png" else "samples.npz")
    assert "origin" not in score_images(bare, real, Counting(), cache=tmp_path / "cache").generated


def test_samples_that_are_not_all_there_are_refused(tmp_path):
    path = write_samples(tmp_path / "fakes", pictures(5), "png")
    (path / "images" / "000002.png").unlink()
    with pytest.raises(ValueError, match=r"fakes has 4 images, its samples\.json says 5: files were added or lost"):
        open_images(path)
    (path / "samples.json").unlink()
    with pytest.raises(ValueError, match=r"unfinished set .* run its command again: lwd sample runs/xl --out fakes"):
        open_images(path)
    (path / "config.json").write_text('{"_class_name": "Another"}')  # not ours: images with a note beside them
    assert len(open_images(path)) == 4
    with pytest.raises(ValueError, match=r"latents, which have to be decoded .* without `--form latents`"):
        open_images(write_samples(tmp_path / "latents", pictures(5), "latents"))
    with pytest.raises(ValueError, match="says form 'gif'; there are png, npz and latents"):
        open_images(write_samples(tmp_path / "gif", pictures(5), "gif"))
    with pytest.raises(ValueError, match="is not of the format lwd-samples/1"):
        open_images(write_samples(tmp_path / "new", pictures(5), "png", format="lwd-samples/7"))
    write_pngs(tmp_path / "run" / "samples", pictures(2))
    write_json(tmp_path / "run" / "config.json", {"command": "lwd train --recipe embedded", "settings": {}})
    with pytest.raises(ValueError, match=r"is what `lwd train --recipe embedded` wrote, not a set of images"):
        open_images(tmp_path / "run")


# --- features and their cache -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_features_and_statistics_do_not_depend_on_the_batch(batch_size):
    images = pictures(30)
    calls: list[tuple[int, int]] = []
    features = extract_features(images, Counting(), batch_size=batch_size, progress=lambda *x: calls.append(x))
    expected = corner(images)
    assert torch.equal(features.pool, expected["pool"])
    assert torch.equal(features.logits, expected["logits"])
    for key in ("pool", "spatial"):
        statistics = features.statistics[key]
        assert statistics.count == 30
        torch.testing.assert_close(statistics.mean, expected[key].double().mean(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(statistics.cov, torch.cov(expected[key].double().T), rtol=1e-9, atol=1e-12)
    assert calls[-1] == (30, 30)


def test_features_are_computed_once_per_content_network_and_settings(tmp_path):
    images, cache = pictures(12), tmp_path / "cache"
    network = Counting()
    first = extract_features(images, network, cache=cache)
    again = extract_features(write_npz(tmp_path / "same.npz", images), network, cache=cache)
    assert network.seen == 12
    assert torch.equal(first.pool, again.pool)
    assert torch.equal(first.logits, again.logits)
    assert again.images["name"] == str(tmp_path / "same.npz")
    torch.testing.assert_close(again.statistics["spatial"].cov, first.statistics["spatial"].cov, rtol=1e-14, atol=0)
    extract_features(pictures(12, seed=1), network, cache=cache)  # other images,
    other = Counting(sha256="0ther")  # other weights,
    extract_features(images, other, cache=cache)
    network.settings = {"resize": "bicubic"}  # other settings
    extract_features(images, network, cache=cache)
    assert (network.seen, other.seen) == (36, 12)
    assert len(list(cache.iterdir())) == 4


def test_damaged_cache_is_noticed_and_replaced(tmp_path):
    images, network = pictures(12), Counting()
    expected = extract_features(images, network, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-5] ^= 1  # one bit of one number
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="hash they were written with"):
        features = extract_features(images, network, cache=tmp_path)
    assert network.seen == 24
    assert torch.equal(features.pool, expected.pool)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract_features(images, network, cache=tmp_path)
    assert network.seen == 24


def test_next_batch_is_read_while_one_is_computed_with():
    """Each waits for the other: taken in turns, neither would ever go on."""
    third_is_read, first_is_seen = threading.Event(), threading.Event()

    class Waiting(TensorImages):
        def batches(self, size):
            for i, batch in enumerate(super().batches(size)):
                if i == 2:
                    third_is_read.set()
                yield batch

    def function(images):
        if first_is_seen.is_set():
            assert third_is_read.wait(10)
        first_is_seen.set()
        return corner(images)

    images = pictures(12)
    features = extract_features(Waiting(images), FunctionExtractor("x", "0", function), batch_size=4)
    assert torch.equal(features.pool, corner(images)["pool"])


def test_errors_of_reading_reach_the_caller_and_leave_no_thread(tmp_path):
    folder = write_pngs(tmp_path / "pngs", pictures(9))
    (folder / "000007.png").write_bytes(b"\x89PNG no")
    before = threading.active_count()
    with pytest.raises(ValueError, match=r"000007\.png cannot be read"):
        extract_features(folder, Counting(), batch_size=2)
    with pytest.raises(ZeroDivisionError):
        extract_features(folder, FunctionExtractor("x", "0", lambda _: 1 / 0), batch_size=2)
    gc.collect()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_bad_features_name_the_image():
    def broken(images):
        pool = corner(images)["pool"]
        pool[images[:, 0, 0, 0] == 7] = math.nan
        return pool

    images = pictures(20)
    images[:, 0, 0, 0] = torch.arange(20)
    with pytest.raises(ValueError, match=r"NaN or infinite for 1 of images 5 to 9 of tensor, first for image 7"):
        extract_features(images, FunctionExtractor("broken", "0", broken), batch_size=5)
    with pytest.raises(ValueError, match="tensor has 1 image"):
        extract_features(images[:1], Counting())
    with pytest.raises(ValueError, match=r"'pool' must have shape \[20, features\], got \[20, 3, 8, 8\]"):
        extract_features(images, FunctionExtractor("raw", "0", lambda x: x.float()))
    with pytest.raises(ValueError, match=r"no 'pool' features, only \['logits'\]"):
        extract_features(images, FunctionExtractor("raw", "0", lambda x: {"logits": x.float().flatten(1)}))


# --- scores -------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_features():
    real, fake = pictures(40), pictures(60, seed=1)
    result = score_images(fake, real, Counting(), settings=ProtocolSettings(distances="float64"))
    a, b = corner(real), corner(fake)
    near = precision_recall(a["pool"], b["pool"])
    assert result.metrics == {
        "fd_corner": pytest.approx(frechet_distance(a["pool"], b["pool"]), rel=1e-10),
        "sfd_corner": pytest.approx(frechet_distance(a["spatial"], b["spatial"]), rel=1e-10),
        "inception_score_corner": pytest.approx(inception_score(b["logits"].double().softmax(1)), rel=1e-12),
        "precision_corner": near.precision,
        "recall_corner": near.recall,
    }
    assert 0 < near.precision < 1


def test_result_tells_all(tmp_path):
    real, fake = write_npz(tmp_path / "real.npz", pictures(40)), write_pngs(tmp_path / "fake", pictures(60, seed=1))
    result = score_images(fake, real, Counting())
    written = json.loads(result.save(tmp_path / "scores.json").read_text())
    assert written["metrics"] == result.metrics
    assert written["protocol"] == list(result.deviations)
    assert written["settings"]["k"] == 3
    assert written["settings"]["seed"] == 0
    assert written["extractor"] == {"name": "corner", "sha256": "c0ffee00", "settings": {"resize": "none"}}
    assert written["generated"] == {
        "name": str(fake),
        "sha256": open_images(fake).sha256(),
        "count": 60,
        "shape": [3, 8, 8],
    }
    assert written["reference"]["sha256"] == open_images(real).sha256()
    assert written["reference"]["statistics_count"] == 40
    assert written["versions"]["torch"] == torch.__version__
    assert "processor" in written["machine"]


class PretendInception(Counting):
    def __init__(self) -> None:
        super().__init__(INCEPTION, "6726825d" + "0" * 56)


def adm_reference(path: Path, images: torch.Tensor, full: torch.Tensor) -> Path:
    """`images` in arr_0, statistics of the larger set `full`."""
    features = corner(full)
    arrays = {}
    for suffix, key in (("", "pool"), ("_s", "spatial")):
        statistics = FeatureStatistics.of(features[key])
        arrays |= {f"mu{suffix}": statistics.mean.numpy(), f"sigma{suffix}": statistics.cov.numpy()}
    return write_npz(path, images, **arrays)


def test_adm_reference_gives_statistics_of_the_full_set_and_images_for_recall(tmp_path):
    full, fake = pictures(200), pictures(60, seed=1)
    path = adm_reference(tmp_path / "reference.npz", full[:30], full)
    result = score_images(fake, path, PretendInception(), settings=ProtocolSettings(distances="float64"))
    a, b = corner(full), corner(fake)
    near = precision_recall(a["pool"][:30], b["pool"])
    assert result.metrics == {
        "fid": pytest.approx(frechet_distance(a["pool"], b["pool"]), rel=1e-6),
        "sfid": pytest.approx(frechet_distance(a["spatial"], b["spatial"]), rel=1e-6),
        "inception_score": pytest.approx(inception_score(b["logits"].double().softmax(1)), rel=1e-12),
        "precision": near.precision,
        "recall": near.recall,
    }
    assert result.reference["kind"] == "ADM reference"
    assert result.reference["statistics_count"] is None
    assert result.deviations == (
        "60 generated images instead of 50000",
        "precision and recall with 30 reference images instead of 10000",
    )
    # With another network Inception's statistics mean nothing: they are computed from arr_0.
    other = score_images(fake, path, Counting())
    assert other.metrics["fd_corner"] == pytest.approx(frechet_distance(a["pool"][:30], b["pool"]), rel=1e-9)


def stored(count: int, seed: int, spread: float = 1.0) -> ImageFeatures:
    """Random features by what calls itself the published Inception."""
    generator = torch.Generator().manual_seed(seed)
    pool = spread * torch.randn(count, 4, generator=generator)
    statistics = {key: FeatureStatistics.of(pool) for key in ("pool", "spatial")}
    network = PretendInception()
    extractor = {"name": network.name, "sha256": network.sha256, "settings": {"tf32": False}}
    images = {"name": "stored", "sha256": "0", "count": count, "shape": [3, 256, 256]}
    return ImageFeatures(extractor, images, pool, torch.randn(count, 5, generator=generator), statistics)


@pytest.fixture(scope="module")
def fifty_thousand():
    return stored(ADM.images, 1)


def test_protocol_is_complete_when_everything_is_as_asked(fifty_thousand, monkeypatch):
    monkeypatch.setattr(protocol, "precision_recall", lambda a, b, k, **_: protocol_shares(len(a), len(b), k))
    result = score_images(fifty_thousand, stored(ADM.images, 2), PretendInception())
    assert result.to_dict()["protocol"] == "complete"
    assert list(result.metrics) == ["fid", "sfid", "inception_score", "precision", "recall"]
    assert (result.metrics["precision"], result.metrics["recall"]) == (10_000, 50_000)


def protocol_shares(reference: int, generated: int, k: int) -> PrecisionRecall:
    """Instead of a minute of distances: the counts that they would be of."""
    assert k == 3
    return PrecisionRecall(reference, generated)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"k": 5}, "k = 5 instead of 3"),
        ({"chunk": 100}, "chunk = 100 instead of 5000"),
        ({"shuffle": False}, "shuffle = False instead of True"),
        ({"reference_images": 20}, "precision and recall with 20 reference images instead of 10000"),
        ({"distances": "float16"}, "float16 distances would overflow; float32 was used throughout"),
    ],
)
def test_deviations_are_listed(settings, expected):
    result = score_images(
        stored(50, 1, 1e3), stored(60, 2, 1e3), PretendInception(), settings=ProtocolSettings(**settings)
    )
    assert expected in result.deviations
    assert "reference statistics of 60 images; below 50000 they are biased" in result.deviations
    if "distances" in settings:
        assert result.settings["distances"] == "float32"


def test_half_precision_distances_reach_the_result():
    a, b = stored(50, 1), stored(60, 2)
    result = score_images(a, b, PretendInception(), settings=ProtocolSettings(distances="float16"))
    assert result.settings["distances"] == "float16"
    expected = precision_recall(b.pool, a.pool, distances="float16")
    assert (result.metrics["precision"], result.metrics["recall"]) == expected


def test_shuffle_saves_the_inception_score_of_class_ordered_samples():
    images = pictures(1000)
    images[:, 0, 0, 0] = torch.arange(1000) // 100
    scores = {}
    for shuffle, seed in ((True, 0), (True, 1), (False, 0)):
        settings = ProtocolSettings(chunk=250, shuffle=shuffle, seed=seed)
        metrics = score_images(images, images, Counting(), settings=settings).metrics
        scores[shuffle, seed] = metrics["inception_score_corner"]
    assert scores[True, 0] == pytest.approx(10, rel=0.05)
    assert scores[True, 0] != scores[True, 1]
    assert scores[False, 0] < 3.1  # two or three classes in each chunk


def test_reference_choice():
    reference = load_reference(stored(60, 2), PretendInception())
    assert torch.equal(reference.choose(20, "first", 0), reference.pool[:20])
    chosen = reference.choose(20, "random", 0)
    assert len(chosen.unique(dim=0)) == 20
    assert torch.equal(chosen, reference.choose(20, "random", 0))
    assert not torch.equal(chosen, reference.choose(20, "random", 1))
    assert torch.equal(reference.choose(100, "random", 0), reference.pool)


def test_stored_statistics_and_features_as_reference(tmp_path):
    real, fake = pictures(40), pictures(60, seed=1)
    features = extract_features(real, Counting())
    full = score_images(fake, real, Counting()).metrics
    assert score_images(fake, features.save(tmp_path / "f.safetensors"), Counting()).metrics == pytest.approx(full)
    result = score_images(fake, features.statistics["pool"].save(tmp_path / "s.safetensors"), Counting())
    assert result.metrics["fd_corner"] == pytest.approx(full["fd_corner"], rel=1e-9)
    assert not {"precision", "precision_corner", "recall_corner"} & result.metrics.keys()
    assert "no precision and recall: the reference is statistics alone, without images" in result.deviations
    direct = score_images(fake, features.statistics["pool"], Counting())
    assert direct.metrics["fd_corner"] == result.metrics["fd_corner"]


def test_one_reference_serves_several_sets():
    network = Counting()
    reference = load_reference(pictures(40), network)
    scores = [score_images(pictures(20, seed), reference, network).metrics["fd_corner"] for seed in (0, 1)]
    assert network.seen == 80
    assert scores[1] == score_images(pictures(20, 1), pictures(40), Counting()).metrics["fd_corner"]


def test_references_that_do_not_fit_are_refused(tmp_path):
    fake = pictures(20)
    with pytest.raises(ValueError, match=r"reference tensor has images of 16x16 pixels, tensor of 8x8"):
        score_images(fake, pictures(20, size=16), Counting())
    features = extract_features(fake, Counting(sha256="0ther000"))
    with pytest.raises(ValueError, match=r"features of corner \(0ther000\.\.\.\).* corner \(c0ffee00"):
        score_images(fake, features, Counting())
    with pytest.raises(ValueError, match="statistics of 3 pool features, corner gives 6"):
        score_images(fake, FeatureStatistics(torch.zeros(3), torch.eye(3), 9), Counting())
    path = tmp_path / "r.npz"
    np.savez(path, mu=np.zeros(6), sigma=np.eye(6))
    with pytest.raises(ValueError, match="Inception's statistics alone, which say nothing about corner"):
        score_images(fake, path, Counting())
    np.savez(path, weights=np.zeros(6))
    with pytest.raises(ValueError, match="no reference: it holds weights; a reference npz has"):
        score_images(fake, path, PretendInception())
    np.savez(path, mu=np.zeros(6))
    with pytest.raises(ValueError, match=r"not a reference npz or is damaged.*sigma"):
        score_images(fake, path, PretendInception())
    np.savez(path, mu=np.full(6, math.nan), sigma=np.eye(6))
    with pytest.raises(ValueError, match="the mean hold 6 values that are NaN"):
        score_images(fake, path, PretendInception())
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        score_images(fake, tmp_path / "absent.safetensors", Counting())
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="does not hold feature statistics"):
        score_images(fake, tmp_path / "x.safetensors", Counting())


def test_references_of_another_kind_are_refused(tmp_path):
    fake = pictures(20)
    # Latents, encoded or drawn, in each of the forms that they lie on disk in.
    shards = tmp_path / "latents"
    shards.mkdir()
    save_file({"latents": torch.zeros(2, 32, 16, 16)}, shards / "shard.safetensors")
    with pytest.raises(ValueError, match=r"shard\.safetensors holds latents; a reference is made of images"):
        score_images(fake, shards / "shard.safetensors", Counting())
    with pytest.raises(ValueError, match=r"no PNG files \(but \.safetensors\); latents have to be decoded"):
        score_images(fake, shards, Counting())
    write_json(shards / "manifest.json", {"format": "lwd-latents/1"})
    with pytest.raises(ValueError, match=r"latents is a set of latents; give the images that it was encoded from"):
        score_images(fake, shards, Counting())
    np.savez(tmp_path / "z.npz", np.zeros((2, 4, 32, 32), np.float32))
    with pytest.raises(ValueError, match=r"got float32 \[2, 4, 32, 32\]; latents have to be decoded"):
        score_images(fake, tmp_path / "z.npz", PretendInception())
    # Grey against colour, either way around.
    with pytest.raises(ValueError, match=r"^tensor is grey, .*real\.npz in colour"):
        score_images(fake[:, :1], write_npz(tmp_path / "real.npz", fake), Counting(function=first_pixel))
    with pytest.raises(ValueError, match=r"^.*grey\.npz is grey, tensor in colour"):
        score_images(fake, write_npz(tmp_path / "grey.npz", fake[:, :1]), Counting(function=first_pixel))
    # Inception's statistics, loaded for Inception, with features that happen to be as wide.
    np.savez(tmp_path / "r.npz", mu=np.zeros(6), sigma=np.eye(6))
    reference = load_reference(tmp_path / "r.npz", PretendInception())
    with pytest.raises(ValueError, match=r"r\.npz holds Inception's statistics, which say nothing about corner"):
        score_images(fake, reference, Counting())


def first_pixel(images: torch.Tensor) -> torch.Tensor:
    return {"pool": images[:, 0, :2, 0].float()}


def test_adm_reference_without_images_is_scored_without_neighbours(tmp_path):
    full, fake = pictures(200), pictures(60, seed=1)
    path = adm_reference(tmp_path / "reference.npz", full[:30], full)
    whole = score_images(fake, path, PretendInception()).metrics
    with np.load(path) as arrays:
        np.savez(tmp_path / "bare.npz", **{key: arrays[key] for key in ("mu", "sigma", "mu_s", "sigma_s")})
        np.savez(tmp_path / "fid.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    bare = score_images(fake, tmp_path / "bare.npz", PretendInception())
    assert bare.metrics == {key: whole[key] for key in ("fid", "sfid", "inception_score")}
    assert bare.reference["images"] is None
    assert bare.deviations == (
        "60 generated images instead of 50000",
        "no precision and recall: the reference is statistics alone, without images",
    )
    alone = score_images(fake, tmp_path / "fid.npz", PretendInception())
    assert set(alone.metrics) == {"fid", "inception_score"}
    assert "no sfid: the reference has no statistics of spatial features" in alone.deviations


@pytest.mark.parametrize("count", [30, 50, 70])
def test_another_number_of_images_is_scored_and_marked(count):
    real, fake = pictures(40), pictures(count, seed=1)
    asked = ProtocolSettings(images=50, reference_images=40)
    other = score_images(fake, real, Counting(), settings=asked)
    assert other.metrics["fd_corner"] > 0
    # With another network: that it is another, once, and what these settings asked for.
    marks = [] if count == 50 else [f"{count} generated images instead of 50"]
    biased = "reference statistics of 40 images; below 50 they are biased"
    assert other.to_dict()["protocol"] == [f"features of corner instead of {INCEPTION}", *marks, biased]
    # With Inception: ADM's number whatever was asked for, and that.
    ours = score_images(fake, real, PretendInception(), settings=asked)
    marks = [] if count == 50 else [f"{count} generated images where 50 were asked for"]
    assert ours.deviations[: 1 + len(marks)] == (f"{count} generated images instead of 50000", *marks)
    assert "precision and recall with 40 reference images instead of 10000" in ours.deviations


def test_another_network_has_no_protocol_to_fail():
    settings = ProtocolSettings(images=30, reference_images=20, k=5, chunk=10, shuffle=False)
    result = score_images(pictures(30), pictures(40), Counting(), settings=settings)
    assert result.deviations == (f"features of corner instead of {INCEPTION}",)


def test_too_few_images_for_neighbours_are_scored_without(tmp_path):
    result = score_images(pictures(3), pictures(40), Counting())
    assert not {"precision", "precision_corner", "recall_corner"} & result.metrics.keys()
    assert "no precision and recall: they need more than k = 3 images in each set" in result.deviations


def test_settings_are_checked():
    with pytest.raises(ValueError, match="at least 1"):
        ProtocolSettings(k=0)
    with pytest.raises(ValueError, match="first or random"):
        ProtocolSettings(reference_choice="last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="float64, float32 or float16"):
        ProtocolSettings(distances="half")  # type: ignore[arg-type]
