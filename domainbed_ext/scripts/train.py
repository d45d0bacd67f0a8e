"""Trains one algorithm on one data set: `python -m domainbed_ext.scripts.train`, `ltdr train`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from domainbed_ext.atomic_files import CannotWriteError
from domainbed_ext.datasets import DATASETS, DEFAULT_DATA_DIR
from domainbed_ext.datasets.image_cache_flags import add_flags
from domainbed_ext.display import run_progress, tee_output
from domainbed_ext.distributed import (
    asked_rank,
    errors_only,
    joined_ranks,
)
from domainbed_ext.errors import UsageError
from domainbed_ext.exit_status import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, EXIT_USAGE
from domainbed_ext.hparams import (
    VIT_ALGORITHMS,
)
from domainbed_ext.stop_signals import (
    Stopped,
    stops_on_signals,
)
from domainbed_ext.tracking import add_tracker_flags
from domainbed_ext.train_args import (
    EVAL_SPLITS,
    HPARAMS_PER_TRIAL,
    TASKS,
    TrainArgs,
    job_label,
)
from domainbed_ext.train_checks import check_args
from domainbed_ext.training_job import disk_line, run_job

if TYPE_CHECKING:
    pass

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
        "--steps", type=int, help="number of steps (default: the data set's, 5001 for most)"
    )
    parser.add_argument(
        "--checkpoint_freq",
        type=int,
        help="evaluate every N steps (default: the data set's, 100 to 1000)",
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
        print(f"error: {disk_line(error)}", file=sys.stderr)
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
