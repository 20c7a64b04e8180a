"""`lwd encode`: from images to latents."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

    from lwd.data.encode import EncodeConfig
    from lwd.data.images import ImageSource
    from lwd.data.sharding import Share
    from lwd.encoders.composite import CompositeEncoder, GroupEncoder, Projection, SharedFeatures
    from lwd.encoders.pca import PCA
    from lwd.latents import Normalization

LIKE_DECIDES = (
    *("texture", "semantic", "features", "repa", "repa_features", "size", "grey", "flips", "grid", "posterior"),
    *("pca_images", "dtype", "statistics", "shard", "seed", "precision"),
)
"""Options that have no say where `--like` gives another set's encoders and settings."""


def encode(
    out: Path,
    data: str = "fashion-mnist",
    texture: str | None = None,
    semantic: str | None = None,
    features: str | None = None,
    repa: Literal["none", "int8", "float16", "bfloat16", "float32"] = "none",
    repa_features: str | None = None,
    like: Path | None = None,
    size: int = 256,
    grey: bool = False,
    flips: bool = True,
    grid: int | None = None,
    posterior: Literal["sample", "mean"] = "sample",
    pca_images: int = 10_000,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    statistics: int | None = None,
    shard: int = 1000,
    batch: int = 64,
    workers: int = 8,
    skip_corrupt: bool = False,
    classes: Path | None = None,
    split: str | None = None,
    add: str | None = None,
    weight: float | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Literal["float32", "bf16"] = "float32",
    dry_run: bool = False,
    check: bool = False,
    adopt: bool = False,
) -> None:
    """Encode images into composite latents: shards, manifest and statistics.

    Interrupted, or killed, the same command goes on. Under torchrun (or srun) the processes share the
    shards. Without --texture and --semantic the embedded images are encoded as the demo does it, into train/ and
    heldout/.

    Args:
        out: directory of the latent set.
        data: images: a folder of class folders, tar shards, a Hugging Face data set on disk, or fashion-mnist.
        texture: pixels:PATCH, a checkpoint of the LDM or VA-VAE autoencoder, or a diffusers AutoencoderKL by path or
            hub name.
        semantic: pca:CHANNELS (fitted to --data), pca:FILE or semvae:FILE, of the --features.
        features: dinov2-s, dinov2-b, dinov2-l, clip-b, clip-l, a transformers model by path or hub name, or
            efficientnet:BLOCK:SIZE (untrained:BLOCK:SIZE for its random weights, as a baseline).
        repa: store features for REPA too, in this precision.
        repa_features: the network they are of, if it is not that of --features.
        like: a latent set whose encoders, settings and statistics are used: the training set, to encode held-out
            images; with --add, to add a group to those as well.
        size: pixels per side after the centre crop.
        grey: read images as grey.
        flips: encode the mirrored images too.
        grid: positions per side of the features, where the network's own grid does not fit the texture's.
        posterior: whether an autoencoder's latents are samples or means.
        pca_images: images that the PCA is fitted to.
        dtype: that latents are stored in.
        statistics: images that the normalisation statistics are of; all by default.
        shard: images per shard.
        batch: images at a time.
        workers: threads that read images.
        skip_corrupt: list unreadable images in failed.jsonl and go on, instead of stopping.
        classes: text file with "folder name" lines, for readable class names.
        split: of a Hugging Face data set: which part of it, train by default.
        add: NAME=MODULE:FUNCTION adds a group to the finished set in --out; the function takes uint8 [n, c, S, S].
        weight: loss weight of the added group.
        seed: of posterior samples and of every random choice.
        device: auto, cpu, cuda, cuda:1 ...
        precision: of the feature network.
        dry_run: only say what it will take.
        check: verify the set in --out, say what is in it and draw contact_sheet.png.
        adopt: give SFD's shards in --out a manifest.
    """
    from lwd.data.images import open_images
    from lwd.data.sharding import Share
    from lwd.machine import own_device
    from lwd.progress import counting

    share = Share.from_environment()
    if check:
        _check(out, data)
    elif adopt:
        from lwd.data.foreign import adopt as adopt_shards

        print(f"Wrote {adopt_shards(out, progress=counting('adopt', 'shard'))}.")
    elif add is not None:
        _add(out, open_images(data, classes=classes, split=split), add, weight, like, batch, workers, share)
    elif texture is None and semantic is None and like is None:
        if data != "fashion-mnist":
            raise ValueError("say how to encode: --texture and --semantic (with --features), or --like a latent set")
        from lwd.data.embedded import encode_embedded

        encode_embedded(out, progress=counting("encode", "image"))
        print(f"Latents are in {out}/train and {out}/heldout.")
    else:
        from lwd.data.encode import EncodeConfig

        if repa != "none" and repa_features is None and features is None and like is None:
            raise ValueError("--repa needs --features or --repa-features: the network that they are of")
        config = EncodeConfig(
            size=size, grey=grey, flips=flips, shard_size=shard, dtype=dtype, statistics=statistics, seed=seed,
            features="float16" if repa == "none" else repa, skip_corrupt=skip_corrupt, batch=batch, workers=workers,
        )  # fmt: skip
        source, where = open_images(data, classes=classes, split=split), own_device(device)
        if like is not None:
            chosen = locals()
            defaults = {name: parameter.default for name, parameter in signature(encode).parameters.items()}
            if own := [f"--{name.replace('_', '-')}" for name in LIKE_DECIDES if chosen[name] != defaults[name]]:
                raise ValueError(f"--like takes encoders and settings from {like}; leave out {', '.join(own)}")
            encoder, config, normalization = _like(like, out, config, where, dry_run)
        else:
            encoder = _encoder(
                out, source, config, share, where, texture=texture, semantic=semantic, features=features,
                repa=None if repa == "none" else repa_features or features, grid=grid, posterior=posterior,
                pca_images=pca_images, precision=precision, dry_run=dry_run,
            )  # fmt: skip
            normalization = None
        _run(source, encoder, config, out, share, normalization, dry_run)


