"""The Inception network that FID is defined by: the TensorFlow graph of 2015-12-05, from its PyTorch weights.

It differs from torchvision's: average pools that leave the padding out, a max pool in the last block, 1008 classes,
batch normalisation with epsilon 1e-3, and TensorFlow 1's bilinear resize in front.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lwd.evaluation.numerics import float32_arithmetic

NAME = "inception-2015-12-05"
SHA256_PREFIX = "6726825d"
"""Of the published weights; both ports are the same bytes under two names."""
DOWNLOADS = {
    "weights-inception-2015-12-05-6726825d.pth": "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/",
    "pt_inception-2015-12-05-6726825d.pth": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/",
}
SIZE = 299
_BATCH_NORM_EPSILON = 1e-3
_SPATIAL_CHANNELS = 7


def tf1_resize(images: Tensor, size: int = SIZE) -> Tensor:
    """Bilinear resize as TensorFlow 1 does it: no half-pixel centres, no antialiasing, corners not aligned.

    Output pixel i takes the input at i * (input size / output size), clamped at the last row and column.

    Args:
        images: uint8 or float [N, C, H, W].

    Returns:
        float32 [N, C, size, size], in the range of the input.
    """
    x = images.to(torch.float32)
    for dim in (3, 2):  # TensorFlow interpolates along the rows first
        length = x.shape[dim]
        if length == size:
            continue
        at = torch.arange(size, dtype=torch.float32, device=x.device) * torch.tensor(length / size, device=x.device)
        low = at.long().clamp(max=length - 1)
        weight = (at - low).unsqueeze(1) if dim == 2 else at - low
        below, above = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=length - 1))
        x = below + (above - below) * weight
    return x


class _Conv(nn.Conv2d):
    """Convolution, batch normalisation folded into it, ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(super().forward(x))


class _Block(nn.Module):
    """Branches over the same input, concatenated.

    Args:
        layers: by name.
        branches: each the names of its layers in order; `a|b` are two layers side by side.
        pool: of the last branch: "average" or "max" before its 1x1 convolution, or "reduce".
    """

    def __init__(self, layers: Mapping[str, _Conv], branches: tuple[str, ...], pool: str) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.branches, self.pool = branches, pool

    def run(self, x: Tensor, layer: str) -> Tensor:
        parts = [self.get_submodule(part)(x) for part in layer.split("|")]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def forward(self, x: Tensor) -> Tensor:
        outputs = [functools.reduce(self.run, branch.split(), x) for branch in self.branches]
        if self.pool == "reduce":  # the grid is halved: the pool is a branch of its own
            outputs.append(F.max_pool2d(x, 3, 2))
        else:
            # TensorFlow's average leaves the padding out of the count.
            average = self.pool == "average"
            y = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) if average else F.max_pool2d(x, 3, 1, 1)
            outputs.append(self.run(y, "branch_pool"))
        return torch.cat(outputs, dim=1)


