"""What runs show, on a terminal and elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

from domainbed_ext import display
from domainbed_ext.display import (
    RunState,
    SweepProgress,
    format_row,
    format_seconds,
    run_progress,
    tee_output,
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_rows_look_like_domainbeds():
    # print_row of DomainBed b93c22a with colwidth=12, its trailing blank left out.
    assert format_row(["env0_out_class", 0.5, 3]) == "env0_out_cla  0.5000000000  3           "


def test_output_is_repeated_in_the_folder(tmp_path, capsys):
    for word in ("first", "second"):
        with tee_output(tmp_path / "job"):
            print(word)
            print("oops", file=sys.stderr)
    assert (tmp_path / "job" / "out.txt").read_text() == "first\nsecond\n"
    assert (tmp_path / "job" / "err.txt").read_text() == "oops\noops\n"
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("first\nsecond\n", "oops\noops\n")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (89, "89 s"), (91, "2 min"), (3600, "60 min"), (12000, "3 h 20 min")],
)
def test_durations(seconds, words):
    assert format_seconds(seconds) == words


def test_plain_lines_are_few(monkeypatch, capsys):
    clock = iter([0.0, 0.0, 5.0, 20.0, 21.0])
    monkeypatch.setattr(display.time, "monotonic", lambda: next(clock))
    with run_progress("LTDR") as report:
        for step in (0, 50, 100, 105):
            report(RunState(step, 300, loss=0.5))
    # 100 steps in 20 seconds leave 40 for the other 200.
    assert capsys.readouterr().err == "step 100 of 300, loss 0.5000, 40 s left\n"


def test_images_before_the_first_step_are_counted_by_themselves(monkeypatch, capsys):
    clock = iter([0.0, 0.0, 20.0, 30.0, 60.0, 61.0, 81.0])
    monkeypatch.setattr(display.time, "monotonic", lambda: next(clock))
    with run_progress("CLUSTER") as report:
        for step in (0, 100):
            report(RunState(step, 400, phase="decoding"))
        for step in (0, 100):
            report(RunState(step, 200, phase="preparing"))
        for step in (1, 11):
            report(RunState(step, 21, loss=0.5))
    assert capsys.readouterr().err.splitlines() == [
        "image 100 of 400, decoding, 60 s left",  # 100 took 20 seconds
        "image 0 of 200, preparing",
        "image 100 of 200, preparing, 30 s left",  # 100 took 30 seconds
        "step 11 of 21, loss 0.5000, 20 s left",  # 10 took 20 seconds
    ]
    monkeypatch.undo()
    stream = io.StringIO()
    with SweepProgress(2, stream=stream) as progress:
        progress.started("a")
        progress.report("a", RunState(100, 200, phase="preparing"))
        progress.put_back("a", "out of memory")
    assert stream.getvalue() == "[0 of 2 jobs] out of memory: a\n"  # no step, no time left


def test_sweep_lines_without_a_terminal():
    stream = io.StringIO()
    with SweepProgress(2, stream=stream) as progress:
        progress.started("a")
        progress.report("a", RunState(1, 2, loss=0.1))
        progress.finished("a", "done")
        progress.started("b")
        progress.finished("b", "failed")
    first, second = stream.getvalue().splitlines()
    assert first.startswith("[1 of 2 jobs, ")
    assert first.endswith("] done: a")
    assert second == "[2 of 2 jobs] failed: b"


def test_bars_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with SweepProgress(2, stream=stream) as progress:
        progress.started("LTDR on Debug28")
        progress.report("LTDR on Debug28", RunState(1, 2, loss=0.25, phase="evaluating"))
        progress.finished("LTDR on Debug28", "failed")
    shown = stream.getvalue()
    assert "LTDR on Debug28: failed" in shown
    assert "1 of 2 jobs" in shown

    monkeypatch.setattr(sys, "stderr", Terminal())
    with run_progress("LTDR on Debug28") as report:
        report(RunState(1, 2, loss=0.25))
        report(RunState(2, 2, phase="saving"))
    assert "LTDR on Debug28" in sys.stderr.getvalue()
