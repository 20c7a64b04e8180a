"""Patch features of DINOv2 (Oquab et al. 2023; with registers: Darcet et al. 2024) and CLIP (Radford et al. 2021).

The networks are those of transformers; weights come from a directory, from the Hugging Face hub, or from the files
that the authors of DINOv2 publish. Images are prepared, and tokens chosen, as SFD's extraction of features does it.

DINOv2 learned 37 x 37 position embeddings and here needs 16 x 16. For the variants with registers the authors' code and
transformers agree: both resize to the wanted size in float32, bicubic and antialiased. For the variants without, they
do not: the authors give a scale factor of (16 + 0.1) / 37 in place of the size, which moves the sampling points a
little. Here those features are the ones of transformers.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from lwd.compute import Precision
from lwd.files import read_json, sha256_of

ALIASES = {
    "dinov2-s": "facebook/dinov2-with-registers-small",
    "dinov2-b": "facebook/dinov2-with-registers-base",
    "dinov2-l": "facebook/dinov2-with-registers-large",
    "clip-b": "openai/clip-vit-base-patch16",
    "clip-l": "openai/clip-vit-large-patch14",
}

# model_type of a configuration -> the class in transformers.
NETWORKS = {
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov2": "Dinov2Model",
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
}

# Mean and standard deviation of the colours that the networks were trained with.
IMAGENET_COLOURS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_COLOURS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

DINOV2_IMAGE_SIZE = 224
DINOV2_HEAD_WIDTH = 64  # of ViT-S, B and L alike
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


class FoundationFeatures:
    """Patch tokens of a DINOv2 or of a CLIP vision tower, as maps.

    DINOv2's are those after the final layer norm (`x_norm_patchtokens`), CLIP's those before it (`last_hidden_state`).

    Args:
        model: a `Dinov2WithRegistersModel`, `Dinov2Model` or `CLIPVisionModel`.
        source, sha256: where its weights came from and the hash of their file, for `describe`.
        image_size: side in pixels to which images are resized, a multiple of the patch; by default 224 for DINOv2 and
            the size of its training for CLIP.
        grid: positions per side to which the maps are resized; by default the network's own.
        precision: "bf16" runs the network under autocast; images and maps are float32 all the same.

    Attributes:
        width: features F per position.
        grid: (h, w) of the maps.

    Raises:
        ValueError: an image size, grid or precision that cannot be.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        source: str,
        sha256: str,
        image_size: int | None = None,
        grid: int | None = None,
        precision: Precision = "float32",
    ) -> None:
        config: Any = model.config
        if precision not in get_args(Precision):
            raise ValueError(f"precision {precision!r} is unknown; there are {', '.join(get_args(Precision))}")
        self.model, self.source, self.sha256, self.precision = model.eval(), source, sha256, precision
        self.network: str = config.model_type
        self.width: int = config.hidden_size
        is_clip = self.network == "clip_vision_model"
        default_size = config.image_size if is_clip else DINOV2_IMAGE_SIZE
        self.image_size: int = default_size if image_size is None else image_size
        side, rest = divmod(self.image_size, config.patch_size)
        if side < 1 or rest:
            raise ValueError(f"an image size of {self.image_size} is no multiple of the patch, {config.patch_size}")
        if grid is not None and grid < 1:
            raise ValueError(f"a grid of {grid} positions per side; it needs at least 1")
        self._tokens = side, side
        self.grid: tuple[int, int] = self._tokens if grid is None else (grid, grid)
        # The class token, and the registers, come before the patches.
        self._first_patch = 1 + getattr(config, "num_register_tokens", 0)
        # CLIP refuses sizes other than its own unless told to resize its position embeddings; DINOv2 always does.
        self._options = {"interpolate_pos_encoding": True} if is_clip else {}
        self.device = next(model.parameters()).device
        colours = torch.tensor(CLIP_COLOURS if is_clip else IMAGENET_COLOURS, device=self.device)
        self._mean, self._std = colours[:, :, None, None]

    @classmethod
    def load(
        cls,
        source: str | Path,
        *,
        device: torch.device | str = "cpu",
        precision: Precision = "float32",
        image_size: int | None = None,
        grid: int | None = None,
    ) -> Self:
        """A pretrained network.

        Args:
            source: a directory with ``config.json`` and weights as transformers saves them; a name on the Hugging Face
                hub; ``dinov2-s``, ``dinov2-b``, ``dinov2-l`` (with registers), ``clip-b`` (ViT-B/16) or ``clip-l``
                (ViT-L/14), short for names on the hub; or a file ``dinov2_vit[sbl]14_reg4_pretrain.pth``. Of a
                complete CLIP only the vision tower is used.
            image_size, grid, precision: see the class.

        Raises:
            FileNotFoundError: no weights at `source`; says where to get them.
            ImportError: transformers is not installed.
            ValueError: an unsupported network; weights that are damaged, or not those of the network, with the keys.
        """
        model, sha256 = load_network(source, device)
        if model.config.model_type == "dinov2" and Path(source).expanduser().is_file():
            raise ValueError(f"{source} is a DINOv2 without registers; give a file whose name has reg4 in it")
        described = {"source": str(source), "sha256": sha256}
        return cls(model, **described, image_size=image_size, grid=grid, precision=precision)

    @torch.no_grad()
    def feature_maps(self, images: Tensor, *, batch: int = 64) -> Tensor:
        """Patch features, float32 [N, F, h, w], on the device of the images; row 0 is the top, column 0 the left.

        Args:
            images: uint8 [N, 3, S, S], any S.
            batch: how many images the network sees at a time; it bounds the memory and nothing else.

        Raises:
            ValueError: images of another dtype or shape, or none.
        """
        square_colour = images.ndim == 4 and images.shape[1] == 3 and images.shape[2] == images.shape[3]
        if images.dtype != torch.uint8 or not square_colour or not images.numel():
            raise ValueError(f"images must be uint8 [N, 3, S, S], not {images.dtype} {tuple(images.shape)}")
        return torch.cat([self._features(part).to(images.device) for part in images.split(batch)])

    def describe(self) -> dict[str, Any]:
        """What identifies the features, for a manifest; as JSON."""
        weights = {"network": self.network, "source": self.source, "sha256": self.sha256}
        sizes = {"width": self.width, "grid": list(self.grid), "image_size": self.image_size}
        return weights | sizes | ({} if self.precision == "float32" else {"precision": self.precision})

    def _features(self, images: Tensor) -> Tensor:
        x = (images.to(self.device).float() / 255 - self._mean) / self._std
        # After the normalisation and without antialiasing, as the published features were made.
        x = F.interpolate(x, (self.image_size, self.image_size), mode="bicubic")
        # Entered for float32 too, where it switches off an autocast that the caller may be under.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            tokens = self.model(pixel_values=x, **self._options).last_hidden_state
        maps = tokens[:, self._first_patch :].float().transpose(1, 2).unflatten(2, self._tokens)
        if self.grid != self._tokens:
            maps = F.interpolate(maps, self.grid, mode="bilinear", align_corners=False)
        return maps.contiguous()


