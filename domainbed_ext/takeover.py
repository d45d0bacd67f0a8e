"""Several launchers on one folder: each takes what is free, and what another left behind."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from domainbed_ext.jobs import Job, JobState

MAX_LAUNCHES = 3  # of one job by one launcher: it may be the job that kills its process
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 10.0


def left_behind(jobs: Sequence[Job], *, wait: bool) -> list[Job]:
    """Those of the jobs that were begun and that nobody works on any more.

    Args:
        jobs: What to look at.
        wait: Look until some are left behind, or none is worked on.
    """
    pause = _FIRST_WAIT
    told = False
    while True:
        left = [job for job in jobs if job.is_interrupted]
        running = sum(job.state is JobState.RUNNING for job in jobs)
        if left or not running or not wait:
            return left
        if not told:
            print(
                f"waiting for {running} jobs that other processes run, to take over what they "
                "leave; Ctrl-C ends the waiting, --no-wait does without",
                file=sys.stderr,
                flush=True,
            )
            told = True
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_WAIT)
