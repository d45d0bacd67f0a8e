"""A job that lies in a sweep's folder twice."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from sweep_records import make_record

from domainbed_ext.errors import UsageError
from domainbed_ext.job_copies import drop_copies

A, B, C = Path("sweep/a"), Path("sweep/b"), Path("sweep/c")


def run_of(steps, *, acc=0.5, test_envs=(0,), **changes):
    return [
        make_record(test_envs, step=step, in_acc=[acc] * 3, out_acc=[acc] * 3, **changes)
        for step in range(steps)
    ]


def test_different_jobs_are_all_kept():
    jobs = {A: run_of(2), B: run_of(2, trial_seed=1), C: run_of(2, test_envs=(0, 1))}
    assert drop_copies(jobs) == ([*jobs[A], *jobs[B], *jobs[C]], [])


def test_the_first_of_equal_copies_is_kept():
    # Where it ran, how fast and with which memory makes no other run of it.
    copy = [record | {"step_time": 1.0, "mem_gb": 2.0} for record in run_of(2)]
    copy[0]["args"]["output_dir"] = "elsewhere"
    assert drop_copies({A: run_of(2), B: copy}) == (run_of(2), ["b is a copy of a"])


def test_the_longest_of_unfinished_copies_is_kept():
    jobs = {A: run_of(1), B: run_of(3), C: []}
    assert drop_copies(jobs) == (run_of(3), ["a is a copy of b"])


def test_nan_is_equal_to_nan():
    assert len(drop_copies({A: run_of(1, acc=math.nan), B: run_of(1, acc=math.nan)})[0]) == 1


@pytest.mark.parametrize("other", [run_of(2, acc=0.6), run_of(3)[1:]])
def test_other_numbers_are_another_run(other):
    with pytest.raises(UsageError) as caught:
        drop_copies({A: run_of(2), B: other})
    assert str(caught.value).endswith(
        "hold two different runs of one job (ERM on Debug28, test_envs [0], hparams seed 0, "
        "trial 0); delete one, collect them from separate folders, or pass --allow-mixed"
    )