def load_network(source: str | Path, device: torch.device | str = "cpu") -> tuple[Any, str]:
    """The network itself, as transformers has it, in float32; and the SHA-256 of its weights' file.

    Args:
        source: as for `FoundationFeatures.load`; also a file ``dinov2_vit[sbl]14_pretrain.pth``, without registers.

    Raises:
        FileNotFoundError, ImportError, ValueError: as `FoundationFeatures.load`.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError('DINOv2 and CLIP need an extra: pip install "lwd[encoders]"') from error
    path = _locate(source)
    files = _find_weights(path) if path.is_dir() else [path]
    kind = _kind(path) if path.is_dir() else None
    if not files:
        raise FileNotFoundError(f"{path} has no {' or '.join(WEIGHT_FILES)}; {_advice()}")
    state = {name: tensor for file in files for name, tensor in _read_weights(file).items()}
    if kind is not None:
        network = getattr(transformers, NETWORKS[kind])
        config = network.config_class.from_pretrained(path)
        state = _vision_tower(state) if kind.startswith("clip") else state
    else:
        settings, state = _from_dinov2_names(state, path)
        kind = "dinov2_with_registers" if "num_register_tokens" in settings else "dinov2"
        network = getattr(transformers, NETWORKS[kind])
        config = network.config_class(**settings)
    return _build(network, config, state, path).to(device).eval(), _sha256(files)


# --- where the weights are ---------------------------------------------------------------------------------------


def _locate(source: str | Path) -> Path:
    """The directory or file that `source` means, downloaded where need be."""
    name = ALIASES.get(source, source) if isinstance(source, str) else str(source)
    path = Path(name).expanduser()
    if path.exists():
        return path
    on_hub = isinstance(source, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)
    if not on_hub or path.suffix in (".pth", ".pt", ".bin", ".safetensors"):
        raise FileNotFoundError(f"{name} does not exist. Give one of {', '.join(ALIASES)}, or {_advice()}")
    return _download(name)


def _download(name: str) -> Path:
    """Configuration and weights of a network on the hub, in the hub's cache."""
    from huggingface_hub import snapshot_download

    try:
        # One format is enough: many repositories hold the same weights in several.
        for weights in map(Path, WEIGHT_FILES):
            shards = f"{weights.stem}-*-of-*{weights.suffix}"
            wanted = ["config.json", str(weights), f"{weights}.index.json", shards]
            directory = Path(snapshot_download(name, allow_patterns=wanted))
            if _find_weights(directory):
                break
    except (OSError, ValueError) as error:  # no connection, no such repository, not a possible name
        reason = f"{name} is no directory here, and could not be had from the Hugging Face hub ({error})"
        raise FileNotFoundError(f"{reason}; {_advice(name)}") from error
    return directory


