"""The code of the README runs as printed."""

import re
from pathlib import Path

import torch
from torch import nn

import lwd
from lwd.cli import COMMANDS

README = Path(__file__).parents[1] / "README.md"


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(50, 48, 1)

    def forward(self, z, t, labels):
        return self.mix(torch.cat([z, t[:, :, None, None].expand(-1, -1, *z.shape[2:])], dim=1))


def test_the_training_loop_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    code = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)[0]
    assert len(code.strip().splitlines()) <= 12
    batches = [(torch.randn(4, 48, 2, 2), torch.zeros(4, dtype=torch.long)) for _ in range(3)]
    denoiser = Denoiser()
    before = denoiser.mix.weight.detach().clone()
    exec(code, {"denoiser": denoiser, "loader": batches})
    learned = lwd.load_schedule("schedule.json", ("texture", "semantic"))
    moved = learned.rho.detach() - lwd.PolynomialSchedule().rho.detach()
    assert moved.abs().max() > 1e-3
    assert not torch.equal(denoiser.mix.weight, before)


def test_every_command_of_the_readme_exists():
    commands = re.findall(r"^lwd (\w+)", README.read_text(), flags=re.MULTILINE)
    assert len(commands) >= 6
    assert set(commands) <= set(COMMANDS)


def test_every_file_the_readme_links_exists():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target


def test_every_public_name_has_a_line_in_the_list_of_names():
    page = (README.parent / "docs" / "api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(?:lwd\.)?(\w+)`", page))
    assert set(lwd.__all__) <= named
    assert set(lwd._SUBPACKAGES) <= named
    assert all(hasattr(lwd, name) for name in named - {"lwd"})
