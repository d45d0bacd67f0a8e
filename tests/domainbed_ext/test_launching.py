"""Rounds of launching, beside other launchers that are not really there."""

from __future__ import annotations

import pytest

from domainbed_ext import launching
from domainbed_ext.job_files import mark_done, mark_failed
from domainbed_ext.jobs import Job, JobState
from domainbed_ext.launchers import Launcher
from domainbed_ext.launching import MAX_LAUNCHES, launch_in_rounds, left_behind


class Recorded(Launcher):
    """Notes which jobs it is given; finds some of them in use."""

    def launch(self, commands):
        names = [
            command[command.index("--output_dir") + 1].rpartition("/")[2] for command in commands
        ]
        rounds.append(names)
        return self.play(names)


rounds: list = []


@pytest.fixture
def jobs(tmp_path):
    rounds.clear()
    made = [Job({"hparams_seed": number}, tmp_path / name) for number, name in enumerate("abc")]
    for job in made:
        job.output_dir.mkdir()
    return made


def finish(job):
    mark_done(job.output_dir)


def launcher(play):
    made = Recorded()
    object.__setattr__(made, "play", play)
    return made


@pytest.fixture
def running(monkeypatch):
    """The jobs that other processes hold, and what happens as time goes by."""

    class Others:
        held: set = set()  # noqa: RUF012
        events: list = []  # noqa: RUF012

        def sleep(self, seconds):
            self.events.pop(0)()

    others = Others()
    others.held, others.events = set(), []
    monkeypatch.setattr("domainbed_ext.jobs.is_locked", lambda folder: folder in others.held)
    monkeypatch.setattr(launching.time, "sleep", others.sleep)
    return others


def test_what_another_launcher_leaves_is_taken_over(jobs, running, capsys):
    a, b, c = jobs
    running.held = {b.output_dir, c.output_dir}

    def play(names):
        for job in (a, b):
            if job.output_dir.name in names and job.output_dir not in running.held:
                finish(job)
        return [folder for folder in running.held if folder.name in names]

    def b_is_left():
        running.held.discard(b.output_dir)

    def c_is_done():
        running.held.discard(c.output_dir)
        finish(c)

    running.events = [lambda: None, b_is_left, lambda: None, c_is_done]
    launched = launch_in_rounds([a, b], jobs, {c.output_dir}, launcher(play), wait=True)
    assert rounds == [["a", "b"], ["b"]]  # b was in use at first; c was never ours to run
    assert launched == [a, b]
    assert [job.state for job in jobs] == [JobState.DONE] * 3
    assert "waiting for 2 jobs that other processes run" in capsys.readouterr().err


def test_without_waiting_the_others_are_left_to_themselves(jobs, running):
    a, b, _ = jobs
    running.held = {b.output_dir}
    launch_in_rounds([a], jobs, {b.output_dir}, launcher(lambda names: []), wait=False)
    assert rounds == [["a"]]
    assert b.state is JobState.RUNNING


def test_a_job_that_was_run_and_did_not_end_well_is_not_run_again(jobs, running):
    a, b, _ = jobs

    def play(names):
        mark_failed(a.output_dir, reason="error", message="broken")
        mark_failed(b.output_dir, reason="died", message="killed")
        return []  # c has left no word, on a full disk say

    launch_in_rounds(jobs, jobs, set(), launcher(play), wait=True)
    assert rounds == [["a", "b", "c"]]


def test_a_job_that_kills_its_launchers_is_not_launched_for_ever(jobs, running):
    a = jobs[0]
    launch_in_rounds([a], jobs, set(), launcher(lambda names: [a.output_dir]), wait=True)
    assert rounds == [["a"]] * MAX_LAUNCHES


def test_killed_jobs_count_as_left_behind(jobs, running):
    a, b, c = jobs
    mark_failed(a.output_dir, reason="died", message="killed")
    mark_failed(b.output_dir, reason="error", message="broken")
    finish(c)
    assert left_behind(jobs, wait=True) == [a]
