"""The command line of a sweep: its flags, and what its help teaches."""

from __future__ import annotations

import argparse

from domainbed_ext.datasets import DEFAULT_DATA_DIR
from domainbed_ext.datasets.image_cache_flags import add_flags
from domainbed_ext.hparams import CORE_ALGORITHMS, VIT_ALGORITHMS
from domainbed_ext.jobs import ALIVE_MINUTES
from domainbed_ext.launchers import REGISTRY
from domainbed_ext.plan import add_plan_flags
from domainbed_ext.tracking import add_tracker_flags
from domainbed_ext.train_args import TASKS, TrainArgs, dataset_spelling

LAUNCHING = ("launch", "resume", "retry_failed")

DESCRIPTION = """\
Run every combination of data sets, algorithms, test domains, hyper-parameter draws and trials as
one job each. A job's folder is named by a hash of its arguments, so a sweep can be stopped at any
time: launching it again goes on with unfinished jobs and leaves finished ones alone.
"""
EXAMPLES = """\
commands:
  launch              run what is not done yet, failed jobs included, those that diverged left out
                      (the default)
  status              say what is done, how far running jobs are and why others failed, and stop
  resume              run what was begun and interrupted, and nothing new
  retry_failed        run failed jobs again, from their last checkpoint; with --diverged also those
                      that diverged, from the first step
  delete_incomplete   delete the folders of jobs that are neither done nor running; those that look
                      alive (written to in the last half hour, by a program that takes no lock) are
                      kept unless --even_if_alive is given

Two sweeps on one folder, on one machine or on several that share it, never run a job twice: each
takes what is free, then waits for what the other still runs and takes over what it leaves.

examples:
  default hyper-parameters, one trial, each domain held out once, on data that needs no download:
    ltdr sweep --algorithms ERM_ViT GMOE LTDR --datasets RotatedDigits --n_hparams 1 --n_trials 1 \\
        --single_test_envs

  the full protocol on PACS (20 draws, 3 trials, pairs of test domains too: 600 jobs per algorithm):
    ltdr sweep --algorithms ERM_ViT LTDR --datasets PACS --data_dir data --output_dir sweeps/pacs

  the same for one way to select models (240 jobs per algorithm, at less than half the price each):
    ltdr sweep --algorithms ERM_ViT LTDR --datasets PACS --data_dir data --output_dir sweeps/pacs \\
        --selection training-domain

  how many jobs is that, and how long will it take?
    ltdr sweep --algorithms ERM_ViT LTDR --datasets PACS --data_dir data --output_dir sweeps/pacs \\
        --dry-run

  several jobs on each GPU of this machine, as many as fit:
    ltdr sweep --algorithms ERM_ViT LTDR --datasets PACS --data_dir data --output_dir sweeps/pacs \\
        --command_launcher multi_gpu

  on Slurm, 50 at once (returns after submission; go on with `ltdr sweep status`):
    ltdr sweep --algorithms ERM_ViT LTDR --datasets PACS --data_dir /shared/data \\
        --output_dir /shared/sweeps/pacs --command_launcher slurm --slurm_partition gpu \\
        --slurm_time 4:00:00 --slurm_array_parallelism 50

  on a Ray cluster, two jobs on each GPU:
    ltdr sweep --algorithms ERM_ViT LTDR --datasets PACS --data_dir /shared/data \\
        --output_dir /shared/sweeps/pacs --command_launcher ray --ray_gpus 0.5

  each job on two GPUs at once, experts shared between them:
    ltdr sweep --algorithms LTDR --datasets DomainNet --data_dir data --gpus_per_job 2 \\
        --hparams '{"moe_dispatcher": "auto"}'

  where is it, and why did some fail?
    ltdr sweep status --algorithms ERM_ViT LTDR --datasets PACS --data_dir data \\
        --output_dir sweeps/pacs

  see the commands instead of running them:
    ltdr sweep --algorithms LTDR --datasets RotatedDigits --command_launcher dummy

then: ltdr collect --input_dir sweep_output

docs/clusters.md tells about several machines, preemption, and locks on shared folders.

exit status: 0 all jobs done, handed over or with other processes, 1 a job failed, 2 bad input, 130
interrupted, 143 stopped by SIGTERM, which makes the jobs write a checkpoint and leave
"""


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """DomainBed's flags, with defaults where DomainBed has none, and a few of ours."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "command",
        nargs="?",
        default="launch",
        choices=(*LAUNCHING, "status", "delete_incomplete"),
        help="default: launch",
    )
    parser.add_argument(
        "--datasets",
        nargs="+",
        type=dataset_spelling,
        metavar="DATASET",
        help="default: all that are found, the Debug ones left out",
    )
    parser.add_argument(
        "--algorithms",
        nargs="+",
        default=list(CORE_ALGORITHMS),
        metavar="ALGORITHM",
        help=f"of {', '.join(('ERM', *VIT_ALGORITHMS))} (default: {', '.join(CORE_ALGORITHMS)})",
    )
    parser.add_argument("--task", default=TASKS[0], choices=TASKS)
    parser.add_argument(
        "--n_hparams_from", type=int, default=0, help="first hyper-parameter draw (default: 0)"
    )
    parser.add_argument(
        "--n_hparams",
        type=int,
        default=20,
        help="draws up to, not including, this number; draw 0 is the defaults (20)",
    )
    parser.add_argument("--output_dir", default="sweep_output", help="default: %(default)s")
    parser.add_argument("--data_dir", default=DEFAULT_DATA_DIR, help="default: %(default)s")
    parser.add_argument(
        "--seed", type=int, default=0, help="accepted as by DomainBed, which does not use it either"
    )
    parser.add_argument(
        "--n_trials", type=int, default=3, help="trials: splits and draws differ (default: 3)"
    )
    parser.add_argument(
        "--command_launcher", default="local", help=f"{', '.join(REGISTRY)} (default: local)"
    )
    parser.add_argument("--steps", type=int, help="steps of each job (default: the data set's)")
    parser.add_argument("--hparams", metavar="JSON", help="hyper-parameters to change in every job")
    parser.add_argument("--holdout_fraction", type=float, default=0.2)
    parser.add_argument(
        "--single_test_envs", action="store_true", help="hold out one domain at a time, no pairs"
    )
    parser.add_argument(
        "--test_envs",
        type=int,
        nargs="+",
        metavar="ENV",
        help="only jobs that test on one of these domains",
    )
    parser.add_argument(
        "--ceiling",
        action=argparse.BooleanOptionalAction,
        help="add jobs trained on all domains (default: for EmojiDG and EmojiDG6)",
    )
    parser.add_argument("--skip_confirmation", action="store_true", help="do not ask")
    parser.add_argument(
        "--dry-run",
        "--dry_run",
        action="store_true",
        help="say how many jobs would be run and about how long they would take, and stop",
    )
    parser.add_argument(
        "--diverged",
        action="store_true",
        help="retry_failed: diverged jobs too, which diverge again unless something has changed",
    )
    parser.add_argument(
        "--even_if_alive",
        "--even-if-alive",
        action="store_true",
        help="delete_incomplete: also folders that were written to in the last "
        f"{ALIVE_MINUTES} minutes, perhaps by a program that takes no lock",
    )
    parser.add_argument(
        "--wait",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="after the own jobs wait for those that other processes run, and take over what they "
        "leave (default)",
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="how many at once (default: the launcher decides)"
    )
    parser.add_argument(
        "--gpus_per_job",
        type=int,
        default=1,
        metavar="N",
        help="GPUs that train one job together, through torchrun; N processes with --device cpu "
        "(default: 1)",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--num_workers", type=int, help="processes per loader that decode image files"
    )
    parser.add_argument("--skip_model_save", action="store_true", help="save no models")
    parser.add_argument(
        "--checkpoint_minutes",
        type=float,
        default=TrainArgs.checkpoint_minutes,
        metavar="MINUTES",
        help="write checkpoints that often between evaluations too (default: 10)",
    )
    add_plan_flags(parser)
    add_flags(parser)
    add_tracker_flags(parser)
    for launcher in REGISTRY.values():
        launcher.add_flags(parser)
    return parser
