"""Training processes that are killed where a test says, without starting Python for each of them.

`TrainingProcesses` starts one server, which imports everything once and trains nothing itself. Each
run is a fork of it: a process of its own that calls the command line's `main`, and that SIGKILL
ends at a named place or after so many seconds.

A place is an entry into or a return from a function of the modules that write a job's folder, or
the moment before or after one of their calls that touch a file: "replaced: before replace".
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "domainbed_ext"
WATCHED = (
    *("training", "resuming", "divergence", "evaluation", "records"),
    *("checkpoint", "saved_models", "tensor_files", "atomic_files", "job_files", "job_locks"),
)
FILE_CALLS = {
    *(
        "open",
        "write",
        "flush",
        "truncate",
        "fsync",
        "replace",
        "unlink",
        "chmod",
        "mkdir",
        "rmdir",
    ),
    "serialize_file",  # of safetensors
}
TINY_VIT = "vit_dim16_patch8_16"


@dataclass(frozen=True)
class Attempt:
    """One process.

    Attributes:
        folder: Where it runs; its flags can name an `--output_dir` relative to it.
        flags: Of `train`.
        kill_at: The place, None for none.
        occurrence: The how-manieth time it gets there.
        kill_after: Seconds.
        watch: Count the places it goes through.
    """

    folder: str
    flags: list[str]
    kill_at: str | None = None
    occurrence: int = 1
    kill_after: float | None = None
    watch: bool = False


@dataclass(frozen=True)
class End:
    """What became of it.

    Attributes:
        killed: Whether SIGKILL ended it.
        status: Its exit status otherwise.
        printed: Its stdout and stderr.
        places: How often it came through each place, in the order of the first time.
        seconds: It took.
    """

    killed: bool
    status: int
    printed: str
    seconds: float
    places: dict[str, int] = field(default_factory=dict)


class TrainingProcesses:
    """The server, as a context."""

    def __enter__(self) -> TrainingProcesses:
        # One thread: OpenMP's do not survive a fork.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.kill()
        self._server.communicate()

    def run(self, attempt: Attempt) -> End:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(asdict(attempt)) + "\n")
        self._server.stdin.flush()
        return End(**json.loads(self._server.stdout.readline()))


def serve() -> None:
    _import_everything()
    for line in sys.stdin:
        end = _run(Attempt(**json.loads(line)))
        print(json.dumps(asdict(end)), flush=True)


def _run(attempt: Attempt) -> End:
    printed = Path(attempt.folder) / "printed.txt"
    counts = Path(attempt.folder) / "places.json"
    printed.write_text("")  # the child may be killed before it has opened it
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _train(attempt, printed, counts)
    if attempt.kill_after is not None:
        time.sleep(attempt.kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return End(
        killed=os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
        status=os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status),
        printed=printed.read_text(),
        seconds=time.monotonic() - began,
        places=json.loads(counts.read_text()) if attempt.watch else {},
    )


def _train(attempt: Attempt, printed: Path, counts: Path) -> None:
    """What the fork does; it does not return."""
    from domainbed_ext.scripts.train import main

    os.chdir(attempt.folder)
    output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    places: Counter[str] = Counter()

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        place = _place(frame, event, argument)
        if place is None:
            return
        places[place] += 1
        if place == attempt.kill_at and places[place] == attempt.occurrence:
            os.kill(os.getpid(), signal.SIGKILL)

    status = 70
    try:
        if attempt.watch or attempt.kill_at is not None:
            sys.setprofile(watch)
        status = main(attempt.flags)
        sys.setprofile(None)
        if attempt.watch:
            counts.write_text(json.dumps(places))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _place(frame: FrameType, event: str, argument: Any) -> str | None:
    code = frame.f_code
    if event in ("call", "return"):
        if code.co_filename not in _WATCHED_FILES or code.co_name.startswith("<"):
            return None
        return f"{code.co_name}: {event}"
    if argument.__name__ not in FILE_CALLS or isinstance(argument.__self__, str):
        return None
    caller: FrameType | None = frame
    while caller is not None and caller.f_code.co_filename not in _WATCHED_FILES:
        if caller.f_code.co_filename.startswith(str(PACKAGE)):
            return None
        caller = caller.f_back
    if caller is None:
        return None
    when = "before" if event == "c_call" else "after"
    return f"{caller.f_code.co_name}: {when} {argument.__name__}"


_WATCHED_FILES = {str(PACKAGE / f"{module}.py") for module in WATCHED}


def _import_everything() -> None:
    from timm.models import VisionTransformer, build_model_with_cfg, register_model

    import domainbed_ext.runs
    import domainbed_ext.training  # noqa: F401
    from domainbed_ext.datasets.digits import shuffled_digits
    from domainbed_ext.provenance import code_version
    from gmoe_ltdr import small_vits

    def vit_dim16_patch8_16(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
        arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
        return build_model_with_cfg(
            VisionTransformer,
            "vit_dim64_patch4_16",  # whose settings are timm's business only
            pretrained,
            **{**arguments, **kwargs},
        )

    vit_dim16_patch8_16.__module__ = small_vits.__name__
    register_model(vit_dim16_patch8_16)
    shuffled_digits()
    code_version()


if __name__ == "__main__":
    serve()
