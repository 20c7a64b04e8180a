"""`lwd evaluate`: scores of generated images, or of the models that generate them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lwd.cli.options import DrawOptions, ModelOptions

FORMAT = "lwd-evaluations/1"


def evaluate(
    samples: tuple[Path, ...],
    reference: Path,
    out: Path | None = None,
    network: str = "inception",
    weights: Path | None = None,
    judge: Path | None = None,
    cache: Path | None = None,
    images: int = 50_000,
    reference_images: int = 10_000,
    distances: Literal["float32", "float64", "float16"] = "float32",
    shuffle: bool = True,
    shuffle_seed: int = 0,
    feature_batch: int = 64,
    at_step: tuple[int, ...] = (),
    drawn: Path = Path("runs/drawn"),
    keep: bool = False,
    model: ModelOptions = ModelOptions(),  # noqa: B008 (frozen)
    draw: DrawOptions = DrawOptions(),  # noqa: B008
) -> None:
    """Score images, or models: FID, sFID, inception score, precision and recall, by ADM's protocol.

    Models are sampled first, as `lwd sample` does it: by all processes under torchrun, and going on where an
    interrupted command stopped. Several models or steps give a curve (`lwd report` draws it). What was computed
    otherwise than the protocol asks, fewer images for example, is listed in the result.

    Args:
        samples: what to score: directories of `lwd sample`, folders of PNGs, npz files of ADM's form; or models: runs,
            saved pipelines, SFD checkpoints.
        reference: npz of ADM (VIRTUAL_imagenet256_labeled.npz), or another set of images.
        out: JSON file for the results: metrics, every setting, hashes, counts; printed where it is not given.
        network: whose features are compared: inception; dinov2 for FD-DINOv2; dinov2-s, dinov2-b, dinov2-l, clip-l;
            efficientnet for small images; a transformers model by path or hub name.
        weights: of the network; by default where torch or the hub keep their downloads.
        judge: judge.safetensors of a demo: compare small data by it and the embedded network instead; the reference is
            then an npz with images and labels.
        cache: directory that features are kept in by content, so that a reference is computed once.
        images: how many generated images the protocol asks for; so many are drawn of a model.
        reference_images: how many reference images precision and recall are of.
        distances: arithmetic of precision and recall; float16 rounds as ADM does.
        shuffle: shuffle the samples before the inception score cuts them into chunks.
        shuffle_seed: of the shuffle.
        feature_batch: images at a time for the network.
        at_step: of runs: the averaged weights after these steps, one result each, instead of the finished model.
        drawn: directory for the images that are drawn of models.
        keep: keep those images after they are scored.
    """
    import json
    import shutil

    from lwd.data.sharding import Share
    from lwd.files import write_json
    from lwd.generation import sample_to_directory

    main = Share.from_environment().rank == 0
    score = None
    settings: dict[str, Any] = {
        "images": images, "reference_images": reference_images, "distances": distances,
        "shuffle": shuffle, "seed": shuffle_seed,
    }  # fmt: skip
    if main:  # what is missing is better found before days of drawing
        if judge is not None:
            score = _judge(reference, judge, model.device)
        else:
            score = _protocol(reference, network, weights, model.device, settings, feature_batch, cache)
    earlier = [] if out is None or not out.is_file() else _results_in(out)
    results: list[dict[str, Any]] = []

    asked = {} if judge is not None else settings | {"network": network}

    def keep_result(result: dict[str, Any]) -> None:
        results.append(result | {"settings": asked | result["settings"]})
        if out is not None:  # after every set: a curve takes days. What is there of other sets stays
            new = [_what_was_scored(result) for result in results]
            kept = [result for result in earlier if _what_was_scored(result) not in new]
            write_json(out, {"format": FORMAT, "results": results + kept})

    for source in samples:
        if not _is_model(source):
            if at_step:
                raise ValueError(f"--at-step chooses among the weights of a run; {source} holds images")
            if score is not None:
                keep_result(score(source))
            continue
        for step in at_step or (None,):
            pipeline = model.open(source, step)
            if (known := _scored(earlier, draw.config.describe(pipeline), images, str(reference), asked)) is not None:
                results.append(known)
                continue
            name = "-".join([*source.parts[-2:], *([] if step is None else [f"{step:08}"])]).strip("/")
            summary = sample_to_directory(
                pipeline, drawn / name, draw.config, images=images, form="npz", batch=draw.batch,
                title=f"sample {name}",
            )  # fmt: skip
            if summary is not None and score is not None:
                keep_result(score(drawn / name))
                if not keep:
                    shutil.rmtree(drawn / name)
    if results and main:
        print(json.dumps(results, indent=2) if out is None else "\n".join(_table(results)))


def _results_in(out: Path) -> list[dict[str, Any]]:
    from lwd.files import read_json

    content = read_json(out)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{out} is there already and holds no results of lwd evaluate; choose another --out")
    found: list[dict[str, Any]] = content["results"]
    return found


def _origin(result: dict[str, Any]) -> dict[str, Any]:
    """What the images of a result were drawn with; how many evaluations that took is known only afterwards."""
    origin = result["generated"].get("origin") or {}
    return {key: value for key, value in origin.items() if key != "evaluations"}


def _reference_of(result: dict[str, Any]) -> str:
    name: str = (result.get("reference") or result["settings"]["reference"])["name"]
    return name


def _what_was_scored(result: dict[str, Any]) -> list[Any]:
    generated = result["generated"]
    name = None if _origin(result) else generated["name"]  # where images of a model lay for a while says nothing
    return [name, _origin(result), generated["count"], _reference_of(result), result["settings"]]


def _scored(
    earlier: list[dict[str, Any]], origin: dict[str, Any], images: int, reference: str, settings: dict[str, Any]
) -> dict[str, Any] | None:
    """The result of an earlier, interrupted call for images of this origin, with the same reference and settings."""
    for result in earlier:
        generated = result["generated"]
        same = all(result["settings"].get(key) == value for key, value in settings.items())
        if _origin(result) == origin and generated["count"] == images and same and _reference_of(result) == reference:
            return result
    return None


def _table(results: list[dict[str, Any]]) -> list[str]:
    """A line per set: its name, how many images, and its metrics; what is not as the protocol asks below."""
    names = list(dict.fromkeys(metric for result in results for metric in result["metrics"]))
    rows = [["", "images", *names]]
    for result in results:
        generated = result["generated"]
        step = (generated.get("origin") or {}).get("step")
        name = Path(generated["name"]).name if step is None else f"{Path(generated['origin']['run']).name}, step {step}"
        values = [result["metrics"].get(metric) for metric in names]
        rows.append([name, str(generated["count"]), *("-" if value is None else f"{value:.4g}" for value in values)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    notes = dict.fromkeys(note for r in results if isinstance(r.get("protocol"), list) for note in r["protocol"])
    return [*lines, *(["not as the protocol asks: " + "; ".join(notes)] if notes else [])]


def _is_model(path: Path) -> bool:
    """Whether images are to be drawn from `path`, instead of read."""
    from lwd.hub import looks_like_repository

    if path.is_dir():
        own = (path / "model.safetensors").is_file() and (path / "schedule.json").is_file()
        return own or (path / "model").is_dir() or (path / "checkpoints").is_dir()
    if path.is_file():
        return path.suffix in (".pt", ".pth", ".ckpt", ".safetensors")
    return looks_like_repository(str(path)) and path.suffix != ".npz"


def _protocol(
    reference: Path,
    network: str,
    weights: Path | None,
    device: str,
    settings: dict[str, Any],
    batch: int,
    cache: Path | None,
) -> Any:
    """A function of a set of images that gives its scores by ADM's protocol, with the features of `network`."""
    from lwd.evaluation import ProtocolSettings, feature_extractor, load_reference, score_images
    from lwd.machine import own_device
    from lwd.progress import counting

    where, protocol = own_device(device), ProtocolSettings(**settings)
    extractor = feature_extractor(network, weights=weights, device=where)
    known = load_reference(reference, extractor, batch_size=batch, cache=cache, progress=counting("reference", "image"))

    def score(path: Path) -> dict[str, Any]:
        return score_images(
            path, known, extractor, settings=protocol, batch_size=batch, cache=cache, device=where,
            progress=counting(path.name, "image"),
        ).to_dict()  # fmt: skip

    return score


def _judge(reference: Path, judge: Path, device: str) -> Any:
    from lwd.evaluation import evaluate_files
    from lwd.machine import pick_device

    where = pick_device(device)
    return lambda path: evaluate_files(path, reference, judge, device=where)
