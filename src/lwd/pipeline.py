"""From class labels to images: a trained denoiser with everything that sampling from it needs.

pipeline = lwd.Pipeline.from_pretrained("runs/main")
images = pipeline([207, 360], seed=0).images
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

from lwd.backbones import LightningDiT, LightningDiTConfig
from lwd.compute import Precision, autocast, compile_blocks
from lwd.encoders.choose import decode_texture
from lwd.files import read_json, write_json
from lwd.guidance import AutoGuidance, ClassifierFreeGuidance, Interval, Scale, ScaleCurve
from lwd.hub import directory_of
from lwd.latents import LatentSpec, Normalization
from lwd.machine import default_precision, pick_device
from lwd.objective import Denoiser
from lwd.randomness import derived_seed
from lwd.runs import read_run
from lwd.sampling import sample, seeded_noise
from lwd.schedules import Schedule, load_schedule

if TYPE_CHECKING:
    from PIL.Image import Image

FILES = ("config.json", "model.safetensors", "schedule.json", "latents.json", "origin.json")
DEFAULT_SCALE = 1.5
"""Of AutoGuidance, as the paper's for its 80- and 200-epoch models."""


@dataclass(frozen=True)
class PipelineOutput:
    """What a pipeline returns.

    Attributes:
        images: PIL images; uint8 [N, c, H, W] or None where another `output_type` was asked for.
        latents: normalised composite latents [N, C, h, w].
        evaluations: model evaluations of every image, [N].
    """

    images: list[Image] | Tensor | None
    latents: Tensor
    evaluations: Tensor


