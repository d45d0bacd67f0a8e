"""Trains one algorithm on one data set: `python -m domainbed_ext.scripts.train`, `ltdr train`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from domainbed_ext.atomic_files import CannotWriteError, remove_unfinished
from domainbed_ext.datasets import DATASETS, DEFAULT_DATA_DIR, environment_names, get_dataset_class
from domainbed_ext.datasets.image_cache_flags import add_flags, image_cache_options
from domainbed_ext.display import ReportProgress, RunState, run_progress, tee_output
from domainbed_ext.distributed import (
    LostRankError,
    OtherRankError,
    asked_rank,
    current_ranks,
    errors_only,
    is_lost_connection,
    joined_ranks,
    on_first_rank,
)
from domainbed_ext.errors import UsageError
from domainbed_ext.hparam_values import check_together
from domainbed_ext.hparams import (
    VIT_ALGORITHMS,
    default_hparams,
    parse_hparams,
    random_hparams,
    with_overrides,
)
from domainbed_ext.job_process import launcher_is_gone
from domainbed_ext.jobs import (
    DONE_FILE,
    EVAL_SPLITS,
    FAILED_FILE,
    HPARAMS_PER_TRIAL,
    TASKS,
    DivergedError,
    JobBusyError,
    TrainArgs,
    check_same_run,
    job_label,
    job_lock,
    make_folder,
    mark_failed,
    read_failure,
    run_identity,
    tidy_up,
)
from domainbed_ext.memory import is_out_of_memory
from domainbed_ext.progress_file import ProgressFile
from domainbed_ext.seeds import seed_hash
from domainbed_ext.stop_signals import (
    EXIT_STOPPED,
    Stopped,
    ask_to_stop,
    stop_requested,
    stops_on_signals,
)
from domainbed_ext.tracking import add_tracker_flags, check_tracker_flags

if TYPE_CHECKING:
    from domainbed_ext.records import Record

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_BUSY, EXIT_INTERRUPTED = 0, 1, 2, 3, 130

DESCRIPTION = """\
Train one algorithm on all domains of a data set but the test domains, evaluating every split of
every domain as it goes. The folder --output_dir gets results.jsonl (the records), out.txt, err.txt,
the model and, last, `done`. Running the same command again goes on where it stopped; a finished run
is left alone.
"""
EXAMPLES = """\
examples:
  a first run, on data that needs no download (a minute or two on a laptop):
    ltdr train --algorithm LTDR --dataset RotatedDigits --test_envs 0 --steps 200 --output_dir
    runs/first

  the paper's 4Top2 on PACS, tested on domain 3 (sketch):
    ltdr train --algorithm LTDR --dataset PACS --data_dir data --test_envs 3 --hparams
    '{"moe_num_experts": 4}'

  your own images, as domain/class/image.png:
    ltdr train --algorithm LTDR --dataset folder:/path/to/images --test_envs 0

  one run on four GPUs of this machine (ViT algorithms; moe_dispatcher shares the experts too):
    torchrun --standalone --nproc_per_node 4 -m domainbed_ext.scripts.train --distributed
    --algorithm LTDR --dataset PACS --data_dir data --hparams '{"moe_dispatcher": "auto"}'

  all domains trained, none held out (the ceiling of EmojiDG's table):
    ltdr train --algorithm LTDR --dataset EmojiDG --data_dir data --test_envs

On SIGTERM, SIGUSR1 or SIGUSR2 a run finishes its step, writes a checkpoint and leaves; a second
SIGTERM ends it at once. See docs/clusters.md.

exit status: 0 done, 1 failed, 2 bad input, 3 in use by another process, 130 interrupted, 143
stopped by a signal
"""


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """DomainBed's flags with DomainBed's defaults, and a few of ours."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = TrainArgs()
    parser.add_argument(
        "--data_dir",
        default=DEFAULT_DATA_DIR,
        help="where the data sets are (default: %(default)s)",
    )
    parser.add_argument(
        "--dataset",
        default=default.dataset,
        help=f"{', '.join(DATASETS)}, folder:PATH or manifest:FILE (default: %(default)s)",
    )
    parser.add_argument(
        "--algorithm",
        default=default.algorithm,
        help=f"ERM (ResNet-50), {', '.join(VIT_ALGORITHMS)} (default: %(default)s)",
    )
    parser.add_argument("--task", default=default.task, choices=TASKS)
    parser.add_argument(
        "--hparams", metavar="JSON", help="""hyper-parameters to change: '{"lr": 1e-4}'"""
    )
    parser.add_argument(
        "--hparams_seed",
        type=int,
        default=0,
        help="0 for default hyper-parameters, else which random draw",
    )
    parser.add_argument(
        "--trial_seed",
        type=int,
        default=0,
        help="trial number: seeds the splits and the draw of hyper-parameters",
    )
    parser.add_argument(
        "--hparams_per_trial",
        default=default.hparams_per_trial,
        choices=HPARAMS_PER_TRIAL,
        help="drawn: the same --hparams_seed is another draw in another trial, as in DomainBed; "
        "shared: it is that of trial 0 in all trials (default: drawn)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seeds everything else")
    parser.add_argument(
        "--steps", type=int, help="number of steps (default: 2, or 1 where cores are few)"
    )
    parser.add_argument(
        "--checkpoint_freq",
        type=int,
        help="evaluate every N steps (default: 2, or 1 where cores are few)",
    )
    parser.add_argument(
        "--test_envs",
        type=int,
        nargs="*",
        default=[0],
        metavar="ENV",
        help="numbers of the domains to test on; without a number, all are trained on (default: 0)",
    )
    parser.add_argument("--output_dir", default=default.output_dir, help="default: %(default)s")
    parser.add_argument(
        "--holdout_fraction",
        type=float,
        default=default.holdout_fraction,
        help="part of each domain that is validated on (default: %(default)s)",
    )
    parser.add_argument(
        "--uda_holdout_fraction",
        type=float,
        default=default.uda_holdout_fraction,
        help="part of the test domains used without labels in domain adaptation (default: "
        "%(default)s)",
    )
    parser.add_argument("--skip_model_save", action="store_true", help="save no model at the end")
    parser.add_argument(
        "--save_model_every_checkpoint", action="store_true", help="and one at each evaluation"
    )
    parser.add_argument("--device", default=default.device, choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--num_workers",
        type=int,
        help="processes per loader that decode image files (default: 2, or 1 where cores are few)",
    )
    parser.add_argument(
        "--checkpoint_minutes",
        type=float,
        default=default.checkpoint_minutes,
        metavar="MINUTES",
        help="write a checkpoint that often between evaluations too, which changes no number; inf: "
        "at evaluations only (default: 10)",
    )
    parser.add_argument(
        "--eval_splits",
        default=default.eval_splits,
        choices=EVAL_SPLITS,
        help="what to evaluate: all splits of all domains as DomainBed does, or only those that "
        "selection methods read, which leaves out the images that were trained on (default: all)",
    )
    add_flags(parser)
    add_tracker_flags(parser)
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes that train together; torchrun starts them",
    )
    return parser


