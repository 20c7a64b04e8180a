"""`lwd encode` and `lwd semvae`: from images to latents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from lwd.data.encode import EncodeConfig
    from lwd.data.images import ImageSource
    from lwd.data.sharding import Share
    from lwd.encoders.composite import CompositeEncoder, GroupEncoder, Projection, SharedFeatures
    from lwd.latents import Normalization


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
        like: a latent set whose encoders and statistics are used: the training set, to encode held-out images.
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
        _add(out, open_images(data, classes=classes), add, weight, batch, workers, share)
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
        source, where = open_images(data, classes=classes), own_device(device)
        if like is not None:
            encoder, config, normalization = _like(like, out, config, where, precision)
        else:
            encoder = _encoder(
                out, source, config, share, where, texture=texture, semantic=semantic, features=features,
                repa=None if repa == "none" else repa_features or features, grid=grid, posterior=posterior,
                pca_images=pca_images, precision=precision,
            )  # fmt: skip
            normalization = None
        _run(source, encoder, config, out, share, normalization, dry_run)


def semvae(
    out: Path,
    latents: Path | None = None,
    data: str | None = None,
    features: str | None = None,
    channels: int = 16,
    steps: int = 1_000_000,
    batch: int = 64,
    heldout: int = 500,
    size: int = 256,
    grid: int | None = None,
    workers: int = 8,
    seed: int = 0,
    device: str = "auto",
    precision: Literal["float32", "bf16"] | None = None,
) -> None:
    """Train a SemVAE, the semantic encoder, on features stored in a latent set or computed from images.

    The defaults are the published settings. Interrupted, the same command goes on, step for step.

    Args:
        out: directory of the run; the result is model/ in it, for `lwd encode --semantic semvae:...`.
        latents: latent set with REPA features (`lwd encode --repa`), to train on those.
        data: or images, as `lwd encode` takes them, with the --features to compute.
        features: feature network, as `lwd encode` takes it.
        channels: of the semantic group.
        steps: of training; the learning rate is constant for 80 % of them and decays then.
        batch: images per step.
        heldout: images kept from training, to measure the reconstruction with.
        size: pixels per side of the images.
        grid: positions per side of the features.
        workers: threads that read images.
        seed: of everything random.
        device: auto, cpu, cuda, cuda:1 ...
        precision: of the training; by default bf16 where the hardware has it.
    """
    import torch

    from lwd import distributed
    from lwd.data.feature_source import ImageFeatures, StoredFeatures, split
    from lwd.data.images import open_images
    from lwd.data.reading import Reading
    from lwd.encoders.choose import feature_network
    from lwd.encoders.semvae import SemVAE, SemVAEConfig
    from lwd.encoders.semvae_training import SemVAETrainConfig, train_semvae
    from lwd.machine import default_precision, own_device
    from lwd.randomness import derived_seed
    from lwd.runs import write_run_config

    with distributed.joined():
        where = own_device(device)
        if (latents is None) == (data is None):
            raise ValueError("give either --latents, a set with stored features, or --data with --features")
        if latents is not None:
            source: Any = StoredFeatures(latents)
        else:
            if features is None or data is None:
                raise ValueError("--data needs --features: the network whose features the SemVAE compresses")
            network = feature_network(features, grid=grid, device=where)
            source = ImageFeatures(open_images(data), network, Reading(size, batch=batch, workers=workers))
        training, validation = split(source, heldout, seed)
        config = SemVAETrainConfig(
            steps=steps, batch_size=batch, seed=seed, precision=precision or default_precision(where)
        )
        torch.manual_seed(derived_seed(seed, "semvae weights"))
        model = SemVAE(SemVAEConfig(features=source.width, channels=channels))
        write_run_config(out, where, train=config, model=model.config, images=len(training), heldout=len(validation))
        history = train_semvae(model, training, config, directory=out, device=where, validation=validation)
        last = history[-1]
        if distributed.rank() == 0:
            print(f"The SemVAE is {out / 'model'}; loss {last['loss']:.4f} after {steps} steps.")


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
) -> CompositeEncoder:
    from lwd.encoders.choose import channels_to_fit, feature_network, projection, texture_encoder
    from lwd.encoders.composite import CompositeEncoder, ProjectedFeatures, SharedFeatures

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
    from lwd.files import wait_for
    from lwd.progress import counting

    path = default_pca_path(out)
    if not path.exists() and share.rank == 0:
        fit_pca(
            source, features.network, channels, config.reading, images=images, seed=config.seed,
            progress=counting("fit PCA", "image"),
        ).save(path)  # fmt: skip
    wait_for([path])
    pca = PCA.load(path)
    if pca.channels != channels:
        raise ValueError(f"{path} has {pca.channels} components, not {channels}; choose another --out, or delete it")
    return pca


def _like(
    like: Path, out: Path, config: EncodeConfig, device: torch.device, precision: Literal["float32", "bf16"]
) -> tuple[CompositeEncoder, EncodeConfig, Normalization]:
    from dataclasses import replace

    from lwd.data import LatentDataset
    from lwd.encoders.choose import default_pca_path, encoder_of
    from lwd.files import write_atomically

    data = LatentDataset.open(like)
    encoder = encoder_of(data.manifest, like, device=device, precision=precision)
    if default_pca_path(like).exists():
        content = default_pca_path(like).read_bytes()
        write_atomically(default_pca_path(out), lambda temporary: temporary.write_bytes(content))
    return encoder, replace(config, **data.manifest["provenance"]["config"]), data.normalization


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
        source = open_images(origin["path"] if isinstance(origin, dict) and "path" in origin else images)
    except (ValueError, OSError) as error:
        print(f"The images themselves are not shown: {error}")
    try:
        decode = decoder(data.encoders.get(data.spec.names[0], {}))
    except (ValueError, OSError, ImportError) as error:
        print(f"The texture is not decoded: {error}")
    print(f"Contact sheet: {contact_sheet(data, out / 'contact_sheet.png', decoder=decode, source=source)}")
    if findings.problems:
        raise ValueError("\n".join([f"{out} is not whole:", *findings.problems]))
    print(f"{out} is whole.")


def _add(
    out: Path, source: ImageSource, text: str, weight: float | None, batch: int, workers: int, share: Share
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
        out, source, name, encode_images, weight=weight, description={"encoder": path}, batch=batch, workers=workers,
        share=share, progress=counting(f"add {name}", "image"),
    )  # fmt: skip
    print(f"{out} has the group {name}." if done else f"Process {share.rank + 1} of {share.world} is done.")
