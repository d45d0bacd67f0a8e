"""Time whole training steps: dense, GMOE and LTDR vision transformers, in one run.

A step is what training does: forward under autocast, loss and balance loss, backward, fused AdamW.
`ratio` is a model's step over the dense model's, measured in the same round; `flop_ratio` is the
same by multiply-adds alone, counted with the routing that happened. `over_ideal` divides the two:
1.00 means that the sparse layers run as fast as the dense network they replace.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

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

from gmoe_ltdr import MoESpec, balance_loss, collect_routing, moe_layers, preset, upcycle_
from gmoe_ltdr.dispatch import create_dispatcher
from gmoe_ltdr.engines import use_expert_backend
from gmoe_ltdr.expert_backends import EXPERT_BACKENDS
from gmoe_ltdr.routing import Routing

MODELS: dict[str, Callable[[], MoESpec] | None] = {
    "dense": None,
    "gmoe": lambda: preset("gmoe"),
    "ltdr-4top1": lambda: preset("ltdr", num_experts=4, top_k=1),
    "ltdr-4top2": lambda: preset("ltdr", num_experts=4, top_k=2),
    "ltdr-6top2": lambda: preset("ltdr", num_experts=6, top_k=2),
}
COLUMNS = ["model", "precision", "backend", "images_per_second", "ms_step", "ratio", "flop_ratio"]
COLUMNS += ["over_ideal", "experts_per_token", "peak_mb"]
CPU_COLUMNS = [column for column in COLUMNS if column != "peak_mb"]


@dataclass
class Case:
    """A model, its optimizer and one batch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    images: Tensor
    labels: Tensor
    precision: str

    def losses(self) -> tuple[Tensor, Mapping[str, Routing]]:
        """The loss, and the routing of every sparse layer."""
        device = self.images.device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            if not moe_layers(self.model):
                return F.cross_entropy(self.model(self.images).float(), self.labels), {}
            with collect_routing(self.model) as routings:
                logits = self.model(self.images)
        spec = next(iter(moe_layers(self.model).values())).spec
        loss = F.cross_entropy(logits.float(), self.labels) + balance_loss(routings, spec)
        return loss, routings

    def step(self) -> None:
        loss, _ = self.losses()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.manual_seed(0)
    cases = {}
    for precision in args.precision:
        for name in args.models:
            cases[f"{name} {precision}"] = make_case(name, precision, args)
    counted = {name: count(case) for name, case in cases.items()}
    times = time_interleaved(
        {name: timed(case, args) for name, case in cases.items()},
        rounds=args.rounds,
        warmup=args.warmup,
    )
    where = origin(args.device)
    rows = []
    for name, case in cases.items():
        model, precision = name.rsplit(" ", 1)
        reference = f"dense {precision}"
        ratio = statistics.median(ratios(times[name], times[reference]))
        flops, per_token = counted[name]
        flop_ratio = flops / counted[reference][0]
        rows.append(
            {
                "model": model,
                "backbone": args.backbone,
                "precision": precision,
                "backend": "" if model == "dense" else args.backend,
                "images_per_second": f"{1000 * args.batch_size / median_ms(times[name]):.1f}",
                "ms_step": f"{median_ms(times[name]):.2f}",
                "ratio": f"{ratio:.3f}",
                "flop_ratio": f"{flop_ratio:.3f}",
                "over_ideal": f"{ratio / flop_ratio:.3f}",
                "experts_per_token": f"{per_token:.3f}",
                "peak_mb": peak_megabytes(case) if args.device == "cuda" else "",
                "batch_size": args.batch_size,
                "compiled": args.compile,
                "rounds": args.rounds,
                "clock": args.clock,
                **where,
            }
        )
    print_table(rows, COLUMNS if args.device == "cuda" else CPU_COLUMNS)
    if not args.no_csv:
        path = args.output or default_csv(args.device)
        write_rows(path, rows, script="bench_train")
        print(f"{len(rows)} rows added to {path}")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python scripts/bench_train.py --device cuda                ViT-S/16, batch 96, bf16\n"
        "  python scripts/bench_train.py --device cuda --precision bf16 fp32\n"
        "  python scripts/bench_train.py --backbone vit_tiny_patch16_224 --batch-size 4\n",
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    add("--backbone", default="vit_small_patch16_224", help="a timm ViT (default: ViT-S/16)")
    add("--models", nargs="+", default=list(MODELS), choices=tuple(MODELS),
        help="default: all; dense is always timed, the others are compared with it")  # fmt: skip
    add("--backend", default="auto", choices=("auto", *EXPERT_BACKENDS, "tutel"),
        help="how experts are computed; tutel: its dispatch kernels (default: auto)")  # fmt: skip
    add("--precision", nargs="+", default=None, choices=("bf16", "fp32"),
        help="bf16 is autocast; fp32 is GMoE's own (default: bf16; on a CPU fp32)")  # fmt: skip
    add("--batch-size", type=int, default=None, help="images (default: 96; on a CPU 4)")
    add("--compile", action="store_true", help="torch.compile on the dense blocks of every model")
    add("--rounds", type=int, default=7, help="rounds that count (default: 7)")
    add("--warmup", type=int, default=2, help="rounds that do not (default: 2)")
    add("--repeat", type=int, default=None,
        help="steps per round and model (default: 1 on a CPU, 10 on a GPU)")  # fmt: skip
    add("--clock", choices=("wall", "cpu"), default="wall",
        help="cpu: seconds this process computed, for cores that others use too; run it with "
        "OMP_NUM_THREADS=1 (default: wall)")  # fmt: skip
    add("--output", type=Path, default=None,
        help="CSV to add rows to (default: results/benchmarks/<device>-<torch>.csv)")  # fmt: skip
    add("--no-csv", action="store_true", help="print only")
    args = parser.parse_args(argv)
    on_cpu = args.device == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    if args.device == "cuda" and args.clock == "cpu":
        parser.error("--clock cpu says nothing about a GPU; leave it out")
    args.precision = args.precision or (["fp32"] if on_cpu else ["bf16"])
    args.batch_size = args.batch_size or (4 if on_cpu else 96)
    args.repeat = args.repeat or (1 if on_cpu else 10)
    args.models = ["dense", *(m for m in args.models if m != "dense")]
    return args


