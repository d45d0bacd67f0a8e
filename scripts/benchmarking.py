"""What the benchmark scripts share: flags, interleaved timing, CSV rows that name their origin."""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
NOT_APPLICABLE = "n/a"


def add_flags(parser: argparse.ArgumentParser, *, repeated: str) -> None:
    """The flags of every benchmark.

    Args:
        parser: Of the script.
        repeated: What is repeated per round, in the plural.
    """
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    add("--rounds", type=int, default=7, help="rounds that count (default: 7)")
    add("--warmup", type=int, default=2, help="rounds that do not (default: 2)")
    add("--repeat", type=int, default=None,
        help=f"{repeated} per round and case (default: 1 on a CPU, 10 on a GPU)")  # fmt: skip
    add("--clock", choices=("wall", "cpu"), default="wall",
        help="cpu: seconds this process computed, for cores that others use too; run it with "
        "OMP_NUM_THREADS=1 (default: wall)")  # fmt: skip
    add("--output", type=Path, default=None,
        help="CSV to add rows to (default: results/benchmarks/<device>-<torch>.csv)")  # fmt: skip
    add("--no-csv", action="store_true", help="print only")


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The arguments, those of `add_flags` checked and completed."""
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    if args.device == "cuda" and args.clock == "cpu":
        parser.error("--clock cpu says nothing about a GPU; leave it out")
    args.repeat = args.repeat or (1 if args.device == "cpu" else 10)
    return args


def report(rows: list[dict], columns: list[str], args: argparse.Namespace, *, script: str) -> None:
    """Print rows as a table and add them to the CSV, each with how and where it was measured.

    A row without any time, which says that something cannot be done, is printed only.
    """
    print_table(rows, columns)
    if args.no_csv:
        return
    how = {"rounds": args.rounds, "clock": args.clock, **origin(args.device)}
    timed = [{**row, **how} for row in rows if row["ratio"] != NOT_APPLICABLE]
    path = args.output or default_csv(args.device)
    write_rows(path, timed, script=script)
    print(f"{len(timed)} rows added to {path}")


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def origin(device: str) -> dict[str, str]:
    """Columns every row ends with."""
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def commit() -> str:
    """Short hash of the checkout, "+" when the code differs from it; "unknown" outside one."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=9", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "gmoe_ltdr", "scripts"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described + ("+" if changed else "")


def time_interleaved(
    cases: Mapping[str, Callable[[], tuple[float, ...]]], *, rounds: int, warmup: int = 1
) -> dict[str, list[tuple[float, ...]]]:
    """Run every case once per round, so that what disturbs the machine disturbs all alike.

    Args:
        cases: Each returns its times in seconds.
        rounds: How many count.
        warmup: How many do not, before.
    """
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in cases}
    for index in range(warmup + rounds):
        for name, case in cases.items():
            measured = case()
            if index >= warmup:
                times[name].append(measured)
    return times


def ratios(times: list[tuple[float, ...]], reference: list[tuple[float, ...]]) -> list[float]:
    """Total time over the reference's, round by round."""
    return [sum(a) / sum(b) for a, b in zip(times, reference, strict=True)]


def median_ms(times: list[tuple[float, ...]], part: int | None = None) -> float:
    values = [sum(t) if part is None else t[part] for t in times]
    return 1000 * statistics.median(values)


def peak_megabytes(run: Callable[[], object]) -> int:
    """Memory that a run takes beyond what is allocated before it, on a GPU."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20)


class Clock:
    """Seconds since the last reading, after the device has finished.

    Args:
        device: "cpu" or "cuda".
        kind: "wall", or "cpu" for the seconds this process computed: with one thread, the better
            clock where other processes take turns on the same cores.
    """

    def __init__(self, device: str, kind: str = "wall"):
        self._cuda = device == "cuda"
        self._now = time.process_time if kind == "cpu" else time.perf_counter
        self.lap()

    def lap(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        now = self._now()
        seconds = now - getattr(self, "_last", now)
        self._last = now
        return seconds


def default_csv(device: str) -> Path:
    name = "cpu" if device == "cpu" else torch.cuda.get_device_name().replace(" ", "-").lower()
    version = torch.__version__.split("+")[0]
    return ROOT / "results" / "benchmarks" / f"{name}-{version}.csv"


def write_rows(path: Path, rows: list[dict], *, script: str) -> None:
    """Append rows; the file's columns are the union of what its scripts write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"script": script, **row} for row in rows]
    before = []
    if path.exists():
        with path.open(newline="") as file:
            before = list(csv.DictReader(file))
    columns: dict[str, None] = {}
    for row in [*before, *rows]:
        columns.update(dict.fromkeys(row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*before, *rows])


def print_table(rows: list[dict], columns: list[str]) -> None:
    widths = {c: max(len(c), *(len(str(r.get(c, ""))) for r in rows)) for c in columns}
    print("  ".join(c.ljust(widths[c]) for c in columns))
    for row in rows:
        print("  ".join(str(row.get(c, "")).ljust(widths[c]) for c in columns))


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
