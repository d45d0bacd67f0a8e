"""Jobs that take several processes each: started through torchrun, a few at a time.

A command is `[python, "-m", "torch.distributed.run", ..., "-m", "domainbed_ext.scripts.train",
"--distributed", *flags]`, as `distributed_command` makes it. Rank 0 writes the job's out.txt and
err.txt; what torchrun itself says is added to err.txt when no rank could say why it failed.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from domainbed_ext.display import SweepProgress
from domainbed_ext.errors import UsageError
from domainbed_ext.jobs import (
    ERR_FILE,
    TrainArgs,
    job_label,
    make_folder,
    mark_failed,
    read_failure,
)

TORCHRUN_MODULE = "torch.distributed.run"
_POLL_SECONDS = 0.2
_SAVE_SECONDS = 120  # that torchrun gives processes it has told to end; its default is 30
_LAST_LINES = 20


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
) -> None:
    """Runs all commands. Ctrl-C and `Stopped` make them save and leave, to be gone on with.

    Args:
        commands: As `distributed_command` makes them, all with the same number of processes.
        jobs: The job of each.
        num_at_once: How many; by default as many as there are devices for, or one on CPUs.
        num_cores: CPU cores for all of them.
        devices: CUDA devices; none for CPUs.

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
    running: list[_Running] = []
    with SweepProgress(len(jobs)) as progress:
        try:
            while waiting or running:
                while waiting and slots:
                    command, job = waiting.popleft()
                    running.append(_start(command, job, slots.pop(0), threads))
                    progress.started(job_label(job))
                for item in [item for item in running if item.process.poll() is not None]:
                    running.remove(item)
                    slots.append(item.devices)
                    progress.finished(job_label(item.job), _outcome(item))
                time.sleep(_POLL_SECONDS)
        finally:
            for item in running:
                item.process.terminate()  # torchrun passes it on
            for item in running:
                item.process.wait()
                item.said.close()


@dataclass
class _Running:
    process: subprocess.Popen
    job: TrainArgs
    devices: list[str] | None
    said: IO[bytes]


def _start(
    command: Sequence[str], job: TrainArgs, devices: list[str] | None, threads: int
) -> _Running:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SAVE_SECONDS))
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    said = tempfile.TemporaryFile()
    process = subprocess.Popen(
        list(command),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=said,
        # a signal to our group reaches it through us, once: torchrun would not survive a second
        start_new_session=True,
    )
    return _Running(process, job, devices, said)


def _outcome(item: _Running) -> str:
    """What became of a process that has ended; leaves a reason in the folder if it failed."""
    status = item.process.returncode
    with item.said:
        item.said.seek(0)
        lines = item.said.read().decode("utf-8", errors="replace").splitlines()
    if status == 0:
        return "done"
    folder = Path(item.job.output_dir)
    failure = read_failure(folder)
    if failure is None:
        message = f"a process of the job died (torchrun: exit status {status})"
        with contextlib.suppress(OSError, ValueError):  # a full disk must not end the sweep
            make_folder(folder)
            with open(folder / ERR_FILE, "a", encoding="utf-8") as file:
                for line in [*lines[-_LAST_LINES:], f"error: {message}"]:
                    file.write(f"{line}\n")
            mark_failed(folder, reason="died", message=message)
    elif failure.get("reason") == "diverged":
        return "diverged"
    return "failed"


def train_flags(command: Sequence[str], module: str) -> list[str]:
    """The flags of `train` in a command, with or without torchrun."""
    return list(command[list(command).index(module) + 1 :])


def check_algorithms(algorithms: Sequence[str], *, ranks: int, trainable: Sequence[str]) -> None:
    """Refuses algorithms that need one process, before anything is started."""
    unfit = [name for name in algorithms if name not in trainable]
    if ranks > 1 and unfit:
        raise UsageError(
            f"--gpus_per_job {ranks}: {', '.join(unfit)} trains on one device only; name the "
            f"others with --algorithms ({', '.join(trainable)})"
        )