class Pipeline:
    """A denoiser with its schedule, the statistics of its latents and the description of their encoders.

    Args:
        model: in eval mode, on the device to sample on.
        schedule: that it was trained on; `along` takes another one to sample along.
        normalization: of the latents that it was trained on.
        encoders: of every group, as a manifest describes them; the texture group's decodes.
        weak: a pipeline of a worse model on the same schedule, for AutoGuidance.
        class_names: of the labels, where known.
        origin: where the model comes from, for records: run, recipe, step.
        precision: of the network's evaluations; by default bf16 where the hardware is fast at it.

    Raises:
        ValueError: schedule, statistics and model are not of the same groups; a weak model that does not fit.
    """

    def __init__(
        self,
        model: LightningDiT,
        schedule: Schedule,
        normalization: Normalization,
        encoders: Mapping[str, Any] | None = None,
        *,
        weak: Pipeline | None = None,
        class_names: Sequence[str] = (),
        origin: Mapping[str, Any] | None = None,
        precision: Precision | None = None,
    ) -> None:
        if schedule.names != model.spec.names:
            raise ValueError(f"the schedule is of the groups {schedule.names}, the model of {model.spec.names}")
        if len(normalization.mean) != model.spec.channels:
            raise ValueError(f"statistics of {len(normalization.mean)} channels, but a model of {model.spec.channels}")
        device = next(model.parameters()).device
        self.model, self.normalization = model.eval().requires_grad_(False), normalization
        self.schedule = self.trained_on = schedule.frozen().to(device)
        self.encoders, self.class_names, self.origin = dict(encoders or {}), tuple(class_names), dict(origin or {})
        self.precision: Precision = precision or default_precision(device)
        self.denoiser: Denoiser = _Evaluated(model, self.precision)
        self.weak: Pipeline | None = None
        if weak is not None:
            self.add_weak(weak)

    # --- reading and writing ---------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        step: int | None = None,
        device: torch.device | str = "auto",
        precision: Precision | None = None,
        weak: str | Path | None = None,
    ) -> Self:
        """A pipeline from disk or from the Hugging Face hub.

        Args:
            source: a directory of `lwd train`, of `save_pretrained`, or the name of a repository on the hub.
            step: of a run: the averaged weights after this step, from a snapshot or a checkpoint, also of a run that is
                not finished; by default the finished model.
            weak: the same for a weak model; by default the one saved with the pipeline, if any.

        Raises:
            FileNotFoundError: nothing there, or no such step; says which there are.
            ValueError: a damaged file, parts that do not fit.
        """
        where = pick_device(device) if isinstance(device, str) else device
        wanted = [folder + file for folder in ("", "weak/") for file in FILES]
        directory = directory_of(source, wanted, "run or pipeline")
        if not directory.is_dir():
            raise ValueError(
                f"{directory} is a file; a run or a pipeline is a directory. A checkpoint of SFD is read by "
                "`Pipeline.from_sfd`, or `lwd sample` with --schedule, --latents and --texture"
            )
        if (directory / "schedule.json").is_file() and (directory / "model.safetensors").is_file():
            if step is not None:
                raise FileNotFoundError(f"{directory} is a saved pipeline: it has no steps to choose from")
            model = LightningDiT.from_pretrained(directory)
            origin = read_json(directory / "origin.json") if (directory / "origin.json").is_file() else {}
        else:
            model, origin = read_run(directory, step)
        latents = read_json(directory / "latents.json")
        pipeline = cls(
            model.to(where),
            load_schedule(directory / "schedule.json", model.spec.names),
            Normalization.from_dict(latents["normalization"]),
            latents["encoders"],
            class_names=latents.get("class_names", ()),
            origin={"run": str(source)} | origin,
            precision=precision,
        )
        if weak is None and (directory / "weak").is_dir():
            weak = directory / "weak"
        if weak is not None:
            pipeline.add_weak(cls.from_pretrained(weak, device=where, precision=precision))
        return pipeline

    @classmethod
    def from_sfd(
        cls,
        checkpoint: str | Path,
        schedule: Schedule,
        normalization: Normalization,
        encoders: Mapping[str, Any] | None = None,
        *,
        device: torch.device | str = "auto",
        precision: Precision | None = None,
        **overrides: Any,
    ) -> Self:
        """A checkpoint of SFD or LightningDiT with what its file does not hold; see `lwd.backbones.sfd.load_sfd`."""
        model = LightningDiT.from_sfd(checkpoint, **overrides)
        where = pick_device(device) if isinstance(device, str) else device
        origin = {"run": str(checkpoint)}
        return cls(model.to(where), schedule, normalization, encoders, origin=origin, precision=precision)

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write everything, the weak model too, into a directory that `from_pretrained` reads; it can be uploaded to
        the hub as it is. The texture decoder is not copied: the files keep where it came from, and its hash."""
        directory = Path(directory)
        self.trained_on.save(directory / "schedule.json")
        latents = {"normalization": self.normalization.to_dict(), "encoders": self.encoders}
        write_json(directory / "latents.json", latents | {"class_names": list(self.class_names)})
        write_json(directory / "origin.json", self.origin)
        if self.weak is not None:
            self.weak.save_pretrained(directory / "weak")
        self.model.save_pretrained(directory)
        return directory

    def add_weak(self, weak: Pipeline, *, force: bool = False) -> None:
        """Take `weak` for AutoGuidance.

        Args:
            force: take it even if it was trained on another schedule.

        Raises:
            ValueError: it was trained on another schedule, or on latents of other statistics or groups.
        """
        ours, theirs = self.trained_on.to_dict(), weak.trained_on.to_dict()
        if not force and any(ours[key] != theirs[key] for key in ("kind", "groups", "parameters")):
            raise ValueError(
                "guidance needs both models on the same path, but the main one was trained on the schedule "
                f"{ours['kind']} {ours['parameters']} and the weak one on {theirs['kind']} {theirs['parameters']}"
            )
        if weak.spec.sizes != self.spec.sizes:
            raise ValueError(
                f"the weak model denoises groups of {weak.spec.sizes} channels, the main one {self.spec.sizes}"
            )
        self.normalization.require_equal(weak.normalization, "the main model", "the weak model")
        self.weak = weak

    def along(self, schedule: Schedule, *, force: bool = False) -> Self:
        """Sample along `schedule`: any, for a model that was trained on independent times.

        Args:
            force: go along it even if the model was trained on another path, whose states are not those it meets here.

        Raises:
            ValueError: the model was trained on another path, or the schedule is of other groups or no path.
        """
        if schedule.clocks > 1:
            raise ValueError("independent times are no path to sample along; choose a schedule")
        if schedule.names != self.spec.names:
            raise ValueError(f"the schedule is of the groups {schedule.names}, the model of {self.spec.names}")
        ours, theirs = self.trained_on.to_dict(), schedule.to_dict()
        if not force and self.trained_on.clocks == 1 and any(ours[k] != theirs[k] for k in ("kind", "parameters")):
            raise ValueError(
                f"the model was trained on the schedule {ours['kind']} {ours['parameters']} and does not know the "
                "states of another one; only a model of independent times can go along any (or force it)"
            )
        self.schedule = schedule.frozen().to(self.device)
        return self

    def compile(self) -> Self:
        """Compile the networks block by block; worth its seconds for many images, on a GPU above all."""
        compile_blocks(self.model, dynamic=None)
        if self.weak is not None:
            self.weak.compile()
        return self

    # --- sampling --------------------------------------------------------------------------------------------------

    def __call__(
        self,
        class_labels: Sequence[int | str] | int | str,
        *,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        guidance_scale: Scale | None = None,
        interval: Interval | Sequence[Interval] | None = None,
        solver: str = "dopri5",
        steps: int | Sequence[float] | None = None,
        atol: float = 1e-6,
        rtol: float = 1e-3,
        output_type: Literal["pil", "uint8", "latent"] = "pil",
    ) -> PipelineOutput:
        """Draw one image for every label.

        Args:
            class_labels: classes by number, or by name where the names are known.
            seed: of the set of images: image i has the noise of `image_seed(seed, i)`, as `lwd sample` draws it.
            seeds: noise seeds for the images instead, one each.
            guidance_scale: of AutoGuidance where there is a weak model, of classifier-free guidance otherwise; None is
                `DEFAULT_SCALE` with a weak model, and no guidance without.
            interval: local times that are guided, see `AutoGuidance`.
            solver, steps, atol, rtol: see `lwd.sample`.
            output_type: ``"latent"`` decodes nothing.

        Raises:
            ValueError: an unknown class or output type; another number of seeds than of labels; as `lwd.sample`.
        """
        if output_type not in ("pil", "uint8", "latent"):
            raise ValueError(f'output_type is "pil", "uint8" or "latent", not {output_type!r}')
        wanted = [class_labels] if isinstance(class_labels, int | str) else list(class_labels)
        numbers = [self.class_number(label) for label in wanted]
        if seeds is None:
            seeds = [image_seed(seed, i) for i in range(len(numbers))]
        elif len(seeds) != len(numbers):
            raise ValueError(f"{len(seeds)} seeds for {len(numbers)} labels; give one each")
        result = sample(
            self.guided(guidance_scale, interval=interval),
            self.schedule,
            seeded_noise(seeds, self.latent_shape, self.device),
            torch.tensor(numbers, device=self.device),
            solver=solver,
            steps=steps,
            atol=atol,
            rtol=rtol,
            spec=self.spec,
        )
        images: list[Image] | Tensor | None = None
        if output_type != "latent":
            images = self.decode(result.latents).cpu()
            images = _to_pil(images) if output_type == "pil" else images
        return PipelineOutput(images, result.latents, result.evaluations_per_image)

    def guided(self, scale: Scale | None = None, *, interval: Interval | Sequence[Interval] | None = None) -> Denoiser:
        """The denoiser with the guidance that `__call__` describes; ValueError where there is no path to go along."""
        if self.schedule.clocks > 1:
            raise ValueError(
                "the model was trained on independent times, which are no path: choose a schedule to go along "
                "(--schedule, or Pipeline.along)"
            )
        if scale is None:
            scale = 1.0 if self.weak is None else DEFAULT_SCALE
        if not isinstance(scale, ScaleCurve) and set(scale if isinstance(scale, Sequence) else [scale]) == {1.0}:
            return self.denoiser
        if self.weak is not None:
            return AutoGuidance(self.denoiser, self.weak.denoiser, scale, interval=interval, spec=self.spec)
        return ClassifierFreeGuidance(self.denoiser, scale, self.model.null_label, interval, spec=self.spec)

    def decode(self, latents: Tensor) -> Tensor:
        """Images uint8 [N, c, H, W], on the device of the latents, from normalised composite latents, by the texture
        group's decoder.

        Raises:
            ValueError: the texture group's encoder is unknown, or one that cannot be decoded.
        """
        return decode_texture(latents, self.spec, self.normalization, self.encoders)

    def class_number(self, label: int | str) -> int:
        """The number of a class given by number or name; ValueError when there is none."""
        names = [name.lower() for name in self.class_names]
        if isinstance(label, str) and label.lower() in names:
            return names.index(label.lower())
        if isinstance(label, str) and not label.isdigit():
            known = ", ".join(self.class_names[:8]) + (" ..." if len(self.class_names) > 8 else "")
            raise ValueError(f"no class {label!r}; " + (f"there are {known}" if known else "no names are known here"))
        if not 0 <= int(label) < self.config.num_classes:
            raise ValueError(f"classes are 0 to {self.config.num_classes - 1}; asked for {label}")
        return int(label)

    # --- what it is ------------------------------------------------------------------------------------------------

    @property
    def config(self) -> LightningDiTConfig:
        return self.model.config

    @property
    def spec(self) -> LatentSpec:
        return self.model.spec

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C, h, w] of one composite latent."""
        return self.spec.channels, self.config.input_size, self.config.input_size

    @cached_property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def describe(self) -> dict[str, Any]:
        """Origin, size and schedule, for records, as JSON."""
        known = dict.fromkeys(("run", "recipe", "step", "batch_size", "train_seed", "model_sha256")) | self.origin
        described = known | {"parameters": self.parameters, "schedule": self.schedule.to_dict()}
        if self.schedule is not self.trained_on:
            described["trained_on"] = self.trained_on.to_dict()
        return json.loads(json.dumps(described | {"encoders": self.encoders}))  # type: ignore[no-any-return]


class _Evaluated:
    """A network as a denoiser: no gradients, in the precision to sample in."""

    def __init__(self, model: nn.Module, precision: Precision) -> None:
        self._model, self.precision = model, precision
        self.spec = model.spec

    @torch.no_grad()
    def __call__(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        with autocast(self.precision, z.device):
            return self._model(z, t, labels)  # type: ignore[no-any-return]


def image_seed(seed: int, index: int) -> int:
    """The noise seed of image `index` in a set drawn with `seed`."""
    return derived_seed(seed, "image", index)


def _to_pil(images: Tensor) -> list[Image]:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('PIL images need Pillow: pip install "lwd[encoders]"; or ask for "uint8"') from error
    arrays = images.movedim(1, -1).numpy()
    return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]
