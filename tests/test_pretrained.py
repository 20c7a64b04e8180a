"""Networks as directories and on the hub."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lwd import LightningDiT
from networks import SMALL, inputs, random_model


def test_saved_network_is_restored_bit_for_bit(tmp_path):
    model = random_model(replace(SMALL, clocks=1, repa_depth=2, repa_dim=8, repa_projector_dim=16))
    model.save_pretrained(tmp_path / "model")
    state = torch.get_rng_state()
    restored = LightningDiT.from_pretrained(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state), "loading must not draw random numbers"
    assert restored.config == model.config
    assert not restored.training
    assert all(parameter.requires_grad for parameter in restored.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value), name
    assert torch.equal(restored(*inputs(SMALL)), model(*inputs(SMALL)))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_damaged_directories(tmp_path):
    path = random_model(SMALL).save_pretrained(tmp_path / "model")
    config, weights = path / "config.json", path / "model.safetensors"
    good = config.read_text()
    config.write_text(good.replace('"hidden_size": 16', '"hidden_size": 24'))
    with pytest.raises(ValueError, match=r"x_embedder\.weight has shape \(16, 6, 1, 1\), expected \(24, 6, 1, 1\)"):
        LightningDiT.from_pretrained(path)
    config.write_text(good.replace('"depth": 2', '"depth": 3'))
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit .* missing: blocks\.2\."):
        LightningDiT.from_pretrained(path)
    config.write_text(good.replace('"depth"', '"depht"'))
    with pytest.raises(ValueError, match=r"config\.json: .*'depht' \(did you mean 'depth'\?\)"):
        LightningDiT.from_pretrained(path)
    config.write_text(good[:40])
    with pytest.raises(ValueError, match=r"config\.json is not readable JSON"):
        LightningDiT.from_pretrained(path)
    config.write_text(good)
    content = weights.read_bytes()
    for length in (0, 5, len(content) // 2, len(content) - 1):
        weights.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated"):
            LightningDiT.from_pretrained(path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        LightningDiT.from_pretrained(path)


def test_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model directory 'runs/a/model'"):
        LightningDiT.from_pretrained("runs/a/model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub"):
        LightningDiT.from_pretrained("someone/model")

    model = random_model(SMALL)
    saved = model.save_pretrained(tmp_path / "cache")
    hub = {"someone/model": str(saved)}

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        if name not in hub:
            raise OSError("404")
        return hub[name]

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    assert torch.equal(LightningDiT.from_pretrained("someone/model")(*inputs(SMALL)), model(*inputs(SMALL)))
    with pytest.raises(FileNotFoundError, match="not found on the hub either: 404"):
        LightningDiT.from_pretrained("nobody/model")
