"""Runs code of a real DomainBed checkout, in a process of its own and without our hook."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

needs_upstream = pytest.mark.skipif(
    not os.environ.get("DOMAINBED_DIR"),
    reason="needs a DomainBed checkout: set DOMAINBED_DIR to its root",
)


def checkout() -> Path:
    """The root of the checkout."""
    return Path(os.environ["DOMAINBED_DIR"]).resolve()


def run_upstream(*arguments: str, stdin: str = "") -> str:
    """Standard output of `python <arguments>` beside the checkout; skips if it cannot run."""
    environment = os.environ | {
        "PYTHONPATH": str(checkout()),
        "PYTHONDONTWRITEBYTECODE": "1",
        "DOMAINBED_EXT": "off",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        env=environment,
        cwd=checkout(),
        timeout=300,
        check=False,
    )
    if done.returncode and "ModuleNotFoundError" in done.stderr:
        pytest.skip(f"the checkout does not run here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def ask_upstream(code: str, question: Any) -> Any:
    """The JSON that `code` prints, which finds `question` in a variable of that name."""
    prologue = "import json, sys\nquestion = json.load(sys.stdin)\n"
    return json.loads(run_upstream("-c", prologue + code, stdin=json.dumps(question)))
