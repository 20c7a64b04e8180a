"""SemVAE: the published model's numbers, reading checkpoints, sampling, its loss and its training."""

import hashlib
import json
import math
import pathlib
import time
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from lwd import distributed
from lwd.checkpoints import Checkpoints
from lwd.encoders.pca import PCAFit
from lwd.encoders.semvae import SemVAE, SemVAEConfig
from lwd.encoders.semvae_training import (
    SemVAETrainConfig,
    TensorFeatures,
    evaluate_semvae,
    semvae_loss,
    train_semvae,
)
from lwd.loop import NonFiniteLossError
from recipe_weights import load_fixture, recipe_weights

TINY = SemVAEConfig(features=12, channels=3, width=16, depth=2, heads=4)


def tiny(config: SemVAEConfig = TINY, posterior="sample", seed: int = 0) -> SemVAE:
    torch.manual_seed(seed)
    return SemVAE(config, posterior=posterior)


def random_maps(count: int = 5, features: int = 12, side: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, features, side, side, generator=torch.Generator().manual_seed(seed))


def tokens(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).norm() / expected.norm()) < tolerance


# --- the published model -----------------------------------------------------------------------------------------


def test_agrees_with_the_reference():
    values, shapes = load_fixture("semvae_16ch")
    model = SemVAE.from_published(recipe_weights(shapes))
    assert model.config == SemVAEConfig()
    assert not model.training
    maps = values["features"].transpose(1, 2).unflatten(2, (4, 4))
    with torch.no_grad():
        mean, logvar = model.moments(maps)
        reconstruction = model.decode(mean)
    assert mean.shape == logvar.shape == (2, 16, 4, 4)
    assert_close(tokens(mean), values["moments"][..., :16])
    assert_close(tokens(logvar), values["moments"][..., 16:])
    assert_close(tokens(reconstruction), values["reconstruction"])


