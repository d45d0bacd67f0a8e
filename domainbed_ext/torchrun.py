"""Jobs that take several processes each: started through torchrun, a few at a time.

A command is `[python, "-m", "torch.distributed.run", ..., "-m", "domainbed_ext.scripts.train",
"--distributed", *flags]`, as `distributed_command` makes it. Rank 0 writes the job's out.txt and
err.txt; what torchrun itself says is added to err.txt when no rank could say why it failed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from domainbed_ext.display import SweepProgress
from domainbed_ext.errors import UsageError
from domainbed_ext.job_process import TORCHRUN_MODULE, JobProcess
from domainbed_ext.jobs import IN_USE, taken_by_others
from domainbed_ext.train_args import TrainArgs, job_label

_POLL_SECONDS = 0.2


def distributed_command(train_command: Sequence[str], ranks: int) -> list[str]:
    """The command that runs `[python, "-m", module, *flags]` on so many processes."""
    python, _, module, *flags = train_command
    torchrun = [python, "-m", TORCHRUN_MODULE, "--standalone", f"--nproc_per_node={ranks}"]
    return [*torchrun, "-m", module, "--distributed", *flags]


def ranks_of(command: Sequence[str]) -> int:
    """How many processes a command starts; 1 for one without torchrun."""
    if TORCHRUN_MODULE not in command[:3]:
        return 1
    prefix = "--nproc_per_node="
    return next(int(word[len(prefix) :]) for word in command if word.startswith(prefix))


def run_commands(
    commands: Sequence[Sequence[str]],
    jobs: Sequence[TrainArgs],
    *,
    num_at_once: int | None,
    num_cores: int,
    devices: Sequence[str],
) -> list[Path]:
    """Runs all commands. Ctrl-C and `Stopped` make them save and leave, to be gone on with.

    Args:
        commands: As `distributed_command` makes them, all with the same number of processes.
        jobs: The job of each.
        num_at_once: How many; by default as many as there are devices for, or one on CPUs.
        num_cores: CPU cores for all of them.
        devices: CUDA devices; none for CPUs.

    Returns:
        The folders of jobs that were left to other processes, which were at work on them.

    Raises:
        UsageError: Fewer devices than one job takes.
    """
    ranks = ranks_of(commands[0])
    slots: list[list[str] | None]
    if devices:
        starts = range(0, len(devices) - ranks + 1, ranks)
        slots = [list(devices[start : start + ranks]) for start in starts]
        if not slots:
            raise UsageError(
                f"--gpus_per_job {ranks}: this machine has {len(devices)} CUDA devices; give "
                f"{len(devices)} or less, or --device cpu"
            )
        slots = slots[: num_at_once or len(slots)]
    else:
        slots = [None] * (num_at_once or 1)
    threads = max(1, num_cores // (ranks * min(len(slots), len(jobs))))

    waiting = deque(zip(commands, jobs, strict=True))
    in_use: list[Path] = []

    def ended(job: TrainArgs, outcome: str) -> None:
        progress.finished(job_label(job), outcome)
        if outcome == IN_USE:
            in_use.append(Path(job.output_dir))

    running: list[tuple[JobProcess, list[str] | None]] = []
    with SweepProgress(len(jobs)) as progress:
        try:
            while waiting or running:
                while waiting and slots:
                    command, job = waiting.popleft()
                    taken = taken_by_others(Path(job.output_dir))
                    if taken is not None:
                        ended(job, taken)
                        continue
                    slot = slots.pop(0)
                    environment = {"OMP_NUM_THREADS": str(threads)}
                    if slot is not None:
                        environment["CUDA_VISIBLE_DEVICES"] = ",".join(slot)
                    running.append((JobProcess(command, job, environment=environment), slot))
                    progress.started(job_label(job))
                for process, slot in [item for item in running if item[0].has_ended()]:
                    running.remove((process, slot))
                    slots.append(slot)
                    ended(process.job, process.outcome())
                time.sleep(_POLL_SECONDS)
        finally:
            for process, _ in running:
                process.ask_to_stop()
            for process, _ in running:
                process.wait()
    return in_use


def check_algorithms(algorithms: Sequence[str], *, ranks: int, trainable: Sequence[str]) -> None:
    """Refuses algorithms that need one process, before anything is started."""
    unfit = [name for name in algorithms if name not in trainable]
    if ranks > 1 and unfit:
        raise UsageError(
            f"--gpus_per_job {ranks}: {', '.join(unfit)} trains on one device only; name the "
            f"others with --algorithms ({', '.join(trainable)})"
        )
