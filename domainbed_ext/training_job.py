"""One training run as a job: its folder is taken, and how it ended is written there."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from domainbed_ext.atomic_files import CannotWriteError, remove_unfinished
from domainbed_ext.display import ReportProgress, RunState
from domainbed_ext.distributed import (
    LostRankError,
    OtherRankError,
    current_ranks,
    is_lost_connection,
    on_first_rank,
)
from domainbed_ext.errors import DivergedError, UsageError
from domainbed_ext.exit_status import (
    EXIT_BUSY,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_STOPPED,
    EXIT_USAGE,
)
from domainbed_ext.job_files import (
    DONE_FILE,
    FAILED_FILE,
    make_folder,
    mark_failed,
    read_failure,
    tidy_up,
)
from domainbed_ext.job_locks import JobBusyError, job_lock
from domainbed_ext.job_process import launcher_is_gone
from domainbed_ext.memory import is_out_of_memory
from domainbed_ext.progress_file import ProgressFile
from domainbed_ext.stop_signals import (
    Stopped,
    ask_to_stop,
    stop_requested,
)
from domainbed_ext.train_args import (
    TrainArgs,
)

if TYPE_CHECKING:
    from domainbed_ext.records import Record
from domainbed_ext.train_checks import check_args, check_finished


def train(args: TrainArgs, *, progress: ReportProgress | None = None) -> list[Record]:
    """Runs, or goes on with, one training run; a finished one is left alone.

    Args:
        args: What to run.
        progress: Called with a `RunState` at every step.

    Returns:
        The records, one per evaluation.

    Raises:
        UsageError: Bad input.
        DivergedError: A loss was not finite; the folder is marked as failed.
        Stopped: A signal asked for an end, under `stops_on_signals`.
    """
    from domainbed_ext.records import RECORDS_FILE, read_records

    hparams = check_args(args)
    folder = Path(args.output_dir)
    make_folder(folder)
    ranks = current_ranks()

    def begin() -> list[Record] | None:
        """Takes the job. Returns the records of one that is finished."""
        lock.enter_context(job_lock(folder))
        if (folder / DONE_FILE).exists():
            path = folder / RECORDS_FILE
            records = read_records(path, finished=True) if path.exists() else []
            check_finished(folder, args, hparams, records)
            tidy_up(folder)  # which the process may not have lived to do
            print(f"{folder} holds this very run, finished: nothing to do")
            return records
        remove_unfinished(folder)
        (folder / FAILED_FILE).unlink(missing_ok=True)
        return None

    with contextlib.ExitStack() as lock:
        finished = on_first_rank(begin)
        if finished is not None:
            return finished
        progress_file = ProgressFile(folder) if ranks.is_first else None

        def report(state: RunState) -> None:
            if progress_file is not None:
                progress_file(state)
                if launcher_is_gone():  # nobody waits for the rest now
                    ask_to_stop(os.getpid())
            if progress is not None:
                progress(state)

        try:
            from domainbed_ext.runs import prepare_run
            from domainbed_ext.training import execute

            return execute(prepare_run(args, hparams, progress=report), progress=report)
        except Stopped:
            if progress_file is not None:
                progress_file.stopped()
            raise
        except DivergedError as error:
            if ranks.is_first:  # all ranks know
                mark_failed(folder, reason="diverged", message=str(error), step=error.step)
            raise
        except OtherRankError:
            raise
        except Exception as error:
            if stop_requested():  # helper processes and other ranks may have left already
                if progress_file is not None:
                    progress_file.stopped()
                raise Stopped from error
            expected = isinstance(error, CannotWriteError)
            message = str(error) if expected else f"{type(error).__name__}: {error}"
            if ranks.size > 1:
                first = read_failure(folder)
                if first is not None:  # this rank only lost its connection to the one that failed
                    raise OtherRankError(str(first["message"])) from error
                if is_lost_connection(error):
                    lost = LostRankError(ranks.rank)
                    mark_failed(folder, reason="died", message=str(lost))
                    raise lost from error
                message = f"rank {ranks.rank}: {message}"
            with contextlib.suppress(OSError):  # of a full disk, say, which is what failed then
                reason = "memory" if is_out_of_memory(error) else "error"
                mark_failed(folder, reason=reason, message=message)
            raise


def run_job(args: TrainArgs, *, progress: ReportProgress | None = None) -> int:
    """`train` as a command: prints errors as people want them, and returns the exit status."""
    try:
        train(args, progress=progress)
    except OtherRankError as error:
        # the rank that failed has printed it; the last line of err.txt should say it too
        if current_ranks().is_first or isinstance(error, LostRankError):
            print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except JobBusyError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BUSY
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except DivergedError as error:
        if current_ranks().is_first:
            print(f"error: diverged: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED
    except CannotWriteError as error:
        print(f"error: {disk_line(error)}", file=sys.stderr)
        return EXIT_FAILED
    except Stopped as stop:
        if current_ranks().is_first:
            print(_stop_line(stop), file=sys.stderr)
        return EXIT_STOPPED
    except Exception:
        traceback.print_exc()
        return EXIT_FAILED
    return EXIT_OK


def disk_line(error: CannotWriteError) -> str:
    """What a command prints of a disk that is full, or gone."""
    return f"{error}; when that is mended, the same command goes on from the last checkpoint"


def _stop_line(stop: Stopped) -> str:
    if stop.step is not None:
        return f"stopped after step {stop.step}; the same command goes on from there"
    reason = "" if stop.__cause__ is None else f" ({stop.__cause__})"
    return f"stopped{reason}; the same command goes on from the last checkpoint, if there is one"