class PublishedBlock(nn.Module):
    """The names of the published block, by torch's own attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn(h, h, h)[0]
        return x + self.mlp(self.norm2(x))


def published(config: SemVAEConfig = TINY, *, outputs: int = 2) -> nn.ModuleDict:
    """Encoder and decoder in the published names; all weights random, biases and norms included."""

    def half(into: int, out: int) -> nn.Sequential:
        blocks = [PublishedBlock(config.width, config.heads) for _ in range(config.depth)]
        ends = nn.LayerNorm(config.width), nn.Linear(config.width, out)
        return nn.Sequential(nn.Linear(into, config.width), *blocks, *ends)

    torch.manual_seed(3)
    halves = {
        "encoder": half(config.features, outputs * config.channels),
        "decoder": half(config.channels, config.features),
    }
    model = nn.ModuleDict(halves).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_training_checkpoint_and_a_bare_state_dict_are_read(tmp_path, wrapped):
    reference = published()
    content = reference.state_dict()
    if wrapped:
        content = {
            "iteration": 7,
            "model_state_dict": {f"module.{name}": value.half() for name, value in content.items()},
            "optimizer_state_dict": torch.optim.AdamW(reference.parameters()).state_dict(),
            "loss": 0.5,
            "config": "model:\n  variational: true\n",
        }
        reference = reference.half().float()
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path)
    model = SemVAE.load(path, heads=4)
    assert model.config == TINY
    maps = random_maps()
    with torch.no_grad():
        expected = reference["encoder"](tokens(maps))
        mean, logvar = model.moments(maps)
        assert_close(tokens(torch.cat([mean, logvar], dim=1)), expected, 1e-6)
        assert_close(tokens(model.decode(mean)), reference["decoder"](expected[..., :3]), 1e-6)
    assert model.describe() == {
        "encoder": "semvae",
        "source": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "channels": 3,
        "features": 12,
        "heads": 4,
        "posterior": "sample",
    }


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = tiny(posterior="mean")
    model.save_pretrained(tmp_path / "model")
    loaded = SemVAE.load(tmp_path / "model", posterior="mean")
    assert loaded.config == TINY
    assert not loaded.training
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(loaded.transform(random_maps()), model.transform(random_maps()))
    found = loaded.describe()
    assert found["source"] == str(tmp_path / "model")
    assert found["sha256"] == hashlib.sha256((tmp_path / "model" / "model.safetensors").read_bytes()).hexdigest()
    assert model.describe()["sha256"] is None


def test_another_architecture_is_named(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"model_state_dict": nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(12, 6))}).state_dict()}, path)
    with pytest.raises(ValueError) as caught:
        SemVAE.load(path)
    message = str(caught.value)
    assert message.startswith(
        f"cannot read {path} as a SemVAE: the weights are of another architecture. Tensors missin"
    )
    # 2 halves x (4 blocks x 12 tensors + 3 layers x 2), less the two that are there; eight of them are named.
    listed = message.split("missing: ")[1].split(";")[0]
    assert listed.endswith(f" and {2 * (4 * 12 + 6) - 2 - 8} more")
    assert listed.count("encoder.") == 8
    assert "of another shape: encoder.0.weight (6, 12) instead of (768, 768)" in message

    torch.save(published(outputs=1).state_dict(), path)  # the autoencoder without a variance
    with pytest.raises(ValueError, match=r"of another shape: encoder\.4\.weight \(3, 16\) instead of \(6, 16\)"):
        SemVAE.load(path, heads=4)
    torch.save(published().state_dict() | {"classifier.weight": torch.zeros(10, 3)}, path)
    with pytest.raises(ValueError, match=r"Tensors unexpected: classifier\.weight \(10, 3\)$"):
        SemVAE.load(path, heads=4)
    torch.save(published().state_dict(), path)
    with pytest.raises(ValueError, match=r"width of 16 does not divide into 6 heads; pass heads="):
        SemVAE.load(path)


def test_files_that_cannot_be_read_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file or directory .*nothing"):
        SemVAE.load(tmp_path / "nothing.pt")
    path = tmp_path / "checkpoint.pt"
    torch.save({"model_state_dict": published().state_dict(), "config": pathlib.PurePosixPath("a")}, path)
    with pytest.raises(ValueError, match=r"keep the weights alone: torch.save\(torch.load\('checkpoint.pt', weights_o"):
        SemVAE.load(path, heads=4)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"truncated or not a checkpoint|is damaged"):
        SemVAE.load(path, heads=4)
    torch.save({"step": 3}, path)
    with pytest.raises(ValueError, match="holds no weights"):
        SemVAE.load(path)

    directory = tiny().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"heads=2 was asked for, but its config\.json says 4"):
        SemVAE.load(directory, heads=2)
    with pytest.raises(ValueError, match="give the directory"):
        SemVAE.load(directory / "model.safetensors")
    weights = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated"):
        SemVAE.load(directory)
    (directory / "config.json").write_text('{"encoder": "semvae", "size": 3}')
    with pytest.raises(ValueError, match=r"config\.json has other settings: .*size"):
        SemVAE.load(directory)
    (directory / "config.json").write_text('{"hidden_size": 3}')
    with pytest.raises(ValueError, match=r"config\.json is not that of a SemVAE"):
        SemVAE.load(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"not a saved SemVAE: it has no model\.safetensors"):
        SemVAE.load(directory)


def test_settings_and_shapes_that_make_no_sense():
    with pytest.raises(ValueError, match="width of 16 does not divide into heads=3"):
        replace(TINY, heads=3)
    with pytest.raises(ValueError, match="depth must be a whole number of at least 1, not 0"):
        replace(TINY, depth=0)
    with pytest.raises(ValueError, match="posterior is 'sample' or 'mean', not 'mode'"):
        tiny(posterior="mode")
    with pytest.raises(ValueError, match=r"feature maps have shape \(5, 7, 3, 3\), this SemVAE needs \[N, 12, h, w\]"):
        tiny().moments(random_maps(features=7))
    with pytest.raises(ValueError, match=r"latents have shape \(5, 7, 3, 3\), this SemVAE needs \[N, 3, h, w\]"):
        tiny().decode(random_maps(features=7))


# --- encoding ----------------------------------------------------------------------------------------------------


def test_samples_depend_on_their_seeds_only():
    model, maps = tiny().eval(), random_maps(6)
    seeds = [5, 0, 11, 2**40, 5, 3]
    whole = model.transform(maps, seeds)
    parts = torch.cat([model.transform(maps[i:j], seeds[i:j]) for i, j in ((0, 1), (1, 4), (4, 6))])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        mean, logvar = model.moments(maps)
    noise = (whole - mean) / (logvar / 2).exp()
    torch.testing.assert_close(noise[0], noise[4], rtol=1e-4, atol=1e-5)  # one seed, two images
    assert (noise[0] - noise[1]).abs().max() > 0.1
    # The same seed in another batch, with maps of another type.
    torch.testing.assert_close(model.transform(maps[2:3].double(), seeds=[11]), whole[2:3], rtol=1e-5, atol=1e-6)


def test_samples_have_the_moments_of_the_posterior():
    model = tiny()
    mean, logvar = torch.tensor([[1.0, -2.0, 0.0]]), torch.tensor([[0.0, math.log(4.0), -30.0]])
    mean, logvar = (x[:, :, None, None].expand(4000, -1, 1, 1) for x in (mean, logvar))
    samples = model.draw(mean, logvar, range(4000))[:, :, 0, 0]
    deviation = torch.tensor([1.0, 2.0, math.exp(-15)])
    error = (samples.mean(dim=0) - mean[0, :, 0, 0]).abs() / deviation
    assert error.max() < 4 / math.sqrt(4000)
    torch.testing.assert_close(samples.std(dim=0) / deviation, torch.ones(3), rtol=0, atol=4 / math.sqrt(8000))


def test_the_mean_needs_no_seeds_and_samples_do():
    model, maps = tiny(posterior="mean"), random_maps()
    assert torch.equal(model.transform(maps), model.moments(maps)[0])
    assert torch.equal(model.transform(maps, [1, 2, 3, 4, 5]), model.transform(maps))
    with pytest.raises(ValueError, match="samples of 5 images need as many seeds, 0 are given"):
        tiny().transform(maps)
    with pytest.raises(ValueError, match="5 images need as many seeds, 2 are given"):
        tiny().transform(maps, [0, 1])


def test_positions_are_a_set():
    """No positions are encoded: permuting those of the maps permutes those of the latents."""
    model, maps = tiny(), random_maps(2, side=4)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))

    def permuted(x: Tensor) -> Tensor:
        return x.flatten(2)[:, :, order].unflatten(2, (2, 8))

    with torch.no_grad():
        torch.testing.assert_close(model.moments(permuted(maps))[0], permuted(model.moments(maps)[0]))


def test_log_variances_are_clamped():
    model = tiny()
    with torch.no_grad():
        model.encoder.output.weight.zero_()
        model.encoder.output.bias[3:] = torch.tensor([-1e3, 1e3, 0.5])
        logvar = model.moments(random_maps())[1]
    assert logvar.amin(dim=(0, 2, 3)).tolist() == logvar.amax(dim=(0, 2, 3)).tolist() == [-30.0, 20.0, 0.5]


# --- loss and learning rate --------------------------------------------------------------------------------------


def test_loss_against_closed_forms():
    """Feature vectors of known angles and lengths, and Gaussians of known divergence."""
    target = torch.zeros(2, 4, 1, 3)
    target[:, 0] = 2.0
    recon = torch.zeros(2, 4, 1, 3)
    recon[:, 0, 0, 0] = 1.0  # the same direction, half the length
    recon[:, 1, 0, 1] = 1.0  # a right angle
    recon[:, 0, 0, 2] = -1.0  # the opposite direction
    mean = torch.tensor([0.0, 3.0])[None, :, None, None].expand(2, 2, 1, 3)
    logvar = torch.tensor([math.log(4.0), 0.0])[None, :, None, None].expand(2, 2, 1, 3)
    terms = semvae_loss(recon, target, mean, logvar, SemVAETrainConfig(mse=2.0, cosine=3.0, kl=0.01))
    mse = (1 + (4 + 1) + 9) / (3 * 4)
    kl = 3 * ((4 - 1 - math.log(4.0)) / 2 + 9 / 2)
    assert [float(x) for x in terms[1:]] == pytest.approx([mse, (0 + 1 + 2) / 3, kl], rel=1e-6)
    assert float(terms.total) == pytest.approx(2 * mse + 3 * 1 + 0.01 * kl, rel=1e-6)


def test_cosine_is_over_the_features_of_a_position():
    """Scaling each position by itself leaves it alone; over the tokens it would not."""
    maps = random_maps()
    scales = torch.rand(5, 1, 3, 3, generator=torch.Generator().manual_seed(2)) + 0.1
    zero = torch.zeros(5, 3, 3, 3)
    config = SemVAETrainConfig()
    assert float(semvae_loss(maps * scales, maps, zero, zero, config).cosine) == pytest.approx(0, abs=1e-6)
    assert float(1 - torch.cosine_similarity(tokens(maps * scales), tokens(maps), dim=1).mean()) > 0.05
    assert float(semvae_loss(maps, maps, zero, zero, config).total) == pytest.approx(0, abs=1e-6)


def test_learning_rate():
    published = SemVAETrainConfig()
    steps = (0, 249, 499, 500, 799_999, 800_000, 900_000, 999_999)
    expected = (0.002, 0.5, 1, 1, 1, 1, 0.55, 0.1)
    assert [published.factor(step) for step in steps] == pytest.approx(expected, abs=1e-9)
    short = SemVAETrainConfig(steps=100)  # warms up for 10 steps
    assert [short.factor(s) for s in (0, 9, 10, 80, 90)] == pytest.approx([0.1, 1, 1, 1, 0.55])
    assert short.factor(99) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 0.95)))
    assert SemVAETrainConfig(steps=1).factor(0) == 1
    assert SemVAETrainConfig(steps=4, constant=1.0).factor(3) == 1
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        SemVAETrainConfig(steps=0)


# --- training ----------------------------------------------------------------------------------------------------


def curved_features(count: int, seed: int) -> Tensor:
    """12 features on a curved surface of 2 dimensions: sines of two hidden numbers per position, [count, 12, 2, 2]."""
    directions = torch.randn(12, 2, generator=torch.Generator().manual_seed(7))
    hidden = 1.2 * torch.randn(count, 2, 2, 2, generator=torch.Generator().manual_seed(seed))
    return torch.sin(torch.einsum("fk,nkhw->nfhw", directions, hidden))


CONFIG = SemVAETrainConfig(
    steps=12, batch_size=8, lr=1e-3, precision="float32", log_every=3, save_seconds=0, validate_every=48
)


def test_it_learns_what_principal_components_cannot():
    """On a curved surface two channels leave less than a third unexplained of what two principal components do."""
    train, heldout = curved_features(800, seed=0), curved_features(100, seed=1)
    pca = PCAFit(12).update(train).components(2)
    centred = heldout - pca.mean[:, None, None]
    projected = torch.einsum("cf,nchw->nfhw", pca.directions, pca.transform(heldout))
    linear = 1 - float((centred - projected).square().sum() / centred.square().sum())

    model = tiny(replace(TINY, channels=2, width=32))
    config = replace(CONFIG, steps=500, batch_size=32, lr=5e-3, log_every=100, validate_every=10**9)
    history = train_semvae(model, TensorFeatures(train), config, validation=TensorFeatures(heldout))
    assert history[-1]["loss"] < 0.2 * history[0]["loss"]
    assert not model.training
    assert [("heldout_mse" in row) for row in history] == [False] * 4 + [True]
    assert linear < 0.75
    assert 1 - history[-1]["heldout_explained_variance"] < (1 - linear) / 3
    assert history[-1]["heldout_cosine_similarity"] > 0.95


class StoppedError(Exception):
    pass


class StopsAt(TensorFeatures):
    """Features that break off a run like a power failure, at the given batch."""

    def __init__(self, maps: Tensor, stop: int) -> None:
        super().__init__(maps)
        self.left = stop

    def gather(self, indices: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise StoppedError
        return super().gather(indices)


def log_without_times(path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("images_per_second", "waited_for_data")} for row in rows]


def wait_for_checkpoint(directory, step: int) -> None:
    """Checkpoints are written in the background, also of a run that has just broken off."""
    for _ in range(3000):
        if step in Checkpoints(directory).steps():
            return
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint of step {step} in {directory}")


@pytest.mark.parametrize("stop", [1, 5, 10])
def test_interrupted_equals_uninterrupted_bit_for_bit(tmp_path, stop):
    maps, heldout = curved_features(30, seed=0), TensorFeatures(curved_features(5, seed=1))
    whole, broken, resumed = (tiny(seed=seed) for seed in (0, 0, 9))
    train_semvae(whole, TensorFeatures(maps), CONFIG, directory=tmp_path / "a", validation=heldout)
    with pytest.raises(StoppedError):
        train_semvae(broken, StopsAt(maps, stop), CONFIG, directory=tmp_path / "b", validation=heldout)
    if stop < 3:  # before the first checkpoint: from the beginning, with the first weights
        resumed = tiny()
    else:
        wait_for_checkpoint(tmp_path / "b", stop // 3 * 3)
    train_semvae(resumed, TensorFeatures(maps), CONFIG, directory=tmp_path / "b", validation=heldout)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    rows = log_without_times(tmp_path / "a" / "metrics.jsonl")
    assert rows == log_without_times(tmp_path / "b" / "metrics.jsonl")
    assert [row["step"] for row in rows if "heldout_mse" in row] == [6, 12]
    saved = SemVAE.load(tmp_path / "b" / "model")
    assert torch.equal(saved.transform(maps, range(30)), whole.transform(maps, range(30)))


def test_every_step_draws_fresh_noise_from_the_seed():
    class Recording(SemVAE):
        def forward(self, maps: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            seen.append(noise)
            return super().forward(maps, noise)

    runs = []
    for seed in (0, 0, 1):
        seen: list[Tensor] = []
        train_semvae(Recording(TINY), TensorFeatures(curved_features(30, seed=0)), replace(CONFIG, seed=seed))
        runs.append(torch.stack(seen))
    assert torch.equal(runs[0], runs[1])
    assert not torch.isin(runs[2], runs[0]).any()
    assert len(runs[0].unique()) > 0.999 * runs[0].numel() == 0.999 * 12 * 8 * 3 * 4
    assert float(runs[0].std()) == pytest.approx(1, abs=0.08)


def test_a_run_with_other_settings_is_refused(tmp_path):
    maps = curved_features(30, seed=0)
    train_semvae(tiny(), TensorFeatures(maps), CONFIG, directory=tmp_path)
    with pytest.raises(ValueError, match=r"train\.kl: 1e-07 in the checkpoint, 0\.1 now"):
        train_semvae(tiny(), TensorFeatures(maps), replace(CONFIG, kl=0.1), directory=tmp_path)
    with pytest.raises(ValueError, match="images: 30 in the checkpoint, 20 now"):
        train_semvae(tiny(), TensorFeatures(maps[:20]), CONFIG, directory=tmp_path)


def test_nan_is_traced_to_the_image():
    maps = curved_features(30, seed=0)
    maps[17, 2] = float("nan")
    with pytest.raises(NonFiniteLossError, match=r"not finite at step \d+ .*features of images \[17\] are NaN"):
        train_semvae(tiny(), TensorFeatures(maps), CONFIG)
    with pytest.raises(NonFiniteLossError, match="the update diverged"):
        train_semvae(tiny(), TensorFeatures(curved_features(30, seed=0)), replace(CONFIG, lr=1e38))


def test_training_in_bf16_is_near_training_in_float32():
    maps = TensorFeatures(curved_features(64, seed=0))
    losses = [
        train_semvae(tiny(), maps, replace(CONFIG, precision=precision))[-1]["loss"]
        for precision in ("float32", "bf16")
    ]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_evaluation_against_closed_forms():
    """A decoder that knows no more than each feature's mean explains nothing; its error is the variance."""
    maps = random_maps(7, seed=4) * 2 + torch.arange(12.0)[:, None, None]
    model = tiny()
    with torch.no_grad():
        for half, bias in ((model.encoder, torch.zeros(6)), (model.decoder, maps.mean(dim=(0, 2, 3)))):
            half.output.weight.zero_()
            half.output.bias.copy_(bias)
    found = evaluate_semvae(model, TensorFeatures(maps), batch_size=3)
    means = maps.mean(dim=(0, 2, 3), keepdim=True).expand_as(maps)
    assert found["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert found["mse"] == pytest.approx(float((maps - means).square().mean()), rel=1e-5)
    assert found["cosine_similarity"] == pytest.approx(float(torch.cosine_similarity(maps, means).mean()), rel=1e-5)
    assert found["kl"] == 0  # mean 0, log-variance 0
    with pytest.raises(ValueError, match="never vary"):
        evaluate_semvae(model, TensorFeatures(torch.ones(2, 12, 1, 1)))
    with pytest.raises(ValueError, match="N at least 1"):
        TensorFeatures(torch.zeros(0, 12, 1, 1))


def _train_as(rank: int, world: int, directory: pathlib.Path) -> None:
    """One of `world` processes of a training."""
    import os

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (directory / "port").read_text()}
    with distributed.joined():
        train_semvae(tiny(), TensorFeatures(curved_features(30, seed=0)), CONFIG, directory=directory / "run")


def test_two_processes_do_the_same_training(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    mp.spawn(_train_as, (2, tmp_path), nprocs=2)
    alone = tiny()
    history = train_semvae(alone, TensorFeatures(curved_features(30, seed=0)), CONFIG)
    together = SemVAE.load(tmp_path / "run" / "model")
    # Not weight by weight: a bias of keys changes nothing, its gradient is rounding error, and Adam takes its sign.
    maps = random_maps()
    with torch.no_grad():
        assert_close(together.decode(together.moments(maps)[0]), alone.decode(alone.moments(maps)[0]), 1e-4)
    losses = [row["loss"] for row in log_without_times(tmp_path / "run" / "metrics.jsonl")]
    assert losses == pytest.approx([row["loss"] for row in history], rel=1e-5)
