"""Both judges of small data in one directory: made once, then asked about any number of sets of images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lwd.encoders.efficientnet import EfficientNetFeatures
from lwd.evaluation.judge import Judge, train_judge
from lwd.evaluation.neighbours import memorised_share
from lwd.evaluation.small_data import METRICS, evaluate_images, reference_features, scored
from lwd.files import read_json, sha256_of, write_atomically, write_json
from lwd.progress import counting
from lwd.randomness import stream

Part = Literal["train", "heldout"]


class Judges:
    """The embedded network and a judge trained on the training images, against the held-out ones.

    Args:
        directory: gets ``judge.safetensors``, ``reference.safetensors`` (features) and ``floor.json``.
        load: images uint8 [N, S, S] or [N, 3, S, S] and labels int64 [N] of a part; called only when they are needed.
        name: what the images are called in records.
        seed, steps: of the judge's training.
        memory: training images, at most, that generated ones are compared with for `memorised`; 0 for none.
    """

    def __init__(
        self,
        directory: Path,
        load: Callable[[Part], tuple[Tensor, Tensor]],
        *,
        name: str,
        seed: int,
        steps: int = 600,
        memory: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.directory, self.load, self.name, self.seed, self.steps = directory, load, name, seed, steps
        self.memory, self.device = memory, device
        self.path, self._floor = directory / "judge.safetensors", directory / "floor.json"
        self._reference = directory / "reference.safetensors"

    def prepare(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Train the judge, and judge real training images, the floor for everything generated; what is there is kept.

        Args:
            choose: the training labels [N] to the numbers of the images that make the floor.
        """
        if self._floor.exists():
            return
        images, labels = self.load("train")
        if not self.path.exists():
            report = counting("train judge", "step")
            judge = train_judge(
                images, labels, seed=self.seed, steps=self.steps, device=self.device, progress=report
            )  # fmt: skip
            judge.save(self.path)
        chosen = choose(labels)
        floor = self.judge(images[chosen], labels[chosen])
        if self.memory:
            floor["memorised_heldout"] = memorised_share(self.reference["train"], self.reference["embedded"])
        write_json(self._floor, floor)

    @cached_property
    def network(self) -> Judge:
        return Judge.load(self.path, self.device)

    @cached_property
    def embedded(self) -> EfficientNetFeatures:
        return EfficientNetFeatures.load(self.device)

    @cached_property
    def reference(self) -> dict[str, Tensor]:
        """Both networks' features of the held-out images, and the embedded network's of the training images."""
        if not self._reference.exists():
            images, _ = self.load("heldout")
            found = reference_features(images, judge=self.network, embedded=self.embedded.pooled)
            if self.memory:
                known, _ = self.load("train")
                # Sets of images are sorted by class: any of them, but always the same.
                chosen = torch.randperm(len(known), generator=stream(0, "memory"))[: self.memory]
                found["train"] = self.embedded.pooled(known[chosen])
            tensors = {name: features.cpu().contiguous() for name, features in found.items()}
            digest = hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest()
            about = {"sha256": digest, "shape": list(images.shape[1:])}
            write_json(self._reference.with_suffix(".json"), about)
            write_atomically(self._reference, lambda temporary: save_file(tensors, temporary))
        return load_file(self._reference)

    def judge(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """What `evaluate_images` gives, and ``memorised`` (see `memorised_share`) where training images are compared
        with; in the floor it is that of copies, and ``memorised_heldout`` beside it that of new images."""
        features = self.embedded.pooled(images)
        scores = evaluate_images(
            images, labels, judge=self.network, embedded=lambda _: features, reference=self.reference
        )
        if "train" in self.reference:
            scores["memorised"] = memorised_share(self.reference["train"], features)
        return scores

    def record(self, images: Tensor, labels: Tensor, origin: Mapping[str, Any], name: str) -> dict[str, Any]:
        """A result for a file of evaluations, as `lwd report` reads them.

        Args:
            origin: how the images were generated, as `SampleConfig.describe` says it.
            name: of the set of images.
        """
        scores = self.judge(images, labels)
        about = read_json(self._reference.with_suffix(".json"))
        generated = {
            "name": name,
            "sha256": hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest(),
            "count": len(images),
            "shape": list(images.shape[1:]),
            "origin": dict(origin),
        }
        reference = {"name": f"{self.name} held-out", "count": len(self.reference["judge"]), **about}
        judge = {"path": str(self.path), "sha256": sha256_of(self.path)}
        metrics = {key: scores[key] for key in (*METRICS, "memorised") if key in scores}
        return scored(metrics, generated, reference, judge, int(scores["k"]), self.device)

    def floor(self) -> dict[str, float]:
        """What the judges say of training images."""
        floor: dict[str, float] = read_json(self._floor)
        return floor