def make_case(name: str, precision: str, args: argparse.Namespace) -> Case:
    torch.manual_seed(0)
    model = timm.create_model(args.backbone, pretrained=False, num_classes=7)
    if MODELS[name] is not None:
        upcycle_(model, MODELS[name]())
        if args.backend == "tutel":
            for layer in moe_layers(model).values():
                layer.dispatcher = create_dispatcher("tutel", num_experts=layer.spec.num_experts)
        else:
            use_expert_backend(model, args.backend)
    model = model.to(args.device).train()
    if args.compile:
        for block in model.blocks:
            if not moe_layers(block):
                block.compile()
    size = model.default_cfg["input_size"]
    return Case(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True),
        images=torch.randn(args.batch_size, *size, device=args.device),
        labels=torch.randint(0, 7, (args.batch_size,), device=args.device),
        precision=precision,
    )


def count(case: Case) -> tuple[float, float]:
    """Multiply-adds of one forward, and experts per token in the sparse layers.

    The dense layers are counted by PyTorch; the experts by the routing, since a counter would count
    rows that are allocated and not computed.
    """
    layers = moe_layers(case.model)
    if not layers:
        with FlopCounterMode(display=False) as counter:
            case.losses()
        return counter.get_total_flops() / 2, 1.0
    dense = timm.create_model(case.model.default_cfg["architecture"], num_classes=7)
    dense = dense.to(case.images.device).train()
    twin = Case(dense, case.optimizer, case.images, case.labels, case.precision)
    total, _ = count(twin)
    _, routings = case.losses()
    assigned = tokens = 0
    for layer_name, layer in layers.items():
        routing = routings[layer_name]
        num_tokens = routing.logits_TE.shape[0]
        _, hidden_dim, dim = layer.experts.fc1_weight.shape
        total += 2 * dim * hidden_dim * (routing.num_assignments - num_tokens)
        assigned, tokens = assigned + routing.num_assignments, tokens + num_tokens
    return total, assigned / tokens


def timed(case: Case, args: argparse.Namespace) -> Callable[[], tuple[float]]:
    def measure() -> tuple[float]:
        clock = Clock(args.device, args.clock)
        for _ in range(args.repeat):
            case.step()
        return (clock.lap() / args.repeat,)

    return measure


def peak_megabytes(case: Case) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.step()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20)


if __name__ == "__main__":
    sys.exit(main())