def _conv(inputs: int, outputs: int, kernel: tuple[int, int] | int = 1, stride: int = 1, pad: bool = True) -> _Conv:
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (height // 2, width // 2) if pad and stride == 1 else (0, 0)
    return _Conv(inputs, outputs, (height, width), stride, padding)


def _block_35(inputs: int, pool: int) -> _Block:
    layers = {
        "branch1x1": _conv(inputs, 64),
        "branch5x5_1": _conv(inputs, 48),
        "branch5x5_2": _conv(48, 64, 5),
        "branch3x3dbl_1": _conv(inputs, 64),
        "branch3x3dbl_2": _conv(64, 96, 3),
        "branch3x3dbl_3": _conv(96, 96, 3),
        "branch_pool": _conv(inputs, pool),
    }
    branches = ("branch1x1", "branch5x5_1 branch5x5_2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3")
    return _Block(layers, branches, "average")


def _block_35_to_17(inputs: int) -> _Block:
    layers = {
        "branch3x3": _conv(inputs, 384, 3, 2),
        "branch3x3dbl_1": _conv(inputs, 64),
        "branch3x3dbl_2": _conv(64, 96, 3),
        "branch3x3dbl_3": _conv(96, 96, 3, 2),
    }
    return _Block(layers, ("branch3x3", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3"), "reduce")


def _block_17(inputs: int, inner: int) -> _Block:
    layers = {
        "branch1x1": _conv(inputs, 192),
        "branch7x7_1": _conv(inputs, inner),
        "branch7x7_2": _conv(inner, inner, (1, 7)),
        "branch7x7_3": _conv(inner, 192, (7, 1)),
        "branch7x7dbl_1": _conv(inputs, inner),
        "branch7x7dbl_2": _conv(inner, inner, (7, 1)),
        "branch7x7dbl_3": _conv(inner, inner, (1, 7)),
        "branch7x7dbl_4": _conv(inner, inner, (7, 1)),
        "branch7x7dbl_5": _conv(inner, 192, (1, 7)),
        "branch_pool": _conv(inputs, 192),
    }
    double = "branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5"
    return _Block(layers, ("branch1x1", "branch7x7_1 branch7x7_2 branch7x7_3", double), "average")


def _block_17_to_8(inputs: int) -> _Block:
    layers = {
        "branch3x3_1": _conv(inputs, 192),
        "branch3x3_2": _conv(192, 320, 3, 2),
        "branch7x7x3_1": _conv(inputs, 192),
        "branch7x7x3_2": _conv(192, 192, (1, 7)),
        "branch7x7x3_3": _conv(192, 192, (7, 1)),
        "branch7x7x3_4": _conv(192, 192, 3, 2),
    }
    branches = ("branch3x3_1 branch3x3_2", "branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4")
    return _Block(layers, branches, "reduce")


def _block_8(inputs: int, pool: str) -> _Block:
    layers = {
        "branch1x1": _conv(inputs, 320),
        "branch3x3_1": _conv(inputs, 384),
        "branch3x3_2a": _conv(384, 384, (1, 3)),
        "branch3x3_2b": _conv(384, 384, (3, 1)),
        "branch3x3dbl_1": _conv(inputs, 448),
        "branch3x3dbl_2": _conv(448, 384, 3),
        "branch3x3dbl_3a": _conv(384, 384, (1, 3)),
        "branch3x3dbl_3b": _conv(384, 384, (3, 1)),
        "branch_pool": _conv(inputs, 192),
    }
    branches = (
        "branch1x1",
        "branch3x3_1 branch3x3_2a|branch3x3_2b",
        "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a|branch3x3dbl_3b",
    )
    return _Block(layers, branches, pool)


class FIDInception(nn.Module):
    """Inception of 2015-12-05; a `FeatureExtractor`. Layer names are those of the published weights.

    Batch normalisation is folded into the convolutions in float64, which changes features by about 1e-6 relative.
    Use `load_inception`, or `from_state_dict`.

    Attributes:
        name: "inception-2015-12-05".
        sha256: of the weights' file, or of the state dict's tensors.
        tf32: whether a GPU may use TF32; off unless asked for.
        max_batch: images that pass through the network at once (about 12 MB each).
    """

    name = NAME

    def __init__(self, *, sha256: str = "", tf32: bool = False, max_batch: int = 64) -> None:
        super().__init__()
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {max_batch}")
        self.sha256, self.tf32, self.max_batch = sha256, tf32, max_batch
        self.Conv2d_1a_3x3 = _conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = _conv(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = _conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _conv(64, 80)
        self.Conv2d_4a_3x3 = _conv(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _block_35(192, 32), _block_35(256, 64), _block_35(288, 64)
        self.Mixed_6a = _block_35_to_17(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (_block_17(768, c) for c in (128, 160, 160, 192))
        self.Mixed_7a = _block_17_to_8(768)
        self.Mixed_7b, self.Mixed_7c = _block_8(1280, "average"), _block_8(2048, "max")
        self.fc = nn.Linear(2048, 1008)

    @property
    def device(self) -> torch.device:
        return self.fc.weight.device

    @property
    def settings(self) -> dict[str, object]:
        """What else the features depend on."""
        return {"resize": f"TensorFlow-1 bilinear to {SIZE}", "precision": "float32", "tf32": self.tf32}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """`features` of one batch, without bounds on memory; images uint8 [N, 3, H, W] on this network's device."""
        x = ((tf1_resize(images) - 128) / 128).contiguous(memory_format=torch.channels_last)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        for block in (self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a, self.Mixed_6b, self.Mixed_6c):
            x = block(x)
        # sFID: the graph's "mixed_6/conv" after its ReLU, positions before channels as TensorFlow stores them.
        spatial = self.Mixed_6d.run(x, "branch1x1")[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        for block in (self.Mixed_6d, self.Mixed_6e, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c):
            x = block(x)
        pool = x.mean(dim=(2, 3))
        return {"pool": pool, "spatial": spatial, "logits": pool @ self.fc.weight.T}

    @torch.no_grad()
    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Features of images in 0 .. 255, on the device of the network, in float32 without autocast.

        Args:
            images: uint8 [N, 3, H, W], or grey [N, 1, H, W], any size and device; passed on in parts of `max_batch`.

        Returns:
            pool: [N, 2048], the last average pool ("pool_3", for FID, precision and recall).
            spatial: [N, 2023], the first 7 channels of "mixed_6/conv" on their 17x17 grid, flattened as
                (row, column, channel) (for sFID).
            logits: [N, 1008], pool times the classifier's weights, without its bias (for the inception score).

        Raises:
            ValueError: not such images.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            found = f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"Inception reads uint8 images [N, 3, H, W], or grey [N, 1, H, W], got {found}")
        device = self.device
        with float32_arithmetic(device, tf32=self.tf32):
            parts = [
                self(part.to(device, non_blocking=True).expand(-1, 3, -1, -1)) for part in images.split(self.max_batch)
            ]
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], *, sha256: str | None = None) -> FIDInception:
        """The network of a published state dict (torch-fidelity's and pytorch-fid's names, which agree).

        Raises:
            ValueError: tensors are missing, left over or of another shape (they are named).
        """
        state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
        if any(re.match(r"blocks\.\d+\.", key) for key in state):
            raise ValueError(
                "this is the state of a pytorch-fid module (`blocks.0. ...`), which leaves the classifier out; "
                f"use the file it was made from, {' or '.join(DOWNLOADS)}"
            )
        network = cls(sha256=_digest(state) if sha256 is None else sha256)
        targets = network.state_dict()
        expected = {key: tuple(value.shape) for key, value in targets.items() if key.startswith("fc.")}
        convolutions = [name for name, module in network.named_modules() if isinstance(module, _Conv)]
        for name in convolutions:
            expected[f"{name}.conv.weight"] = tuple(targets[f"{name}.weight"].shape)
            for part in ("weight", "bias", "running_mean", "running_var"):
                expected[f"{name}.bn.{part}"] = (expected[f"{name}.conv.weight"][0],)
        problems = [f"{key} is missing" for key in expected if key not in state]
        problems += [f"{key} is unknown" for key in state if key not in expected]
        problems += [
            f"{key} has shape {list(state[key].shape)}, not {list(shape)}"
            for key, shape in expected.items()
            if key in state and tuple(state[key].shape) != shape
        ]
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ValueError(f"not the weights of the FID Inception: {'; '.join(problems[:5])}{more}")
        folded = {key: state[key] for key in expected if key.startswith("fc.")}
        for name in convolutions:
            weight, gamma, beta, mean, variance = (
                state[f"{name}.{part}"].double()
                for part in ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
            )
            scale = gamma / (variance + _BATCH_NORM_EPSILON).sqrt()
            folded[f"{name}.weight"], folded[f"{name}.bias"] = weight * scale[:, None, None, None], beta - mean * scale
        network.load_state_dict(folded)
        network.requires_grad_(False)
        return network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def load_inception(
    path: str | Path | None = None,
    device: torch.device | str = "cpu",
    *,
    tf32: bool = False,
    max_batch: int = 64,
    sha256_prefix: str = SHA256_PREFIX,
) -> FIDInception:
    """The FID Inception from a file, or from torch.hub's cache, where torch-fidelity and pytorch-fid put theirs.

    Args:
        path: `weights-inception-2015-12-05-6726825d.pth` or `pt_inception-2015-12-05-6726825d.pth`, or a directory
            with one of them.
        sha256_prefix: what the file's SHA-256 must begin with; "" accepts any weights, and scores say so.

    Raises:
        FileNotFoundError: no such file; the message says where to download it.
        ValueError: other bytes than the published ones, or not these weights.
    """
    file = _find(path)
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if not digest.startswith(sha256_prefix):
        raise ValueError(
            f"{file} is damaged or not the published Inception: its SHA-256 is {digest[:16]}..., expected "
            f"{sha256_prefix}...; download it again from {' or '.join(url + name for name, url in DOWNLOADS.items())}"
        )
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, Mapping):
            raise ValueError(f"it holds a {type(state).__name__}, not a state dict")
        network = FIDInception.from_state_dict(state, sha256=digest)
    except (ValueError, RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} cannot be used: {error}") from error
    network.tf32, network.max_batch = tf32, max_batch
    return network.to(device)


def _find(path: str | Path | None) -> Path:
    place = Path(torch.hub.get_dir()) / "checkpoints" if path is None else Path(path)
    for file in [place] if path is not None and not place.is_dir() else [place / name for name in DOWNLOADS]:
        if file.is_file():
            return file
    urls = " or ".join(url + name for name, url in DOWNLOADS.items())
    raise FileNotFoundError(
        f"no weights of the FID Inception at {place}; download {urls} (SHA-256 begins {SHA256_PREFIX}) and pass its "
        f"path, or put it into {Path(torch.hub.get_dir()) / 'checkpoints'}"
    )


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
