"""Sampling with AutoGuidance beside SFD's public code: time at equal error to the converged solution.

    git clone https://github.com/yuemingPAN/SFD
    make demo
    python benchmarks/sampling_against_sfd.py SFD --run runs/demo/train/offset --weak-step 700 --json sampling.json

The run is any model trained on the offset schedule, the weak model an earlier step of it; both go into SFD's network
and into ours, in float32. SFD samples as its inference.py does: torchdiffeq's dopri5 at atol 1e-6 and rtol 1e-3 with
250 output points. Ours are lwd's default and its multistep solver with as few steps as reach an error no larger than
SFD's. The error is root mean square, relative, to dopri5 at a tolerance of 1e-6, over the same noise. All take turns in
one run; ratios are of medians.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from floor import timed
from lwd import AutoGuidance, LightningDiT, Pipeline, sample, seeded_noise
from lwd.backbones.sfd import _their_name
from lwd.compute import compile_blocks
from lwd.files import write_json
from lwd.machine import describe_machine, describe_versions, pick_device
from lwd.placement import place_steps
from sfd_code import MODEL_OPTIONS, import_sfd, sfd_transport

SCALE = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sfd", type=Path, help="a checkout of yuemingPAN/SFD")
    parser.add_argument("--run", type=Path, required=True, help="a run on the schedule offset:0.3")
    parser.add_argument("--weak-step", type=int, required=True, help="the earlier step that serves as the weak model")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--solver", default="ab3")
    parser.add_argument("--spacing", default="cosine", choices=("uniform", "cosine"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the result here too")
    chosen = parser.parse_args()
    import_sfd(chosen.sfd)
    device = pick_device(chosen.device)
    pipeline = Pipeline.from_pretrained(chosen.run, device=device, precision="float32")
    weak = Pipeline.from_pretrained(chosen.run, step=chosen.weak_step, device=device, precision="float32")
    noise = seeded_noise(range(chosen.images), pipeline.latent_shape, device)
    labels = torch.arange(chosen.images, device=device) % pipeline.config.num_classes
    guided = AutoGuidance(pipeline.denoiser, weak.denoiser, SCALE, spec=pipeline.spec)
    schedule = pipeline.schedule
    converged = sample(guided, schedule, noise, labels, atol=1e-6, rtol=1e-6).latents

    def error(latents: Tensor) -> float:
        return float((latents - converged).norm() / converged.norm())

    theirs = their_sampler(pipeline.model, weak.model, schedule.kinks[0], noise, labels)
    target, calls = error(theirs()), theirs.evaluations  # type: ignore[attr-defined]
    print(f"SFD: {calls} evaluations, error {target:.2g}")
    for network in (pipeline.model, weak.model):
        compile_blocks(network, dynamic=None)

    def fixed(steps: int) -> Tensor:
        times = place_steps(schedule, steps, spacing=chosen.spacing)
        return sample(guided, schedule, noise, labels, solver=chosen.solver, steps=times).latents

    steps = next(n for n in range(4, 200) if error(fixed(n)) <= target)
    variants: dict[str, Callable[[], Tensor]] = {
        "SFD": theirs,
        "lwd dopri5": lambda: sample(guided, schedule, noise, labels).latents,
        f"lwd {chosen.solver}, {steps} steps": lambda: fixed(steps),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(chosen.repeats + 1):
        for name, draw in variants.items():
            seconds = timed(draw, device)
            times[name] += [seconds] if number else []
    rows: list[dict[str, Any]] = []
    middle = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, draw in variants.items():
        rows.append({"sampler": name, "error": error(draw()), "seconds": middle[name],
                     "fastest, slowest": [min(times[name]), max(times[name])],
                     "images_per_second": chosen.images / middle[name],
                     "ratio": middle["SFD"] / middle[name]})  # fmt: skip
        print(f"{name:<28} error {rows[-1]['error']:.2g}  {chosen.images / middle[name]:8.1f} images/s  "
              f"{rows[-1]['ratio']:.2f} times SFD")  # fmt: skip
    if chosen.json is not None:
        described = {"machine": describe_machine(device), "versions": describe_versions()}
        setting = {"images": chosen.images, "scale": SCALE, "evaluations of SFD": calls, "spacing": chosen.spacing}
        write_json(chosen.json, {"samplers": rows, **setting, **described})


def their_network(ours: LightningDiT) -> nn.Module:
    """SFD's network with the weights of ours."""
    from models.lightningdit import LightningDiT as Theirs  # type: ignore[import-not-found]

    config = ours.config
    sizes = {"input_size": config.input_size, "patch_size": config.patch_size, "in_channels": config.spec.channels,
             "semantic_chans": config.spec.sizes[1], "num_classes": config.num_classes}  # fmt: skip
    model = Theirs(
        hidden_size=config.hidden_size, depth=config.depth, num_heads=config.num_heads, **MODEL_OPTIONS | sizes
    )
    named = {_their_name(name, len(config.clock_widths)): value for name, value in ours.state_dict().items()}
    missing = model.load_state_dict(named, strict=False)
    assert not missing.unexpected_keys
    assert all("pos_embed" in key or "freqs" in key for key in missing.missing_keys), missing.missing_keys
    return model.to(next(ours.parameters()).device).eval()


def their_sampler(
    main: LightningDiT, weak: LightningDiT, offset: float, noise: Tensor, labels: Tensor
) -> Callable[[], Tensor]:
    """As its inference.py samples with AutoGuidance. It counts time from 0 to 1 + delta; delta = 0.3."""
    from transport import Sampler  # type: ignore[import-not-found]

    assert abs(offset - 0.3 / 1.3) < 1e-6, "the run was not trained on offset:0.3"
    model, guide = their_network(main), their_network(weak)
    draw = Sampler(sfd_transport()).sample_ode_semantic_first(
        sampling_method="dopri5", num_steps=250, atol=1e-6, rtol=1e-3, semfirst_delta_t=0.3,
        semantic_chans=main.spec.sizes[1],
    )  # fmt: skip
    options = {"y": labels, "cfg_scale": SCALE, "autoguidance_model": guide, "cfg_interval": False}

    @torch.no_grad()
    def run() -> Tensor:
        run.evaluations = 0  # type: ignore[attr-defined]

        def counted(*arguments: Any, **keywords: Any) -> Tensor:
            run.evaluations += 1  # type: ignore[attr-defined]
            return model.forward_with_autoguidance(*arguments, **keywords)  # type: ignore[operator]

        return draw(noise, counted, **options)[-1]

    return run


if __name__ == "__main__":
    main()
