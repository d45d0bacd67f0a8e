"""Signals that ask for a stop: noted or raised, once, and put back afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from domainbed_ext.stop_signals import (
    Stopped,
    ask_to_stop,
    children_ignore_user_signals,
    leave_stops_to_parent,
    stop_requested,
    stops_deferred,
    stops_on_signals,
)

ROOT = Path(__file__).resolve().parents[2]
STOPS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def test_a_request_is_raised_or_noted():
    with pytest.raises(Stopped), stops_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    with stops_on_signals():
        with stops_deferred():
            for number in STOPS:
                os.kill(os.getpid(), number)
            assert stop_requested()
        # what was noted is not raised later: only an end can follow
        ask_to_stop(os.getpid())
    assert not stop_requested()


def test_handlers_are_put_back_and_what_was_ignored_stays_so():
    before = [signal.getsignal(number) for number in STOPS]
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stops_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop_requested()
            assert signal.getsignal(signal.SIGTERM) != before[0]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before[-1])
    assert [signal.getsignal(number) for number in STOPS] == before


def test_other_threads_get_no_signals():
    seen = []

    def work():
        with stops_on_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


CODE = """
import os, signal
from domainbed_ext import stop_signals
stop_signals.REPEAT_SECONDS = {seconds}
with stop_signals.stops_on_signals(), stop_signals.stops_deferred():
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR2)
    print("alive", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still alive", flush=True)
"""


@pytest.mark.parametrize(
    ("seconds", "status", "said"),
    # The second SIGTERM counts, unless it follows the first so closely that both are one request.
    [(0, 143, "alive\n"), (60, 0, "alive\nstill alive\n")],
)
def test_a_second_sigterm_ends_the_process_at_once(seconds, status, said):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CODE.format(seconds=seconds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, said, "")


def test_helper_processes_leave_signals_to_their_parent():
    child = os.fork()
    if child == 0:
        with stops_on_signals():
            leave_stops_to_parent()
            for number in STOPS:
                os.kill(os.getpid(), number)
            os._exit(7 if not stop_requested() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_child_may_ignore_user_signals_and_no_other():
    code = "import signal; print([signal.getsignal(n).name for n in (15, 10, 12)])"
    with children_ignore_user_signals():
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert out == "['SIG_DFL', 'SIG_IGN', 'SIG_IGN']\n"
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
