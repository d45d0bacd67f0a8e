"""Ray: jobs that really run on a cluster of one machine, and what becomes of them without it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from domainbed_ext.errors import UsageError
from domainbed_ext.jobs import JobState, job_state
from domainbed_ext.launchers import ray as module
from domainbed_ext.launchers.ray import RayLauncher
from domainbed_ext.progress_file import read_progress
from domainbed_ext.records import read_records

ROOT = Path(__file__).resolve().parents[2]
JOBS = (
    "--datasets Debug28 --algorithms ERM_ViT --n_hparams 1 --n_trials 1 --single_test_envs "
    "--skip_confirmation --device cpu --skip_model_save --command_launcher ray"
).split()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ray_cpus": -1}, "neither can be below 0"),
        ({"ray_gpus": 1, "gpus_per_job": 2}, "--ray_gpus 1 is less than --gpus_per_job 2"),
        ({"jobs": 0}, "--jobs 0 is too small"),
    ],
)
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(UsageError, match=said):
        RayLauncher(**settings).check()


def test_without_ray_the_way_to_get_it_is_told(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install ray.*\[ray\]"):
        RayLauncher().check()


class Cluster:
    def __init__(self, **there):
        self.cluster_resources = lambda: there


@pytest.mark.parametrize(
    ("settings", "there", "expected"),
    [
        ({}, {"GPU": 4.0}, 1),
        ({}, {}, 0),  # --device auto, on a cluster without GPUs
        ({"device": "cpu"}, {"GPU": 4.0}, 0),
        ({"gpus_per_job": 2}, {"GPU": 4.0}, 2),
        ({"ray_gpus": 0.5}, {"GPU": 4.0}, 0.5),
        ({"device": "cuda"}, {}, None),
        ({"ray_gpus": 8}, {"GPU": 4.0}, None),
    ],
)
def test_gpus_are_those_of_a_job_and_must_be_there(settings, there, expected):
    launcher = RayLauncher(**settings)
    if expected is None:
        with pytest.raises(UsageError, match=r"the Ray cluster has \d GPUs, a job asks for"):
            launcher._resources(Cluster(**there))
    else:
        assert launcher._resources(Cluster(**there)) == {"num_gpus": expected, "num_cpus": 1}


def sweep(folder, *flags):
    # Ray gives its tasks the lowest priority, which on a busy machine takes for ever.
    settings = {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **settings}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "domainbed_ext.scripts.sweep", *JOBS, *flags]
    return subprocess.Popen(
        [*command, "--output_dir", str(folder)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray")


@needs_ray
@pytest.mark.slow
def test_jobs_run_on_a_cluster_are_taken_over_from_the_dead_and_saved_at_the_end(tmp_path):
    with sweep(tmp_path, "--steps", "400", "--test_envs", "0", "1") as process:
        try:
            wait_for(lambda: len(list(tmp_path.glob("*/results.jsonl"))) == 2)
            folder = next(tmp_path.glob("*/results.jsonl")).parent
            # As when a node dies: the process of Ray's that watches over the job; the job notices.
            os.kill(parent_of(read_progress(folder).pid), signal.SIGKILL)
            out, err = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 0, err
    assert "No Ray cluster is running here: starting one on this machine." in out
    assert err.count("] done: ERM_ViT on Debug28") == 2
    assert (folder / "out.txt").read_text().count("Environment:") == 2
    for path in tmp_path.glob("*/results.jsonl"):
        assert read_records(path)[-1]["step"] == 399
        assert job_state(path.parent) is JobState.DONE


@needs_ray
@pytest.mark.slow
def test_sigterm_to_the_launcher_makes_the_jobs_save_and_leave(tmp_path):
    with sweep(tmp_path, "--steps", "100000", "--test_envs", "0", "1") as process:
        try:
            wait_for(lambda: len(list(tmp_path.glob("*/results.jsonl"))) == 2)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 143, err
    for path in tmp_path.glob("*/err.txt"):
        assert path.read_text().startswith("stopped after step ")
        assert job_state(path.parent) is JobState.INCOMPLETE


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