def parse_args(argv: Sequence[str] | None = None, *, prog: str | None = None) -> TrainArgs:
    """The arguments of a command line."""
    return TrainArgs(**vars(build_parser(prog).parse_args(argv)))


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
            _check_finished(folder, args, hparams, records)
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


def run_hparams(args: TrainArgs) -> dict[str, Any]:
    """The hyper-parameters of a run: the defaults or a draw, then what --hparams changes."""
    text = None if args.hparams is None else str(args.hparams)
    overrides = parse_hparams(text, args.algorithm, args.dataset)
    if args.hparams_seed == 0:
        hparams = default_hparams(args.algorithm, args.dataset)
    else:
        seed = seed_hash(args.hparams_seed, 0 if args.shares_draw else args.trial_seed)
        hparams = random_hparams(args.algorithm, args.dataset, seed)
    hparams = with_overrides(hparams, overrides, args.algorithm, args.dataset)
    check_together(hparams)
    return hparams


def check_args(args: TrainArgs) -> dict[str, Any]:
    """Refuses impossible arguments, before anything is written. Returns all hyper-parameters."""
    hparams = run_hparams(args)
    image_cache_options(args)
    check_tracker_flags(args)
    get_dataset_class(args.dataset)
    names = environment_names(args.dataset)
    listing = ", ".join(f"{number} {name}" for number, name in enumerate(names))
    for env in args.test_envs:
        if not 0 <= env < len(names):
            raise UsageError(
                f"--test_envs {env} is out of range for {args.dataset}; choose among {listing}"
            )
    if len(set(args.test_envs)) < len(args.test_envs):
        raise UsageError(f"--test_envs names a domain twice: {' '.join(map(str, args.test_envs))}")
    if len(args.test_envs) == len(names):
        raise UsageError(
            f"--test_envs leaves no domain of {args.dataset} to train on; leave one out of "
            f"{listing}"
        )
    if args.task not in TASKS:
        raise UsageError(f"--task {args.task} is unknown; choose one of {', '.join(TASKS)}")
    if args.eval_splits not in EVAL_SPLITS:
        raise UsageError(
            f"--eval_splits {args.eval_splits} is unknown; choose one of {', '.join(EVAL_SPLITS)}"
        )
    if args.hparams_per_trial not in HPARAMS_PER_TRIAL:
        raise UsageError(
            f"--hparams_per_trial {args.hparams_per_trial} is unknown; choose one of "
            f"{', '.join(HPARAMS_PER_TRIAL)}"
        )
    for name, least in (("steps", 1), ("checkpoint_freq", 1), ("num_workers", 0), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UsageError(f"--{name} {value} is too small; choose {least} or more")
    if not args.checkpoint_minutes >= 0:
        raise UsageError(
            f"--checkpoint_minutes {args.checkpoint_minutes} is impossible; choose 0 or more"
        )
    if not 0 < args.holdout_fraction < 1:
        raise UsageError(
            f"--holdout_fraction {args.holdout_fraction} is impossible; choose one between 0 and 1"
        )
    if not 0 <= args.uda_holdout_fraction < 1:
        raise UsageError(
            f"--uda_holdout_fraction {args.uda_holdout_fraction} is impossible; choose one from 0 "
            "to below 1"
        )
    if args.algorithm == "DISTILL" and not (Path(args.output_dir) / DONE_FILE).exists():
        from domainbed_ext.algorithms.distill import check_teacher

        check_teacher(hparams, args.record_args())
    return hparams


def _check_finished(
    folder: Path, args: TrainArgs, hparams: dict[str, Any], records: list[Record]
) -> None:
    if not records:
        raise UsageError(
            f"{folder} is marked as done and holds no record; delete that folder to run the job "
            "again"
        )
    found = run_identity(records[-1]["args"], records[-1].get("hparams") or {})
    wanted = run_identity(args.record_args(), hparams)
    if wanted.get("hparams.schedule_steps") == 0:  # 0 stands for the run's number of steps
        wanted["hparams.schedule_steps"] = found.get("hparams.schedule_steps")
    check_same_run(folder, found=found, wanted=wanted)
    last = (args.steps or get_dataset_class(args.dataset).N_STEPS) - 1
    # SWAD may end a run before, as no further step would count
    if records[-1]["step"] != last and found.get("hparams.weight_averaging") != "swad":
        raise UsageError(
            f"{folder} is marked as done and its records end at step {records[-1]['step']}, not "
            f"{last}; delete that folder to run the job again"
        )


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
        print(f"error: {_disk_line(error)}", file=sys.stderr)
        return EXIT_FAILED
    except Stopped as stop:
        if current_ranks().is_first:
            print(_stop_line(stop), file=sys.stderr)
        return EXIT_STOPPED
    except Exception:
        traceback.print_exc()
        return EXIT_FAILED
    return EXIT_OK


def _disk_line(error: CannotWriteError) -> str:
    return f"{error}; when that is mended, the same command goes on from the last checkpoint"


def _stop_line(stop: Stopped) -> str:
    if stop.step is not None:
        return f"stopped after step {stop.step}; the same command goes on from there"
    reason = "" if stop.__cause__ is None else f" ({stop.__cause__})"
    return f"stopped{reason}; the same command goes on from the last checkpoint, if there is one"


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """The command line. Returns the exit status."""
    args = parse_args(argv, prog=prog)
    try:
        # Before the folder is made: a typing error should leave nothing behind.
        check_args(args)
        with stops_on_signals():
            if args.distributed:
                return _main_of_rank(args)
            with run_progress(job_label(args)) as progress, tee_output(Path(args.output_dir)):
                return run_job(args, progress=progress)
    except Stopped:
        return EXIT_STOPPED
    except CannotWriteError as error:  # before the run had begun
        print(f"error: {_disk_line(error)}", file=sys.stderr)
        return EXIT_FAILED
    except UsageError as error:
        if not args.distributed or asked_rank() == 0:
            print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE


def _main_of_rank(args: TrainArgs) -> int:
    """`main` of one process of several."""
    folder = Path(args.output_dir)
    with joined_ranks(args.device) as ranks:
        if ranks.is_first:
            with run_progress(job_label(args)) as progress, tee_output(folder):
                status = run_job(args, progress=progress)
        else:
            with errors_only(folder):
                status = run_job(args)
        if status != EXIT_OK:
            # at once: leaving in order would wait for ranks that wait for this one
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
