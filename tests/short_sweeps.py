"""Sweeps of a few short jobs on images that need no file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from domainbed_ext.plan import make_jobs
from domainbed_ext.sweep_flags import build_parser

ROOT = Path(__file__).resolve().parents[1]
ONE_EACH = "--n_hparams 1 --n_trials 1 --single_test_envs --skip_confirmation".split()
DEBUG = [*"--datasets Debug28 --steps 3 --device cpu".split(), *ONE_EACH]


def plan(*flags):
    """The jobs of such flags."""
    return make_jobs(build_parser().parse_args([*flags, "--output_dir", "sweep"]))


def job_folders(tmp_path, flags):
    """The folders of those jobs below `tmp_path`."""
    return [tmp_path / job.output_dir.name for job in plan(*flags)]


def moved(job, folder):
    """The job, with its folder there."""
    return type(job)(job.train_args, folder / job.output_dir.name)


def run_sweep(*flags):
    """A sweep in a process of its own, as users run it."""
    # passive: threads that spin while others have the cores take minutes for tiny models
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "domainbed_ext.scripts.sweep", *flags]
    return subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a shell makes what it runs in the background, these tests perhaps, ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
