"""What a launcher is: an object that takes the command lines of jobs and sees that they run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from domainbed_ext.errors import UsageError
from domainbed_ext.train_args import TrainArgs

TRAIN_MODULE = "domainbed_ext.scripts.train"


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """A way to run the jobs of a sweep. Its fields are the flags of `sweep` that it goes by.

    A launcher that needs flags of its own declares them in `add_flags` and has fields of the same
    names. What became of a job is told by its folder, not by the launcher.

    Attributes:
        jobs: How many at once; None leaves it to the launcher.
        gpus_per_job: Processes that train one job together.
    """

    hands_over: ClassVar[bool] = False  # `launch` returns before the jobs have ended
    only_shows: ClassVar[bool] = False  # nothing is run, so nobody needs to be asked
    runs_here: ClassVar[bool] = False  # on the devices of this machine

    jobs: int | None = None
    gpus_per_job: int = 1

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        """Declares flags, in a group of their own."""

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Launcher:
        """The launcher that the parsed command line of `sweep` asks for."""
        return cls(**{item.name: getattr(args, item.name) for item in fields(cls)})

    def num_at_once(self, jobs: Sequence[TrainArgs]) -> int | None:
        """How many of the jobs would run side by side; None if that is not known before."""
        return self.jobs

    def check(self) -> None:
        """Refuses settings that cannot be, before anything is run."""
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"--jobs {self.jobs} is too small; choose 1 or more")
        if self.gpus_per_job < 1:
            raise UsageError(f"--gpus_per_job {self.gpus_per_job} is too small; choose 1 or more")

    def launch(self, commands: Sequence[Sequence[str]]) -> list[Path]:
        """Runs the commands, and returns when they have ended or, if `hands_over`, will run.

        Args:
            commands: Argument lists, never shell strings: `[python, "-m", TRAIN_MODULE, *flags]`,
                or the same under torchrun for a job that takes several GPUs
                (`domainbed_ext.torchrun`).

        Returns:
            The folders of jobs that other processes were at work on, and which were left to them.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define launch")


def jobs_of(commands: Sequence[Sequence[str]]) -> list[TrainArgs]:
    """The job that each command runs."""
    from domainbed_ext.scripts.train import parse_args

    return [parse_args(command[list(command).index(TRAIN_MODULE) + 1 :]) for command in commands]
