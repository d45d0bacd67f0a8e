"""Time whole train+evaluate runs: ours against an unmodified DomainBed checkout (DOMAINBED_DIR).

Both train the same algorithm, ours, which the checkout knows through the start-up hook, on the same
image files, for the same number of steps, and evaluate the same splits as often. What the ratio
shows is therefore the rest: start-up, loading, augmentation, the loop, evaluation. The two take
turns. Beside the wall clock stands the processor time of each run with all its worker processes,
which is the better clock where others use the same cores; a GPU's work is not in it.

`cold` decodes the images into the cache first, as the first job of a sweep does; `warm` finds them
there, as all others do; `needed` is warm and evaluates only what selection methods read. `job` is
what each further job of a sweep costs beyond its training, ours in a warm worker process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench_photos import write_photos
from benchmarking import ROOT, default_csv, origin, print_table, write_rows

COLUMNS = ["workload", "case", "wall_s", "cpu_s", "wall_ratio", "cpu_ratio"]
DOMAINS = ("art_painting", "cartoon", "photo", "sketch")  # PACS's, as both sides read it
NUM_CLASSES = 7
UPSTREAM, COLD, WARM, NEEDED = "upstream", "cold", "warm", "needed"
# A checkout gets our additions where the start-up hook is installed or, as here, imported first.
TRAIN = (
    "import runpy, bench_vit, domainbed_ext._startup; "
    "runpy.run_module('{package}.scripts.train', run_name='__main__', alter_sys=True)"
)


@dataclass(frozen=True)
class Workload:
    """One run.

    Attributes:
        what: For people.
        flags: Of `train`, for both.
        hparams: The same.
        cases: Of ours.
    """

    what: str
    flags: str
    hparams: dict[str, Any]
    cases: tuple[str, ...] = (COLD, WARM, NEEDED)


_LIGHT = {"backbone": "vit_dim48_pooled_224", "pretrained": False, "batch_size": 32}
_VIT_TI = {"backbone": "vit_tiny_patch16_224", "pretrained": False, "batch_size": 32}

# With the default number of files, 34 steps between evaluations train on 2.9 images for each that
# is evaluated, as DomainBed's 300 steps do on PACS; 3 steps on 0.26, as 1000 steps do on DomainNet.
WORKLOADS = {
    "photos": Workload(
        "PACS's proportion of training to evaluation, a network that costs next to nothing",
        "--algorithm LTDR --dataset PACS --steps 103 --checkpoint_freq 34",
        _LIGHT,
    ),
    "photos-often": Workload(
        "DomainNet's proportion, the same network",
        "--algorithm LTDR --dataset PACS --steps 31 --checkpoint_freq 3",
        _LIGHT,
    ),
    "photos-vit-ti": Workload(
        "two evaluations and a few steps of ViT-Ti/16: on a CPU the network is most of it",
        "--algorithm LTDR --dataset PACS --steps 4 --checkpoint_freq 300",
        _VIT_TI,
        (WARM, NEEDED),
    ),
    "digits": Workload(
        "embedded digits, a ViT of 0.15 M parameters before it is made sparse",
        "--algorithm LTDR --dataset RotatedDigits --steps 301 --checkpoint_freq 100",
        {"batch_size": 32},
        (WARM, NEEDED),
    ),
}


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    checkout = os.environ.get("DOMAINBED_DIR")
    if not checkout:
        print(
            "DOMAINBED_DIR names no checkout of DomainBed, so only our own runs are timed and "
            "there are no ratios; DomainBed itself needs wilds (pip install --no-deps), pytz, tqdm"
        )
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        count = write_photos(data / "PACS", DOMAINS, NUM_CLASSES, per_class=args.per_class)
        print(f"{count} JPEG files in {len(DOMAINS)} domains of {NUM_CLASSES} classes")
        for name in args.workloads:
            rows += measure(name, data, Path(scratch), checkout, args)
        rows += measure_jobs(Path(scratch), checkout, args)
    for row in rows:
        row.update(rounds=args.rounds, **origin(args.device))
    print_table(rows, COLUMNS)
    if not args.no_csv:
        path = args.output or default_csv(args.device)
        write_rows(path, rows, script="bench_run")
        print(f"{len(rows)} rows added to {path}")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="workloads:\n" + "\n".join(f"  {n}: {w.what}" for n, w in WORKLOADS.items()),
    )
    add = parser.add_argument
    add("--workloads", nargs="+", default=list(WORKLOADS), choices=tuple(WORKLOADS),
        help="default: all")  # fmt: skip
    add("--device", choices=("cpu", "cuda"), default="cpu",
        help="what ours uses; DomainBed uses a GPU where there is one (default: cpu)")  # fmt: skip
    add("--per-class", type=int, default=40, help="JPEG files per class and domain (default: 40)")
    add("--rounds", type=int, default=3, help="rounds that count (default: 3)")
    add("--output", type=Path, default=None,
        help="CSV to add rows to (default: results/benchmarks/<device>-<torch>.csv)")  # fmt: skip
    add("--no-csv", action="store_true", help="print only")
    return parser.parse_args(argv)


def measure(
    name: str, data: Path, scratch: Path, checkout: str | None, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of one workload: medians over rounds, in which the cases take turns."""
    workload = WORKLOADS[name]
    flags = [*workload.flags.split(), "--hparams", json.dumps(workload.hparams)]
    flags += ["--data_dir", str(data), "--test_envs", "0", "--skip_model_save"]
    cases = [UPSTREAM] if checkout else []
    cases += workload.cases
    times: dict[str, list[Seconds]] = {case: [] for case in cases}
    for _ in range(args.rounds):
        records = {}
        for case in cases:
            folder = scratch / "run"
            command = _upstream_train(flags) if case == UPSTREAM else _our_train(flags, case, args)
            if case == COLD:
                shutil.rmtree(data / "image_cache", ignore_errors=True)
            seconds = run([*command, "--output_dir", str(folder)], checkout)
            print(f"{name}, {case}: {seconds.wall:.1f} s, {seconds.cpu:.1f} s computed", flush=True)
            times[case].append(seconds)
            records[case] = (folder / "results.jsonl").read_text().splitlines()
            shutil.rmtree(folder)
        check_same_work(records)
    return [_row(name, case, times[case], times.get(UPSTREAM)) for case in cases]


