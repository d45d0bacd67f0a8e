"""How long a sweep would take, from the records of jobs that are done."""

from __future__ import annotations

import json

import pytest

from domainbed_ext.estimates import Pace, measured_pace, seconds_left
from domainbed_ext.job_files import mark_done
from domainbed_ext.jobs import Job, JobState
from domainbed_ext.plan import make_jobs
from domainbed_ext.scripts.sweep import main
from domainbed_ext.sweep_flags import build_parser

# Debug28: 3 domains of 16 images; 301 steps, a record at 0, 100, 200 and 300.
ARGS = {"dataset": "Debug28", "algorithm": "LTDR", "test_envs": [0]}


def job(folder, number, *, recorded=(), done=False, step_time=0.3, device="H100", **changes):
    """A job's folder, with a record at each of those steps."""
    made = Job.in_sweep({**ARGS, **changes, "hparams_seed": number, "trial_seed": 0}, folder)
    made.output_dir.mkdir()
    for step in recorded:
        record = {
            "step": step,
            "step_time": 99.0 if step == 0 else step_time,  # the first steps warm up
            "args": made.args.record_args(),
            "hparams": {"batch_size": 8},
            "provenance": {"device": device},
        }
        with open(made.output_dir / "results.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
    if done:
        mark_done(made.output_dir)
    return made


def test_the_pace_is_that_of_finished_jobs_on_one_device(tmp_path):
    jobs = [
        job(tmp_path, 0, recorded=(0, 100), done=True, step_time=0.3),
        job(tmp_path, 1, recorded=(0, 100), done=True, step_time=0.9),
        job(tmp_path, 2, recorded=(0, 100), done=True, step_time=0.6),
        job(tmp_path, 3, recorded=(0, 100), done=True, step_time=7.0, device="cpu"),
        job(tmp_path, 4, recorded=(0, 100), step_time=50.0),  # not done
        job(tmp_path, 5, recorded=(0,), done=True),  # warm-up alone
    ]
    # the median of three; two training domains with 8 images each make 16 images a step
    expected = Pace("H100", 3, 0.6, pytest.approx(0.6 / 16 / 3))
    done = [item.output_dir for item in jobs if item.state is JobState.DONE]
    assert len(done) == 5
    assert measured_pace(done, device=None) == expected
    assert measured_pace(done, device="H100") == expected
    assert measured_pace(done, device="cpu").step == 7.0
    assert measured_pace(done, device="A100") is None
    assert measured_pace(done[4:], device=None) is None


@pytest.mark.parametrize(
    ("recorded", "changes", "expected"),
    [
        # 301 steps of 1 s, 4 evaluations of 48 images of 0.5 s
        ((), {}, 301 + 4 * 24),
        # begun: after step 100 there are 200 steps left, with records at 200 and 300
        ((0, 100), {}, 200 + 2 * 24),
        # 250 steps: records at 0, 100, 200 and at the last, 249
        ((), {"steps": 250}, 250 + 4 * 24),
        # all records but the last are there
        ((0, 100, 200), {"steps": 202}, 1 + 24),
    ],
)
def test_what_a_job_still_takes(tmp_path, recorded, changes, expected):
    begun = job(tmp_path, 0, recorded=recorded, **changes)
    assert seconds_left(begun, Pace("x", 1, 1.0, 0.5), num_images=48) == pytest.approx(expected)


FLAGS = (
    "--dry-run --datasets Debug28 --n_hparams 2 --n_trials 1 --single_test_envs --device cpu "
    "--skip_confirmation --jobs 2"
).split()


def test_a_dry_run_tells_what_can_be_told_and_runs_nothing(tmp_path, capsys):
    flags = [*FLAGS, "--algorithms", "LTDR", "ERM_ViT", "--output_dir", str(tmp_path)]
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert "Dry run: 12 jobs would be run, and nothing is." in said
    assert "Debug28, LTDR: 6 jobs, nothing to estimate from: none is done yet on cpu" in said
    assert "How long that takes shows once the first jobs are done." in said
    assert list(tmp_path.iterdir()) == []

    first = make_jobs(build_parser().parse_args(flags))[0]
    assert first.args.algorithm == "LTDR"
    changes = {name: value for name, value in first.train_args.items() if name not in ARGS}
    del changes["hparams_seed"], changes["trial_seed"]
    made = job(tmp_path, 0, recorded=(0, 100), done=True, device="cpu", **changes)
    assert made.output_dir == first.output_dir
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert "Dry run: 11 jobs would be run" in said
    # 301 steps of 0.3 s, 4 evaluations of 48 images at 0.3 / 16 / 3 s: 91.5 s, five times 457.5 s
    assert "Debug28, LTDR: 5 jobs, about 2 min each on cpu (from 1 that are done)" in said
    assert "Debug28, ERM_ViT: 6 jobs, nothing to estimate from" in said
    together = "Together about 8 min of computing, 4 min with 2 at once, and 6 jobs more of which"
    assert together in said


def test_jobs_of_another_length_tell_the_pace_too(tmp_path, capsys):
    changes = {"steps": 41, "data_dir": "data"}
    job(tmp_path, 0, recorded=(0, 20, 40), done=True, device="cpu", **changes)
    flags = [*FLAGS, "--algorithms", "LTDR", "--output_dir", str(tmp_path)]
    assert main(flags) == 0
    said = capsys.readouterr().out
    # as above, now six times 91.5 s
    line = "Debug28, LTDR: 6 jobs, about 2 min each on cpu (from 1 that are done, of other flags)"
    assert line in said
    assert "Together about 9 min of computing" in said


def test_a_dry_run_deletes_nothing(tmp_path, capsys):
    flags = [*FLAGS, "--algorithms", "LTDR", "--output_dir", str(tmp_path)]
    folder = make_jobs(build_parser().parse_args(flags))[0].output_dir
    folder.mkdir()
    (folder / "lock").touch()  # that its process has left
    assert main(["delete_incomplete", *flags]) == 0
    assert f"1 job folders would be deleted, and none is.\n{folder}\n" in capsys.readouterr().out
    assert Job({}, folder).state is JobState.INCOMPLETE
