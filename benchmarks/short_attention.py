"""Training step of the demo's network: our attention for few tokens on a CPU against PyTorch's fused kernel.

    python benchmarks/short_attention.py --json short_attention.json

Both variants take turns in one run, on the same batches; the ratio is of the medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from unittest.mock import patch

import torch
from torch.nn import functional as F

from lwd import IMAGENET_SPEC, LightningDiT, lightningdit_config
from lwd.backbones import lightningdit
from lwd.files import write_json
from lwd.machine import describe_machine, describe_versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=4, help="side of the token grid")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the result here too")
    chosen = parser.parse_args()

    torch.manual_seed(0)
    model = LightningDiT(lightningdit_config("demo", IMAGENET_SPEC, chosen.side, num_classes=10))
    z = torch.randn(chosen.batch, IMAGENET_SPEC.channels, chosen.side, chosen.side)
    t, labels = torch.rand(chosen.batch, 2), torch.zeros(chosen.batch, dtype=torch.long)

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(z, t, labels).square().mean()
        loss.backward()
        model.zero_grad()
        return time.perf_counter() - start

    ours, fused = [], []
    for _ in range(chosen.repeats):
        ours.append(step())
        with patch.object(lightningdit, "attend", F.scaled_dot_product_attention):
            fused.append(step())
    result = {
        "tokens": chosen.side**2,
        "batch": chosen.batch,
        "seconds_ours": statistics.median(ours[2:]),
        "seconds_fused": statistics.median(fused[2:]),
        "machine": describe_machine(torch.device("cpu")),
        "versions": describe_versions(),
    }
    result["ratio_fused_to_ours"] = result["seconds_fused"] / result["seconds_ours"]
    for name, value in result.items():
        print(f"{name}: {value}")
    if chosen.json is not None:
        write_json(chosen.json, result)


if __name__ == "__main__":
    main()
