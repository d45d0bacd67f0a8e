"""Which of a checkout's programs runs, and what of its command line DomainBed does not pass on."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

PLACES = ("folder:", "manifest:")
_TABULATING = ("collect_results", "list_top_hparams")


@dataclass(frozen=True)
class TrainFlags:
    """Flags of `domainbed.scripts.train` that neither algorithms nor data sets are told.

    Attributes:
        dataset: What is trained on.
        test_envs: The domains that are not.
        trial_seed: Of the splits.
        steps: Length of the run; None for the data set's.
        holdout_fraction: Part of a domain that is held out.
        output_dir: The job's folder.
    """

    dataset: str = "RotatedMNIST"
    test_envs: tuple[int, ...] = (0,)
    trial_seed: int = 0
    steps: int | None = None
    holdout_fraction: float = 0.2
    output_dir: str = "train_output"


def program() -> str | None:
    """The checkout's script that this process runs, such as "train" or "sweep"; else None."""
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    if not file:
        return None
    path = Path(os.path.abspath(file))
    return path.stem if path.parts[-3:-1] == ("domainbed", "scripts") else None


def train_flags() -> TrainFlags:
    """The flags of the run that this process is; the defaults in any other process."""
    if program() != "train":
        return TrainFlags()
    kinds = {"dataset": str, "test_envs": int, "trial_seed": int, "steps": int}
    kinds |= {"holdout_fraction": float, "output_dir": str}
    found = _parse(*((f"--{f.name}", kinds[f.name], f.default) for f in fields(TrainFlags)))
    return TrainFlags(**{**vars(found), "test_envs": tuple(found.test_envs)})


def datasets_asked_for() -> list[str]:
    """The ``folder:PATH`` and ``manifest:FILE`` that the command line names: DomainBed looks data
    sets up among the names of a module."""
    if program() is None:
        return []
    names = [word.partition("=")[2] if word.startswith("--") else word for word in sys.argv[1:]]
    return [name for name in dict.fromkeys(names) if name.startswith(PLACES)]


def records_to_tabulate() -> dict[str, list[dict[str, Any]]]:
    """The first record of each job that a program makes tables of, by ``folder:PATH`` or
    ``manifest:FILE``; nothing in other programs."""
    found: dict[str, list[dict[str, Any]]] = {}
    folder = _parse(("--input_dir", str, None)).input_dir if program() in _TABULATING else None
    for file in sorted(Path(folder).glob("*/results.jsonl")) if folder else []:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError), open(file) as lines:
            record = json.loads(lines.readline())
            name = str(record["args"]["dataset"])
            if name.startswith(PLACES):
                found.setdefault(name, []).append(record)
    return {name: found[name] for name in sorted(found)}


def _parse(*flags: tuple[str, type, object]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False)
    for name, kind, default in flags:
        nargs = "+" if isinstance(default, tuple) else None
        parser.add_argument(name, type=kind, default=default, nargs=nargs)
    return parser.parse_known_args(sys.argv[1:])[0]