def _encoder(
    out: Path,
    source: ImageSource,
    config: EncodeConfig,
    share: Share,
    device: torch.device,
    *,
    texture: str | None,
    semantic: str | None,
    features: str | None,
    repa: str | None,
    grid: int | None,
    posterior: Literal["sample", "mean"],
    pca_images: int,
    precision: Literal["float32", "bf16"],
    dry_run: bool,
) -> CompositeEncoder:
    import torch

    from lwd.encoders.choose import channels_to_fit, default_pca_path, feature_network, projection, texture_encoder
    from lwd.encoders.composite import CompositeEncoder, ProjectedFeatures, SharedFeatures
    from lwd.encoders.pca import PCA

    networks: dict[str, SharedFeatures] = {}

    def network(name: str) -> SharedFeatures:
        if name not in networks:
            networks[name] = SharedFeatures(feature_network(name, grid=grid, device=device, precision=precision))
        return networks[name]

    groups: dict[str, GroupEncoder] = {}
    if texture is not None:
        groups["texture"] = texture_encoder(texture, posterior=posterior, device=device)
    if semantic is not None:
        if features is None:
            raise ValueError("--semantic needs --features: the network that it is made of")
        shared, channels = network(features), channels_to_fit(semantic)
        if channels is None:
            head: Projection = projection(semantic, device=device)
            if isinstance(head, PCA) and not dry_run:
                _keep_pca(head, out)
        elif dry_run and not default_pca_path(out).exists():
            # What it takes to encode depends on the sizes alone.
            width = shared.network.width
            head = PCA(torch.zeros(channels, width), torch.zeros(width), torch.zeros(channels))
        else:
            head = _fitted_pca(out, source, shared, channels, config, pca_images, share)
        groups["semantic"] = ProjectedFeatures(shared, head)
    return CompositeEncoder(groups, repa=None if repa is None else network(repa))


def _fitted_pca(
    out: Path,
    source: ImageSource,
    features: SharedFeatures,
    channels: int,
    config: EncodeConfig,
    images: int,
    share: Share,
) -> Projection:
    """The PCA of the set in `out`: the one it has, or a new one, which the first process fits while the others wait."""
    from lwd.data.fit import fit_pca
    from lwd.encoders.choose import default_pca_path
    from lwd.encoders.pca import PCA
    from lwd.files import differences, wait_for
    from lwd.progress import counting

    path = default_pca_path(out)
    described = {key: value for key, value in source.describe().items() if key != "path"}
    fitted_to = {
        "network": features.network.describe(), "images": described, "size": config.size, "grey": config.grey,
        "seed": config.seed, "count": min(images, len(source)), "channels": channels,
    }  # fmt: skip
    if not path.exists() and share.rank == 0:
        fit_pca(
            source, features.network, channels, config.reading, images=images, seed=config.seed,
            progress=counting("fit PCA", "image"),
        ).save(path, fitted_to=fitted_to)  # fmt: skip
    wait_for([path])
    pca, there = PCA.load(path), PCA.fitted_to(path)
    if changed := differences(there, fitted_to):
        lines = "\n  ".join(changed)
        raise ValueError(f"{path} was fitted to something else; choose another --out, or delete it:\n  {lines}")
    return pca


def _keep_pca(pca: PCA, out: Path) -> None:
    """Leave a PCA from elsewhere in the set it encodes, where `--like` finds it."""
    from lwd.encoders.choose import default_pca_path
    from lwd.encoders.pca import PCA

    path = default_pca_path(out)
    if not path.exists():
        pca.save(path)
    elif PCA.load(path).describe() != pca.describe():
        raise ValueError(f"{path} is another PCA than the one given; choose another --out, or delete it")


