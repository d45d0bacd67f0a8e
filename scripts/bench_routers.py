"""What each router costs: parameters, active experts, and time per training step, in one run.

Every algorithm takes real training steps (`update`, with its losses, its optimizer and what it does
between steps) on the same random images, all interleaved in each round. `time` is a step over that
of GMOE in the same round, `parameters` and `extra` are what is trained, in all and beyond the dense
ViT, and `experts` the mean number of routed experts per token and sparse layer.

GROUPS tells register tokens from patches, so on EmojiDG it gets the default ViT's twin that has
one. DISTILL learns from an LTDR model that no step was taken with; predicting with that is in its
time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarking import (
    Clock,
    default_csv,
    median_ms,
    origin,
    print_table,
    ratios,
    time_interleaved,
    write_rows,
)

from domainbed_ext.algorithms import get_algorithm_class
from domainbed_ext.hparams import VIT_ALGORITHMS, default_hparams
from domainbed_ext.saved_models import save_algorithm

NUM_DOMAINS = 3
WITH_REGISTER_TOKEN = {"vit_dim128_stem16_64": "vit_dim128_stem16_reg1_64"}
COLUMNS = ["algorithm", "experts", "parameters", "extra", "ms_step", "time"]


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    batch = random_batch(args)
    algorithms, notes = {}, []
    for name in args.algorithms:
        try:
            algorithms[name] = create(name, batch, args)
        except ValueError as error:
            notes.append(f"{name} was left out: {error}")
    experts: dict[str, float | None] = {}

    def step_of(name: str) -> Callable[[], tuple[float, ...]]:
        def measure() -> tuple[float, ...]:
            clock = Clock(args.device, args.clock)
            for _ in range(args.repeat):
                experts[name] = algorithms[name].update(batch).get("experts_per_token")
            return (clock.lap() / args.repeat,)

        return measure

    times = time_interleaved({name: step_of(name) for name in algorithms}, rounds=args.rounds)
    dense = trained_parameters(create("ERM_ViT", batch, args))
    rows: list[dict[str, Any]] = []
    for name, algorithm in algorithms.items():
        per_token, count = experts[name], trained_parameters(algorithm)
        rows.append(
            {
                "algorithm": name,
                "dataset": args.dataset,
                "experts": "" if per_token is None else f"{per_token:.2f}",
                "parameters": count,
                "extra": count - dense,
                "ms_step": f"{median_ms(times[name]):.1f}",
                "time": f"{statistics.median(ratios(times[name], times['GMOE'])):.3f}",
                "batch_size": args.batch_size,
                "rounds": args.rounds,
                "clock": args.clock,
                **origin(args.device),
            }
        )
    print_table(rows, COLUMNS)
    for note in notes:
        print(note, file=sys.stderr)
    if not args.no_csv:
        write_rows(args.output or default_csv(args.device), rows, script="bench_routers")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(VIT_ALGORITHMS)
    parser.add_argument("--algorithms", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument(
        "--dataset", default="EmojiDG", help="whose default hyper-parameters (default: EmojiDG)"
    )
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--num_classes", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=8, help="images per domain (default: 8)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeat", type=int, default=1, help="steps per measurement")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--clock", default="cpu", choices=("cpu", "wall"), help="seconds of this process, or all"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="CSV to add rows to (default: results/benchmarks/<device>-<torch>.csv)",
    )
    parser.add_argument("--no-csv", action="store_true", help="print only")
    args = parser.parse_args(argv)
    if args.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
        args.clock = "wall"
    torch.set_num_threads(args.threads)
    if "GMOE" not in args.algorithms:
        args.algorithms = ["GMOE", *args.algorithms]
    return args


def random_batch(args: argparse.Namespace) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One batch per training domain."""
    torch.manual_seed(0)
    size = (args.batch_size, 3, args.image_size, args.image_size)
    return [
        (
            torch.rand(size, device=args.device),
            torch.randint(args.num_classes, (args.batch_size,), device=args.device),
        )
        for _ in range(NUM_DOMAINS)
    ]


def create(name: str, batch: list[tuple[torch.Tensor, torch.Tensor]], args) -> Any:
    """The algorithm with its defaults, ready for its first step."""
    hparams = {**defaults(name, args), "batch_size": args.batch_size}
    if name == "GROUPS":
        hparams["backbone"] = WITH_REGISTER_TOKEN.get(hparams["backbone"], hparams["backbone"])
    shape = tuple(batch[0][0].shape[1:])
    with tempfile.TemporaryDirectory() as folder:
        if name == "DISTILL":
            hparams["distill_teacher"] = save_untrained("LTDR", Path(folder), shape, args)
        torch.manual_seed(0)
        algorithm = get_algorithm_class(name)(shape, args.num_classes, NUM_DOMAINS, hparams)
        algorithm.to(args.device).train()
        algorithm.prepare([[domain] for domain in batch])
    return algorithm


def defaults(name: str, args) -> dict[str, Any]:
    """Its hyper-parameters, for a run whose length does not matter."""
    hparams = default_hparams(name, args.dataset)
    return {**hparams, "schedule_steps": hparams["schedule_steps"] or 1000}


def save_untrained(name: str, folder: Path, shape: tuple[int, ...], args) -> str:
    """The folder of a model with its defaults, as a run leaves it."""
    hparams = defaults(name, args)
    algorithm = get_algorithm_class(name)(shape, args.num_classes, NUM_DOMAINS, hparams)
    info = {
        "args": {"algorithm": name, "dataset": args.dataset},
        "model_input_shape": list(shape),
        "model_num_classes": args.num_classes,
        "model_num_domains": NUM_DOMAINS,
        "model_hparams": hparams,
    }
    save_algorithm(folder, algorithm, info)
    return str(folder)


def trained_parameters(algorithm: torch.nn.Module) -> int:
    return sum(p.numel() for p in algorithm.parameters() if p.requires_grad)


if __name__ == "__main__":
    sys.exit(main())
