"""The file that tells how far a run is."""

from __future__ import annotations

import os
import socket

import pytest

from domainbed_ext import progress_file
from domainbed_ext.display import CACHING, PREPARING, RunState
from domainbed_ext.progress_file import ProgressFile, read_progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test decides on."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(progress_file.time, "time", lambda: Clock.now)
    return Clock


def test_it_tells_who_works_and_how_far(tmp_path, clock):
    report = ProgressFile(tmp_path)
    first = read_progress(tmp_path)
    assert (first.host, first.pid) == (socket.gethostname(), os.getpid())
    assert (first.phase, first.started, first.seconds_left) == ("starting", 1000, None)

    clock.now = 1005
    report(RunState(40, 80, phase=CACHING))  # images, which say nothing about steps
    assert (read_progress(tmp_path).step, read_progress(tmp_path).seconds_left) == (40, None)
    clock.now = 1007
    report(RunState(60, 80, phase=PREPARING))
    assert (read_progress(tmp_path).phase, read_progress(tmp_path).seconds_left) == (
        "preparing",
        None,
    )
    clock.now = 1010
    report(RunState(11, 31, 0.5))  # a resumed run: the first step that this process takes
    assert (read_progress(tmp_path).phase, read_progress(tmp_path).seconds_left) == (
        "training",
        None,
    )
    clock.now = 1019
    report(RunState(12, 31, 0.5))
    assert read_progress(tmp_path).step == 11  # too early to write again
    clock.now = 1020
    report(RunState(16, 31, 0.5))
    # 5 steps took 10 seconds; 15 are left
    assert (read_progress(tmp_path).step, read_progress(tmp_path).seconds_left) == (16, 30)
    report(RunState(16, 31, 0.5, phase="evaluating"))
    assert read_progress(tmp_path).phase == "evaluating"
    report.stopped()
    stopped = read_progress(tmp_path)
    assert (stopped.phase, stopped.step, stopped.started) == ("stopped", 16, 1000)


def test_what_cannot_be_written_or_read_is_no_error(tmp_path):
    report = ProgressFile(tmp_path / "gone")
    report(RunState(1, 2))
    assert read_progress(tmp_path / "gone") is None
    for text in ("", "{}", "[1]", '{"unknown": 1}'):
        (tmp_path / "progress.json").write_text(text)
        assert read_progress(tmp_path) is None