def _find_weights(directory: Path) -> list[Path]:
    """The file of weights, or all its shards; empty when there is none."""
    for name in WEIGHT_FILES:
        if (directory / name).is_file():
            return [directory / name]
        index = directory / f"{name}.index.json"
        if index.is_file():
            return [directory / shard for shard in sorted(set(read_json(index)["weight_map"].values()))]
    return []


def _kind(directory: Path) -> str:
    """The model_type of the configuration there; one of NETWORKS."""
    config = directory / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{directory} has no config.json; {_advice()}")
    kind = str(read_json(config).get("model_type"))
    if kind not in NETWORKS:
        raise ValueError(f"{config} is of a network {kind!r}; supported are {', '.join(NETWORKS)}")
    return kind


def _advice(name: str = ALIASES["dinov2-b"]) -> str:
    return (
        f"download config.json and {' or '.join(WEIGHT_FILES)} from https://huggingface.co/{name} and give the "
        "directory that holds them. DINOv2 with registers is also at https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/"
        "dinov2_vitb14_reg4_pretrain.pth (likewise vits14, vitl14): give that file"
    )


# --- reading them ------------------------------------------------------------------------------------------------


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is damaged or holds no weights ({error}); download it again") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{file} is not a state dict; give the weights of the network alone, tensors by name")
    return state


def _sha256(files: list[Path]) -> str:
    """Of the file; of several, of their hashes in hexadecimal, one after another in the order of their names."""
    hashes = [sha256_of(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _vision_tower(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without CLIP's text tower and projections, and the position numbers that old files store."""
    others = ("text_model.", "text_projection.", "visual_projection.", "logit_scale")
    return {k: v for k, v in state.items() if not k.startswith(others) and not k.endswith("position_ids")}


def _build(network: Any, config: Any, state: dict[str, Tensor], path: Path) -> nn.Module:
    """The network with these weights in float32, whatever they are stored in."""
    # Given the tensors rather than the directory, transformers still knows the names of its older versions. What is
    # missing it would fill at random with no more than a warning.
    asked: dict[str, Any] = {"dtype": torch.float32, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, found = network.from_pretrained(None, config=config, state_dict=state, **asked)
    _check_keys(path, found["missing_keys"], found["unexpected_keys"])
    wrong = [f"{key} {tuple(stored)}, not {tuple(needed)}" for key, stored, needed in sorted(found["mismatched_keys"])]
    if wrong:
        raise ValueError(f"weights in {path} do not have the shapes of its config.json: {_listed(wrong)}")
    return model


def _check_keys(path: Path, missing: Collection[str], unexpected: Collection[str]) -> None:
    # The mask token is for training; features never use it.
    missing = {key for key in missing if not key.endswith("mask_token")}
    both = {"missing": missing, "not part of the network": unexpected}
    faults = [f"{what}: {_listed(sorted(keys))}" for what, keys in both.items() if keys]
    if faults:
        raise ValueError(f"{path} does not hold the weights of this network. Keys {'; '.join(faults)}")


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --- the names of DINOv2's authors -------------------------------------------------------------------------------

_RENAMES = (
    (r"^(cls_token|register_tokens|mask_token)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.", "encoder.layer."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
)


def _from_dinov2_names(state: Mapping[str, Tensor], path: Path) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Settings for `Dinov2WithRegistersConfig`, or `Dinov2Config`, and the weights under transformers' names."""
    sizes = {"patch_embed.proj.weight", "pos_embed", "register_tokens", "blocks.0.mlp.fc1.weight"}
    missing = sizes - state.keys()
    _check_keys(path, missing if missing != {"register_tokens"} else (), ())
    registers = {"num_register_tokens": state["register_tokens"].shape[1]} if "register_tokens" in state else {}
    renamed = {}
    for key, tensor in state.items():
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        if ".attn.qkv." in key:  # one projection to queries, keys and values, in this order
            for part, chunk in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[key.replace("attn.qkv", f"attention.attention.{part}")] = chunk
        else:
            renamed[key] = tensor
    width, _, _, patch = state["patch_embed.proj.weight"].shape
    return {
        "hidden_size": width,
        "num_hidden_layers": len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        "num_attention_heads": width // DINOV2_HEAD_WIDTH,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] // width,
        "patch_size": patch,
        "image_size": math.isqrt(state["pos_embed"].shape[1] - 1) * patch,
        **registers,
    }, renamed
