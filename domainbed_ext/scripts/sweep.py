"""Runs a sweep of training jobs: `python -m domainbed_ext.scripts.sweep`, or `ltdr sweep`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from domainbed_ext.datasets import find_datasets
from domainbed_ext.errors import UsageError
from domainbed_ext.exit_status import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_STOPPED,
    EXIT_USAGE,
)
from domainbed_ext.hparams import VIT_ALGORITHMS
from domainbed_ext.job_files import has_checkpoint
from domainbed_ext.job_locks import JobBusyError
from domainbed_ext.jobs import Job, JobState, delete_job, looks_alive
from domainbed_ext.launchers import REGISTRY, Launcher
from domainbed_ext.launching import chosen_jobs, clear_failure, commands_of, launch_in_rounds
from domainbed_ext.other_jobs import finished_by_kind, other_jobs, other_jobs_lines
from domainbed_ext.plan import make_jobs, pruning_words
from domainbed_ext.stop_signals import Stopped, stops_on_signals
from domainbed_ext.sweep_data import (
    check_jobs,
    default_datasets,
    num_domains_of_absent,
    print_data,
)
from domainbed_ext.sweep_flags import LAUNCHING, build_parser
from domainbed_ext.sweep_report import (
    count_words,
    print_alive,
    print_estimate,
    print_failed,
    print_jobs,
    print_reasons,
    print_running,
)
from domainbed_ext.torchrun import check_algorithms


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """The command line. Returns the exit status."""
    args = build_parser(prog).parse_args(argv)
    try:
        with stops_on_signals():
            return sweep(args)
    except Stopped:
        print("\nstopped; the same command goes on with what is not done", file=sys.stderr)
        return EXIT_STOPPED
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on with what is not done", file=sys.stderr)
        return EXIT_INTERRUPTED


def sweep(args: argparse.Namespace) -> int:
    """Does what the parsed command line says. Returns the exit status."""
    if args.command_launcher not in REGISTRY:
        raise UsageError(
            f"--command_launcher {args.command_launcher} is unknown; choose among "
            f"{', '.join(REGISTRY)}"
        )
    launcher = REGISTRY[args.command_launcher].from_args(args)
    if args.command in LAUNCHING:
        launcher.check()
    if args.even_if_alive and args.command != "delete_incomplete":
        raise UsageError(f"--even_if_alive goes with delete_incomplete, not with {args.command}")
    if args.diverged and args.command != "retry_failed":
        raise UsageError(f"--diverged goes with retry_failed, not with {args.command}")
    check_algorithms(args.algorithms, ranks=args.gpus_per_job, trainable=VIT_ALGORITHMS)
    found = find_datasets(args.data_dir)
    choose_all = not args.datasets
    args.datasets = args.datasets or default_datasets(found)
    jobs = make_jobs(args, num_domains=num_domains_of_absent(args))
    check_jobs(jobs, args)
    states = {job.output_dir: job.state for job in jobs}
    print_data(args, found, name_absent=choose_all)
    print_jobs(jobs, states)
    for line in pruning_words(args, len(jobs)):
        print(line)
    launches = args.command in LAUNCHING and not args.dry_run
    others = {} if launches else other_jobs(Path(args.output_dir), jobs)
    for line in other_jobs_lines(Path(args.output_dir), states, others):
        print(line)
    if args.command == "status":
        print_running(jobs, states)
        print_alive(_alive(states), what="launching would run these a second time:")
        print_failed(jobs, states)
        return EXIT_OK
    if args.command == "delete_incomplete":
        return _delete_incomplete(jobs, states, args)
    if args.dry_run:
        print_estimate(
            chosen_jobs(args.command, jobs, states, diverged=args.diverged),
            jobs,
            states,
            others=finished_by_kind(others),
            num_images={item.name: item.num_images for item in found},
            device=_device_here(args) if launcher.runs_here else None,
            at_once=launcher.num_at_once([job.args for job in jobs]),
        )
        return EXIT_OK
    return _launch(jobs, states, launcher, args)


def _launch(
    jobs: Sequence[Job],
    states: dict[Path, JobState],
    launcher: Launcher,
    args: argparse.Namespace,
) -> int:
    chosen = chosen_jobs(args.command, jobs, states, diverged=args.diverged)
    elsewhere = {folder for folder, state in states.items() if state is JobState.RUNNING}
    if args.command == "retry_failed":
        elsewhere = set()
    if chosen:
        chosen_folders = {job.output_dir for job in chosen}
        alive = [folder for folder in _alive(states) if folder in chosen_folders]
        print_alive(alive, what="if somebody is, do not go on:")
        going_on = sum(
            states[job.output_dir] is not JobState.DIVERGED and has_checkpoint(job.output_dir)
            for job in chosen
        )
        remark = f", {going_on} of them from their last checkpoint" if going_on else ""
        _confirm(f"About to run {len(chosen)} jobs in {args.output_dir}{remark}.", args)
        if not launcher.only_shows:
            chosen = [job for job in chosen if clear_failure(job, states[job.output_dir])]
    elif not elsewhere or launcher.hands_over:
        print("Nothing to launch.")
    if launcher.hands_over:
        if chosen:
            launcher.launch(commands_of(chosen, gpus_per_job=args.gpus_per_job))
        return EXIT_OK
    launched = launch_in_rounds(chosen, jobs, elsewhere, launcher, wait=args.wait)
    return _report(jobs, launched, args)


def _device_here(args: argparse.Namespace) -> str:
    from domainbed_ext.provenance import device_name
    from domainbed_ext.runs import choose_device

    return device_name(choose_device(args.device))


def _report(jobs: Sequence[Job], launched: Sequence[Job], args: argparse.Namespace) -> int:
    """What became of the jobs."""
    states = {job.output_dir: job.state for job in jobs}
    print(f"{len(jobs)} jobs: {count_words(states)}.")
    print_failed(jobs, states)
    # those that were run have ended, and on a full disk one cannot even say how
    unfinished = [job for job in launched if states[job.output_dir] is JobState.INCOMPLETE]
    print_reasons("not finished", unfinished)
    if JobState.DONE in states.values():
        print(f"Results: ltdr collect --input_dir {args.output_dir}")
    bad = {JobState.FAILED, JobState.DIVERGED} & {*states.values()}
    return EXIT_FAILED if bad or unfinished else EXIT_OK


def _delete_incomplete(
    jobs: Sequence[Job], states: dict[Path, JobState], args: argparse.Namespace
) -> int:
    kept = (JobState.NOT_LAUNCHED, JobState.DONE, JobState.RUNNING)
    folders = [job.output_dir for job in jobs if states[job.output_dir] not in kept]
    if not args.even_if_alive:
        alive = _alive(states)
        print_alive(alive, what="they are kept; wait, or pass --even_if_alive to delete them:")
        folders = [folder for folder in folders if folder not in alive]
    if not folders:
        print("Nothing to delete.")
        return EXIT_OK
    if args.dry_run:
        print(f"Dry run: {len(folders)} job folders would be deleted, and none is.")
        print(*folders, sep="\n")
        return EXIT_OK
    _confirm(
        f"About to delete {len(folders)} job folders in {args.output_dir}, checkpoints included.",
        args,
    )
    deleted = 0
    for folder in folders:
        try:
            delete_job(folder)
            deleted += 1
        except JobBusyError:
            print(f"kept, as a process has begun to work on it: {folder}", file=sys.stderr)
    print(f"Deleted {deleted} job folders.")
    return EXIT_OK


def _alive(states: dict[Path, JobState]) -> list[Path]:
    """Incomplete jobs that a program without a lock may be at work on."""
    return [
        folder
        for folder, state in states.items()
        if state is JobState.INCOMPLETE and looks_alive(folder)
    ]


def _confirm(what: str, args: argparse.Namespace) -> None:
    print(what, flush=True)
    deletes = args.command == "delete_incomplete"
    if args.skip_confirmation or (REGISTRY[args.command_launcher].only_shows and not deletes):
        return
    if not sys.stdin.isatty():
        raise UsageError(
            "nobody can be asked here (the input is not a terminal); pass --skip_confirmation"
        )
    if input("Are you sure? (y/n) ").strip().lower()[:1] != "y":
        print("Nothing done.")
        raise SystemExit(EXIT_OK)


if __name__ == "__main__":
    sys.exit(main())