def check_same_work(records: dict[str, list[str]]) -> None:
    """The runs have evaluated the same splits at the same steps, "needed" a part of them."""
    accs = {
        case: [
            (record["step"], {key for key in record if key.endswith(("_in_acc", "_out_acc"))})
            for record in map(json.loads, lines)
        ]
        for case, lines in records.items()
    }
    whole = accs[UPSTREAM] if UPSTREAM in accs else accs[WARM]
    for case, found in accs.items():
        same = [step for step, _ in found] == [step for step, _ in whole]
        for (_, keys), (_, expected) in zip(found, whole, strict=True):
            same &= keys < expected if case == NEEDED else keys == expected
        if not same:
            raise SystemExit(f"{case} has not done the same work: {found} and {whole}")


def measure_jobs(
    scratch: Path, checkout: str | None, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """What a further job costs whose three steps and two evaluations take next to nothing."""
    flags = "--algorithm ERM_ViT --dataset Debug28 --steps 3 --skip_model_save".split()
    few, many = 1, 9
    times: dict[str, list[Seconds]] = {"job": []} | ({UPSTREAM: []} if checkout else {})
    for _ in range(args.rounds):
        spent = []
        for number in (few, many):
            sweep = [sys.executable, "-m", "domainbed_ext.scripts.sweep"]
            sweep += "--algorithms ERM_ViT --datasets Debug28 --steps 3 --single_test_envs".split()
            sweep += ["--n_trials", str(number), "--n_hparams", "1", "--test_envs", "0"]
            sweep += ["--jobs", "1", "--device", args.device, "--skip_model_save"]
            folder = scratch / "sweep"
            spent.append(run([*sweep, "--skip_confirmation", "--output_dir", str(folder)], None))
            shutil.rmtree(folder)
        first, all_ = spent
        jobs = many - few
        times["job"].append(Seconds((all_.wall - first.wall) / jobs, (all_.cpu - first.cpu) / jobs))
        if checkout:
            folder = scratch / "run"
            command = [*_upstream_train(flags), "--output_dir", str(folder)]
            times[UPSTREAM].append(run(command, checkout))
            shutil.rmtree(folder)
    return [_row("one more job", case, times[case], times.get(UPSTREAM)) for case in times]


@dataclass(frozen=True)
class Seconds:
    """Of a process and the processes that it has waited for."""

    wall: float
    cpu: float


def run(command: list[str], checkout: str | None) -> Seconds:
    """Runs a command to its end, in a checkout or else here."""
    path = [str(ROOT), str(ROOT / "scripts"), *([checkout] if checkout else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    with tempfile.TemporaryFile() as output:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=checkout or ROOT, env=environment, stdout=output, stderr=output
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            said = output.read().decode()[-3000:]
            raise SystemExit(f"status {process.returncode} of {' '.join(command)}\n{said}")
    return Seconds(wall, usage.ru_utime + usage.ru_stime)


def _upstream_train(flags: list[str]) -> list[str]:
    return [sys.executable, "-c", TRAIN.format(package="domainbed"), *flags]


def _our_train(flags: list[str], case: str, args: argparse.Namespace) -> list[str]:
    splits = "needed" if case == NEEDED else "all"
    command = [sys.executable, "-c", TRAIN.format(package="domainbed_ext"), *flags]
    return [*command, "--device", args.device, "--eval_splits", splits]


def _row(
    workload: str, case: str, times: list[Seconds], reference: list[Seconds] | None
) -> dict[str, Any]:
    row = {
        "workload": workload,
        "case": case,
        "wall_s": f"{statistics.median(t.wall for t in times):.2f}",
        "cpu_s": f"{statistics.median(t.cpu for t in times):.2f}",
    }
    if reference is not None:
        pairs = list(zip(times, reference, strict=True))
        row["wall_ratio"] = f"{statistics.median(them.wall / us.wall for us, them in pairs):.2f}"
        row["cpu_ratio"] = f"{statistics.median(them.cpu / us.cpu for us, them in pairs):.2f}"
    return row


if __name__ == "__main__":
    sys.exit(main())
