"""What MoE-LLaVA computes at its own pins (torch 2.0, transformers 4.37, DeepSpeed 0.9.5), for
tests with today's torch: tiny random models, their inputs and outputs.

MOE_LLAVA_PYTHON names the interpreter of such an environment (tests/vlm/test_moe_llava_pins.py says
how to make one); it runs this file once per test session, with MOE_LLAVA_PYTHONPATH on its path if
that is set.
"""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

PYTHON = os.environ.get("MOE_LLAVA_PYTHON", "")
CASES = list(itertools.product(("stablelm", "phi", "qwen1_5", "qwen"), (1, 2), (False, True)))


def why_not() -> str:
    """What is missing; empty if nothing is."""
    if not Path(os.environ.get("MOE_LLAVA_DIR", ""), "moellava").is_dir():
        return "MOE_LLAVA_DIR names no checkout of MoE-LLaVA"
    if not PYTHON:
        return "MOE_LLAVA_PYTHON names no interpreter with MoE-LLaVA's pins"
    return ""


@functools.cache
def references() -> dict[tuple, dict[str, Any]]:
    """By family, top k and whether experts are residual: `config`, `state`, `logits`, `loss`,
    `losses` (one per sparse layer)."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.environ.get("MOE_LLAVA_PYTHONPATH", "")}
    environment["PYTHONPATH"] += f":{root}"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [PYTHON, "-m", "tests.vlm.moe_llava_references", folder],
            cwd=root, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return torch.load(Path(folder, "references.pt"), weights_only=True)


def write(folder: str) -> None:
    """Compute them, in the old environment."""
    from tests.vlm.real_moe_llava import (
        CHECKOUT,
        batch,
        model_of,
        start_deepspeed,
        write_tower_here,
    )

    sys.path.insert(0, CHECKOUT)
    os.chdir(folder)
    write_tower_here()
    start_deepspeed(29543)
    import deepspeed.moe.sharded_moe as sharded

    sharded.gumbel_rsample = lambda shape, device: torch.zeros(shape, device=device)
    found = {}
    for family, k, residual in CASES:
        model = model_of(family, moe={"top_k_experts": k, "use_residual": residual})
        with torch.no_grad():
            output = model(**batch())
        config = {
            name: value
            for name, value in model.config.to_dict().items()
            if isinstance(value, (bool, int, float, str, dict, list, type(None)))
        }
        found[family, k, residual] = {
            "config": config,
            "state": {name: value.clone() for name, value in model.state_dict().items()},
            "logits": output.logits,
            "loss": output.loss,
            "losses": list(output.moe_loss_list),
        }
    torch.save(found, "references.pt")


if __name__ == "__main__":
    write(sys.argv[1])
