"""Time whole training steps: dense, GMOE and LTDR vision transformers, in one run.

A step is what training does: forward under autocast, loss and balance loss, backward, AdamW.
`ratio` is a model's step over the dense model's, measured in the same round; `flop_ratio` is the
same by multiply-adds alone, counted with the routing that happened. `over_ideal` divides the two:
1.00 means that the sparse layers run as fast as the dense network they replace.

`--options` takes options of a run (docs/engines.md), "default" or one or several joined by "+".
Each model is timed with each; `over_default` is its step over that with the first of them.

With `--recipe`, and Tutel installed, GMoE's own step is one more model: float32, Tutel's MoE layer
with its cosine gate, one expert per token and capacity 1.5, attention in plain expressions, Adam.
`over_recipe` is how many of a model's steps it takes the time of.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarking import (
    Clock,
    add_flags,
    median_ms,
    parse,
    peak_megabytes,
    ratios,
    report,
    time_interleaved,
)
from gmoe_recipe import RECIPE, create_recipe, recipe_loss

from domainbed_ext.compilation import compile_blocks_, share_graphs_
from domainbed_ext.optimization import as_input, use_fused_kernels_
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
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "fused": {"fused_optimizer": "on"},
    "unfused": {"fused_optimizer": "off"},
    "channels_last": {"channels_last": True},
    "compile": {"compile": "blocks"},
}
COLUMNS = ["model", "precision", "options", "backend", "images_per_second", "ms_step", "ratio"]
COLUMNS += ["flop_ratio", "over_ideal", "over_default", "over_recipe", "experts_per_token"]
COLUMNS += ["peak_mb"]


@dataclass(frozen=True)
class Variant:
    """What is timed."""

    model: str
    precision: str
    options: str


@dataclass
class Case:
    """A model, its optimizer and one batch."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    images: Tensor
    labels: Tensor
    precision: str
    options: Mapping[str, Any]

    def losses(self) -> tuple[Tensor, Mapping[str, Routing]]:
        """The loss, and the routing of every sparse layer."""
        device = self.images.device.type
        images = as_input(self.images, self.options)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            if not moe_layers(self.model):
                logits = self.model(images).float()
                return F.cross_entropy(logits, self.labels) + recipe_loss(self.model), {}
            with collect_routing(self.model) as routings:
                logits = self.model(images)
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
    cases: dict[Variant, Case] = {}
    for precision in args.precision:
        for name in args.models:
            for options in args.options:
                variant = Variant(name, precision, options)
                cases[variant] = make_case(variant, args)
    recipe = Variant(RECIPE, "fp32", args.options[0])
    if args.recipe:
        cases[recipe] = make_recipe(args)
    counted = {variant: count(case) for variant, case in cases.items() if variant != recipe}
    times = time_interleaved(
        {variant: timed(case, args) for variant, case in cases.items()},
        rounds=args.rounds,
        warmup=args.warmup,
    )

    def median_ratio(variant: Variant, reference: Variant) -> float:
        return statistics.median(ratios(times[variant], times[reference]))

    rows = []
    for variant, case in cases.items():
        precision = args.precision[0] if variant == recipe else variant.precision
        dense = Variant("dense", precision, variant.options)
        ratio = median_ratio(variant, dense)
        row = {
            "model": variant.model,
            "backbone": args.backbone,
            "precision": variant.precision,
            "images_per_second": f"{1000 * args.batch_size / median_ms(times[variant]):.1f}",
            "ms_step": f"{median_ms(times[variant]):.2f}",
            "ratio": f"{ratio:.3f}",
            "peak_mb": peak_megabytes(case.step) if args.device == "cuda" else "",
            "batch_size": args.batch_size,
        }
        if args.recipe:
            row["over_recipe"] = f"{median_ratio(recipe, variant):.2f}"
        if variant == recipe:
            row["backend"] = "tutel"
        else:
            flops, per_token = counted[variant]
            flop_ratio = flops / counted[dense][0]
            first = replace(variant, options=args.options[0])
            row |= {
                "options": variant.options,
                "backend": args.backend if moe_layers(case.model) else "",
                "flop_ratio": f"{flop_ratio:.3f}",
                "over_ideal": f"{ratio / flop_ratio:.3f}",
                "over_default": f"{median_ratio(variant, first):.3f}",
                "experts_per_token": f"{per_token:.3f}",
            }
        rows.append(row)
    shown = [column for column in COLUMNS if any(row.get(column) for row in rows)]
    report(rows, shown, args, script="bench_train")
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python scripts/bench_train.py --device cuda                ViT-S/16, batch 96, bf16\n"
        "  python scripts/bench_train.py --device cuda --precision bf16 fp32 --recipe\n"
        "  python scripts/bench_train.py --backbone vit_tiny_patch16_224 --batch-size 4\n",
    )
    add_flags(parser, repeated="steps")
    add = parser.add_argument
    add("--backbone", default="vit_small_patch16_224", help="a timm ViT (default: ViT-S/16)")
    add("--models", nargs="+", default=list(MODELS), choices=tuple(MODELS),
        help="default: all; dense is always timed, the others are compared with it")  # fmt: skip
    add("--recipe", action="store_true", help="GMoE's own step too; needs Tutel")
    add("--backend", default="auto", choices=("auto", *EXPERT_BACKENDS, "tutel"),
        help="how experts are computed; tutel: its dispatch kernels (default: auto)")  # fmt: skip
    add("--precision", nargs="+", default=None, choices=("bf16", "fp32"),
        help="bf16 is autocast; fp32 is GMoE's own (default: bf16; on a CPU fp32)")  # fmt: skip
    add("--batch-size", type=int, default=None, help="images (default: 96; on a CPU 4)")
    add("--options", nargs="+", default=["default"], metavar="OPTIONS",
        help=f"of {', '.join(OPTIONS)}, or several joined by + (default: default)")  # fmt: skip
    args = parse(parser, argv)
    for name in "+".join(args.options).split("+"):
        if name not in OPTIONS:
            parser.error(f"--options: there is no {name!r}; choose from {', '.join(OPTIONS)}")
    on_cpu = args.device == "cpu"
    args.precision = args.precision or (["fp32"] if on_cpu else ["bf16"])
    args.batch_size = args.batch_size or (4 if on_cpu else 96)
    args.models = ["dense", *(m for m in args.models if m != "dense")]
    return args