def _like(
    like: Path, out: Path, config: EncodeConfig, device: torch.device, dry_run: bool
) -> tuple[CompositeEncoder, EncodeConfig, Normalization]:
    """The encoder, the settings and the statistics of the set `like`; groups that were added to it are left out."""
    from dataclasses import replace

    from lwd.data import LatentDataset
    from lwd.encoders.choose import default_pca_path, encoder_of
    from lwd.encoders.pca import PCA

    data = LatentDataset.open(like)
    settings = data.manifest["provenance"].get("config")
    if settings is None:
        raise ValueError(f"{like} does not say how its images were read; --like needs a set that `lwd encode` made")
    encoder = encoder_of(data.manifest, like, device=device)
    if default_pca_path(like).exists() and not dry_run:
        _keep_pca(PCA.load(default_pca_path(like)), out)
    for name in data.spec.names:
        if name not in encoder.groups:
            function = data.encoders[name].get("encoder", "MODULE:FUNCTION")
            print(f"Left out: {name}. Add it with lwd encode --out {out} --add {name}={function} --like {like}")
    return encoder, replace(config, **settings), data.normalization_of(tuple(encoder.groups))


def _run(
    source: ImageSource,
    encoder: CompositeEncoder,
    config: EncodeConfig,
    out: Path,
    share: Share,
    normalization: Normalization | None,
    dry_run: bool,
) -> None:
    from lwd.data.encode import Encoding
    from lwd.progress import counting, duration

    encoding = Encoding(source, encoder, config, out, share, normalization)
    estimate = encoding.estimate()
    if share.rank == 0:
        print(
            f"{estimate.images:,} images, {len(source.class_names):,} classes, {estimate.shards:,} shards: "
            f"{estimate.bytes_per_image / 1e3:.1f} kB an image, {estimate.bytes / 1e9:.3g} GB in all, "
            f"{estimate.free / 1e9:.3g} GB free."
        )
        left = f"{estimate.remaining:,} still to encode" + (" by this process" if share.world > 1 else "")
        on_gpu = f" and {estimate.device_memory / 1e9:.1f} GB on the GPU" if estimate.device_memory else ""
        print(
            f"{left}: about {duration(estimate.seconds)}, {estimate.memory / 1e9:.1f} GB of memory{on_gpu}.", flush=True
        )
    if dry_run:
        return
    report = counting("encode" if share.world == 1 else f"encode {share.rank + 1}/{share.world}", "image")
    if encoding.run(report):
        print(f"Latents are in {out}.")
    else:
        print(f"Process {share.rank + 1} of {share.world} is done; the others write the rest of {out}.")


def _check(out: Path, images: str) -> None:
    from lwd.data import LatentDataset
    from lwd.data.check import check, contact_sheet, describe
    from lwd.data.images import open_images
    from lwd.encoders.choose import Decoder, decoder
    from lwd.progress import counting

    data = LatentDataset.open(out)
    print("\n".join(describe(data)))
    findings = check(data, counting("check", "file"))
    print(f"normalised latents: means within {findings.mean:.3f} of 0, deviations within {findings.std:.3f} of 1")
    source: ImageSource | None = None
    decode: Decoder | None = None
    origin = data.manifest["provenance"].get("images", {})
    try:
        known = isinstance(origin, dict) and "path" in origin
        source = open_images(origin["path"], split=origin.get("split")) if known else open_images(images)
    except (ValueError, OSError) as error:
        print(f"The images themselves are not shown: {error}")
    try:
        decode = decoder(data.encoders.get(data.spec.names[0], {}))
    except (ValueError, OSError, ImportError) as error:
        print(f"The texture is not decoded: {error}")
    try:
        print(f"Contact sheet: {contact_sheet(data, out / 'contact_sheet.png', decoder=decode, source=source)}")
    except (ValueError, OSError, ImportError) as error:  # a folder that may only be read, a damaged shard
        print(f"There is no contact sheet: {error}")
    if findings.problems:
        raise ValueError("\n".join([f"{out} is not whole:", *findings.problems]))
    print(f"{out} is whole.")


def _add(
    out: Path,
    source: ImageSource,
    text: str,
    weight: float | None,
    like: Path | None,
    batch: int,
    workers: int,
    share: Share,
) -> None:
    import sys
    from importlib import import_module

    from lwd.data.extend import add_group
    from lwd.progress import counting

    name, _, path = text.partition("=")
    module, _, function = path.partition(":")
    if not (name and module and function):
        raise ValueError(f"--add {text!r} is not of the form NAME=MODULE:FUNCTION, for example depth=my_depth:encode")
    sys.path.insert(0, str(Path.cwd()))  # where people keep such a module
    encode_images = getattr(import_module(module), function, None)
    if not callable(encode_images):
        raise ValueError(f"module {module} has no function {function!r}")
    done = add_group(
        out, source, name, encode_images, weight=weight, like=like, description={"encoder": path}, batch=batch,
        workers=workers, share=share, progress=counting(f"add {name}", "image"),
    )  # fmt: skip
    print(f"{out} has the group {name}." if done else f"Process {share.rank + 1} of {share.world} is done.")
