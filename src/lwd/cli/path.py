"""`lwd path`: the best schedule through the errors of a denoiser of independent times."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def path(
    run: Path,
    latents: Path,
    out: Path,
    kinetic: float = 0.0,
    weights: Literal["information", "uniform"] = "information",
    family: Literal["any", "learned"] = "any",
    degree: int | None = None,
    points: int = 25,
    images: int = 256,
    at_step: int | None = None,
    device: str = "auto",
) -> None:
    """Find the schedule of the least cost through the errors of one denoiser, for any lambda, without a probe.

    Writes surface.safetensors (errors and speeds on a grid of local times), schedule.json, path.json (what it and other
    schedules cost) and, for two groups, surface.png. The surface is measured once: another lambda takes seconds.

    Args:
        run: directory of a training with `lwd train --schedule independent`.
        latents: held-out latents to measure the errors on (`lwd encode --like`).
        out: directory for the results.
        kinetic: lambda.
        weights: of the errors: information, t/(1-t), in which only what the denoiser does worse than an exact one
            tells schedules apart; or uniform, as in the paper's loss.
        family: any monotone curve, or the convex ones that a probe can learn (Eq. 40).
        degree: of the curve's polynomials: 12, or M + 1 = 5 of the learned family.
        points: nodes of the grid for each group; their product is the number of evaluations for every image.
        images: held-out images to measure on.
        at_step: the averaged weights after this step instead of the finished model.
        device: auto, cpu, cuda, cuda:1 ...
    """
    from lwd.data import LatentDataset
    from lwd.files import differences, write_json
    from lwd.machine import describe_machine, describe_versions, own_device
    from lwd.paths import DEGREE, best_path, best_polynomial
    from lwd.pipeline import Pipeline
    from lwd.schedules import OffsetSchedule, SynchronousSchedule
    from lwd.surface import ErrorSurface, measure_surface

    where = own_device(device)
    pipeline = Pipeline.from_pretrained(run, step=at_step, device=where)
    if pipeline.trained_on.clocks == 1:
        raise ValueError(
            f"{run} was trained along one path, the {pipeline.trained_on.kind} one, and knows nothing beside it: train "
            "with --schedule independent"
        )
    data = LatentDataset.open(latents)
    pipeline.normalization.require_equal(data.normalization, str(run), str(latents))
    file = out / "surface.safetensors"
    origin = pipeline.describe()
    about = {key: origin[key] for key in ("run", "step", "model_sha256")}
    about |= {"latents": data.fingerprint, "images": min(images, len(data)), "points": points}
    if file.exists():
        surface = ErrorSurface.load(file)
        if changed := differences(dict(surface.about), about):
            raise ValueError(f"{file} was measured otherwise; choose another --out. {'; '.join(changed)}")
    else:
        surface = measure_surface(
            pipeline.denoiser, data, points=points, images=images, device=where, about=about
        )  # fmt: skip
        surface.save(file)
    if family == "learned":
        found = best_polynomial(surface, kinetic=kinetic, weights=weights, degree=(degree or 5) - 1)
    else:
        found = best_path(surface, kinetic=kinetic, weights=weights, degree=degree or DEGREE)  # type: ignore[assignment]
    names = surface.spec.names
    others = {
        "synchronous": SynchronousSchedule(len(names), names),
        "offset:0.3": OffsetSchedule(0.3, len(names), names),
    }
    costs = {
        name: float(surface.cost(schedule, kinetic=kinetic, weights=weights, points=2048))
        for name, schedule in {"this": found, **others}.items()
    }
    found.save(out / "schedule.json")
    settings = {"kinetic": kinetic, "weights": weights, "family": family, "degree": degree, "surface": about}
    machine = {"machine": describe_machine(where), "versions": describe_versions()}
    write_json(out / "path.json", {"costs": costs, "settings": settings, **machine})
    for name, cost in costs.items():
        print(f"{name:<14} costs {cost:.5f}")
    print(f"The schedule is {out / 'schedule.json'}.")
    if len(names) == 2:
        from lwd.report.surfaces import draw_surface

        print(f"The figure is {draw_surface(surface, {'best path': found, **others}, out / 'surface.png', weights)}.")