def make_case(variant: Variant, args: argparse.Namespace) -> Case:
    torch.manual_seed(0)
    options = {k: v for name in variant.options.split("+") for k, v in OPTIONS[name].items()}
    model = timm.create_model(args.backbone, pretrained=False, num_classes=7)
    create_spec = MODELS[variant.model]
    if create_spec is not None:
        upcycle_(model, create_spec())
        if args.backend == "tutel":
            for layer in moe_layers(model).values():
                layer.dispatcher = create_dispatcher("tutel", num_experts=layer.spec.num_experts)
        else:
            use_expert_backend(model, args.backend)
    compiled = options.get("compile") == "blocks"
    if compiled:
        share_graphs_(model)
    model = model.to(args.device).train()
    if compiled:
        compile_blocks_(model, torch.device(args.device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    use_fused_kernels_(optimizer, options)
    return Case(model, optimizer, *random_batch(model, args), variant.precision, options)


def make_recipe(args: argparse.Namespace) -> Case:
    torch.manual_seed(0)
    model = create_recipe(args.backbone, preset("gmoe")).to(args.device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    return Case(model, optimizer, *random_batch(model, args), "fp32", {})


def random_batch(model: nn.Module, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    size = model.default_cfg["input_size"]
    images = torch.randn(args.batch_size, *size, device=args.device)
    return images, torch.randint(0, 7, (args.batch_size,), device=args.device)


def count(case: Case) -> tuple[float, float]:
    """Multiply-adds of one forward, and experts per token in the sparse layers.

    The dense layers are counted by PyTorch; the experts by the routing, since a counter would count
    rows that are allocated and not computed.
    """
    dense = timm.create_model(case.model.default_cfg["architecture"], num_classes=7)
    dense = dense.to(case.images.device).train()  # not compiled, so that it can be looked into
    with FlopCounterMode(display=False) as counter:
        replace(case, model=dense).losses()
    total = counter.get_total_flops() / 2
    layers = moe_layers(case.model)
    if not layers:
        return total, 1.0
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


if __name__ == "__main__":
    sys.exit(main())
