"""Whether what a sweep's jobs need is there, data above all.

Commands that only look after jobs do without: a login node may have no data.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from domainbed_ext.datasets import DATASETS, FoundDataset, get_dataset_class
from domainbed_ext.errors import UsageError
from domainbed_ext.jobs import Job
from domainbed_ext.other_jobs import recorded_num_domains
from domainbed_ext.sweep_flags import LAUNCHING
from domainbed_ext.train_checks import check_args


def default_datasets(found: Iterable[FoundDataset]) -> list[str]:
    """What is trained on unless something is named."""
    return [item.name for item in found if "Debug" not in item.name and item.num_images > 0]


def num_domains_of_absent(args: argparse.Namespace) -> dict[str, int]:
    """What records say of folders of images that are not on this machine; nothing if jobs are to be
    launched, which need the images.
    """
    try:
        for name in args.datasets:
            get_dataset_class(name)
    except UsageError:
        if args.command not in LAUNCHING:
            return recorded_num_domains(Path(args.output_dir))
    return {}


def check_jobs(jobs: Sequence[Job], args: argparse.Namespace) -> None:
    """Refuses jobs that could not run; warns where none is to be launched."""
    problems = []
    for job in {(job.args.algorithm, job.args.dataset): job for job in jobs}.values():
        try:
            check_args(job.args)
        except UsageError as error:
            problems.append(error)
    _refuse_or_warn(problems, args)


def print_data(
    args: argparse.Namespace, found: Sequence[FoundDataset], *, name_absent: bool
) -> None:
    """Where the data sets are, and what is wrong with them.

    Args:
        args: The flags of the sweep.
        found: What is there.
        name_absent: Whether to name data sets that are not there and were not asked for.
    """
    by_name = {item.name: item for item in found}
    for name in dict.fromkeys(args.datasets):
        item = by_name.get(name)
        if item is None:
            continue
        where = "embedded" if item.path is None else str(item.path)
        problem = f"; {item.problem}" if item.problem else ""
        print(f"{name}: {item.num_images} images, {where}{problem}")
    absent = [name for name in DATASETS if name not in by_name]
    missing = [name for name in args.datasets if name in absent]
    if missing:
        problem = (
            f"{', '.join(missing)} not found in the data folder {args.data_dir}; get it with "
            f"`ltdr download {missing[0]} --data_dir {args.data_dir}`, or name its "
            "folder with --data_dir"
        )
        _refuse_or_warn([UsageError(problem)], args)
    if absent and name_absent:
        print(
            f"not found in {args.data_dir}, so not used: {', '.join(absent)} (see `ltdr download "
            "--help`)"
        )


def _refuse_or_warn(problems: Sequence[UsageError], args: argparse.Namespace) -> None:
    if problems and args.command in LAUNCHING:
        raise problems[0]
    for message in dict.fromkeys(map(str, problems)):
        print(f"warning: {message}", file=sys.stderr)
