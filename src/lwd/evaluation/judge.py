"""The independent judge: a small classifier, trained from scratch on the real images, that never sees a latent.

It gives the features and class probabilities for scores on small data. Nothing that is scored may train on it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lwd.files import write_atomically

IMAGE_SIZE = 32
"""Of the embedded images, in pixels a side."""
_FORMAT = "lwd.judge.1"
_BATCH = 512


class Judge(nn.Module):
    """Convolution stages, each at half the size of the one before, a mean over the grid, one linear layer.

    Args:
        classes: number of classes; labels are 0 .. classes - 1.
        widths: channels of the stages; the last one is the width D of the features. By default four stages (32, 16, 8,
            4 pixels), and one more in front for images of 64 pixels and above.
        size: side S of the images.
        colour: whether they are [N, 3, S, S] or grey, [N, S, S].
    """

    def __init__(
        self, classes: int, widths: tuple[int, ...] | None = None, *, size: int = IMAGE_SIZE, colour: bool = False
    ) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"a judge needs at least 2 classes, got {classes}")
        widths = tuple(widths or (*((16,) if size >= 2 * IMAGE_SIZE else ()), 16, 48, 96, 128))
        self.classes, self.widths, self.size, self.colour = classes, widths, size, colour
        layers: list[nn.Module] = []
        for stage, (inputs, outputs) in enumerate(zip((3 if colour else 1, *widths), widths, strict=False)):
            layers += [nn.MaxPool2d(2)] if stage else []
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.stages = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], classes)
        self.mean: Tensor
        self.std: Tensor
        # Statistics of all values of the training images, in units of 0 .. 1.
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    def _pooled(self, images: Tensor) -> Tensor:
        x = ((images if self.colour else images[:, None]).float() / 255 - self.mean) / self.std
        return self.stages(x.contiguous(memory_format=torch.channels_last)).float().mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, classes] of uint8 images [N, S, S] or [N, 3, S, S]."""
        return self.head(self._pooled(images))

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Penultimate features [N, D], float32, on the device of the judge; evaluation mode, in batches.

        Raises:
            ValueError: images of another dtype or shape than the judge was trained on.
        """
        check_images(images, self.size, self.colour)
        training, device = self.training, self.head.weight.device
        self.eval()
        try:
            parts = [self._pooled(batch.to(device)) for batch in images.split(_BATCH)]
        finally:
            self.train(training)
        return torch.cat(parts)

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        """Class probabilities [N, classes] from this judge's own `features` [N, D]."""
        return self.head(features.to(self.head.weight)).softmax(dim=1)

    def probabilities(self, images: Tensor) -> Tensor:
        """Class probabilities [N, classes] of uint8 images [N, S, S] or [N, 3, S, S]."""
        return self.classify(self.features(images))

    def save(self, path: str | Path) -> Path:
        """Write weights and sizes as one safetensors file."""
        tensors = {key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}
        config = {"classes": self.classes, "widths": self.widths, "size": self.size, "colour": self.colour}
        metadata = {"format": _FORMAT, "config": json.dumps(config)}
        return write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Judge:
        """Read what `save` wrote, in evaluation mode.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged or is not a judge.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no judge at {path}; train one with lwd.evaluation.train_judge and save it there")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r}, not {_FORMAT!r}")
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            config = json.loads(metadata["config"])
            size, colour = config.get("size", IMAGE_SIZE), config.get("colour", False)
            judge = cls(config["classes"], tuple(config["widths"]), size=size, colour=colour)
            judge.load_state_dict(state)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is not a judge or is damaged ({error}); train the judge again") from error
        return judge.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def train_judge(
    images: Tensor,
    labels: Tensor,
    *,
    seed: int,
    steps: int = 600,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Judge:
    """Train a judge from scratch: AdamW, one-cycle learning rate, shifts by up to 2 pixels, label smoothing 0.05.

    The same seed, data and machine give the same judge. The caller's random state is left alone.

    Args:
        images: uint8, grey [N, S, S] or colour [N, 3, S, S].
        labels: int64 [N], classes 0 .. C - 1.
        steps: optimiser steps.
        progress: called as progress(steps done, steps) after each step.

    Raises:
        ValueError: wrong shapes or dtypes, fewer than 2 classes, a loss that is not finite.
    """
    check_images(images)
    check_labels(labels, len(images))
    size, colour = images.shape[-1], images.ndim == 4
    if steps < 1 or not batch_size >= 2:
        raise ValueError(f"steps must be at least 1 and batch_size at least 2, got {steps} and {batch_size}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(int(labels.max()) + 1, size=size, colour=colour)
    judge.mean.fill_(images.float().mean() / 255)
    judge.std.fill_((images.float().std() / 255).clamp_min(1e-3))
    judge = judge.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    draw = torch.Generator().manual_seed(seed)
    shift = 2
    padded = F.pad(images, (shift, shift, shift, shift)).to(device)
    labels = labels.to(device)
    grid = torch.arange(size, device=device)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=4e-3, weight_decay=0.05)
    learning_rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps + 1, pct_start=0.2)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(steps):
        while len(order) < batch_size:  # epochs follow each other without short batches
            order = torch.cat([order, torch.randperm(len(images), generator=draw)])
        chosen, order = order[:batch_size].to(device), order[batch_size:]
        offsets = torch.randint(2 * shift + 1, (2, batch_size, 1), generator=draw).to(device)
        rows, columns = grid + offsets  # [batch, S] each
        # Channels, where there are any, end up last.
        batch = padded.movedim(1, -1) if colour else padded
        batch = batch[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
        batch = batch.movedim(-1, 1) if colour else batch
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            logits = judge(batch)
        loss = F.cross_entropy(logits.float(), labels[chosen], label_smoothing=0.05)
        if not torch.isfinite(loss):
            raise ValueError(f"the judge's loss is {float(loss)} at step {step}; check the images")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        learning_rate.step()
        if progress is not None:
            progress(step + 1, steps)
    return judge.eval()


def check_images(images: Tensor, size: int | None = None, colour: bool | None = None) -> None:
    """ValueError unless `images` is uint8 [N, S, S] or [N, 3, S, S] with N >= 1, of this `size` and kind if given."""
    forms = {False: "[N, S, S]", True: "[N, 3, S, S]"}
    wanted = " or ".join(form for kind, form in forms.items() if colour in (None, kind))
    square = images.ndim in (3, 4) and images.shape[-1] == images.shape[-2] == (size or images.shape[-1])
    kind = images.ndim == 4
    fits = square and colour in (None, kind) and (not kind or images.shape[1] == 3) and images.shape[-1] >= 8
    if images.dtype != torch.uint8 or not fits or not len(images):
        wanted = wanted.replace("S", str(size)) if size else wanted
        raise ValueError(f"images must be uint8 {wanted} with N >= 1, got {images.dtype} {list(images.shape)}")


def check_labels(labels: Tensor, images: int, classes: int | None = None) -> None:
    """ValueError unless `labels` is int64 [images] of values 0 .. classes - 1."""
    if labels.dtype != torch.int64 or labels.shape != (images,):
        raise ValueError(f"labels must be int64 [{images}], one per image, got {labels.dtype} {list(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes is not None and high >= classes):
        raise ValueError(f"labels must lie in 0 .. {(classes or high + 1) - 1}, got {low} .. {high}")
