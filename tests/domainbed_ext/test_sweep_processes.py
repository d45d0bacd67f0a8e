"""Sweeps as processes: two at once, killed workers, signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path

from domainbed_ext.checkpoint import load_checkpoint
from domainbed_ext.jobs import JobState, job_state
from domainbed_ext.records import read_records
from tests.short_sweeps import DEBUG, job_folders, moved, plan, run_sweep


def test_two_sweeps_share_the_jobs_and_one_takes_over_what_the_other_leaves(tmp_path):
    flags = [*DEBUG, "--algorithms", "ERM_ViT", "--output_dir", str(tmp_path), "--jobs", "2"]
    flags[flags.index("--steps") + 1] = "100"  # enough for jobs to be caught at work
    folders = job_folders(tmp_path, flags)
    with contextlib.ExitStack() as processes:
        first = processes.enter_context(run_sweep(*flags))
        wait_for(lambda: all((folder / "lock").exists() for folder in folders[:2]))
        group = [first.pid, *workers_of(first.pid)]
        for pid in group:
            processes.callback(kill, pid)
            os.kill(pid, signal.SIGSTOP)
        second = processes.enter_context(run_sweep(*flags))
        processes.callback(second.kill)
        wait_for(lambda: (folders[2] / "done").exists())
        assert [job_state(folder) for folder in folders[:2]] == [JobState.RUNNING] * 2
        for pid in group:
            kill(pid)
        out, err = second.communicate(timeout=300)
    assert second.returncode == 0, err
    assert "3 jobs: 3 done." in out
    assert (folders[2] / "out.txt").read_text().count("Environment:") == 1
    for folder in folders:
        steps = [record["step"] for record in read_records(folder / "results.jsonl")]
        assert steps == sorted(set(steps))
        assert steps[-1] == 99


def test_a_killed_worker_is_replaced_and_ctrl_c_stops_cleanly(tmp_path):
    long = [*DEBUG, "--steps", "100000", "--algorithms", "ERM_ViT", "--output_dir", str(tmp_path)]
    with run_sweep(*long, "--jobs", "1") as process:
        first = wait_for(lambda: next(tmp_path.glob("*/results.jsonl"), None))
        os.kill(workers_of(process.pid)[0], signal.SIGKILL)
        # The job is marked and the next one runs, in a new worker.
        wait_for(lambda: (first.parent / "failed").exists())
        wait_for(lambda: len(list(tmp_path.glob("*/results.jsonl"))) == 2)
        (worker,) = workers_of(process.pid)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on with what is not done" in err
    assert "Traceback" not in err
    assert "worker died (SIGKILL, out of memory?)" in err
    wait_for(lambda: not Path(f"/proc/{worker}").exists())
    assert json.loads((first.parent / "failed").read_text())["reason"] == "died"
    assert "the worker process died" in (first.parent / "err.txt").read_text()
    states = {job.state for job in plan(*long) for job in [moved(job, tmp_path)]}
    assert states == {JobState.FAILED, JobState.INCOMPLETE, JobState.NOT_LAUNCHED}


def test_sigterm_makes_a_worker_save_and_leave(tmp_path):
    long = [*DEBUG, "--steps", "100000", "--algorithms", "LTDR", "--output_dir", str(tmp_path)]
    with run_sweep(*long, "--jobs", "1") as process:
        wait_for(lambda: len(list(tmp_path.glob("*/results.jsonl"))) == 1)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err.endswith("\nstopped; the same command goes on with what is not done\n")
    assert "Traceback" not in err
    states = [moved(job, tmp_path).state for job in plan(*long)]
    assert states == [JobState.INCOMPLETE, JobState.NOT_LAUNCHED, JobState.NOT_LAUNCHED]
    (errors,) = tmp_path.glob("*/err.txt")
    step = load_checkpoint(errors.parent / "checkpoint.safetensors").step
    assert step > 0
    expected = f"stopped after step {step}; the same command goes on from there\n"
    assert errors.read_text() == expected


def workers_of(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    return [pid for pid, command in commands.items() if b"spawn_main" in command]


def kill(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return result
