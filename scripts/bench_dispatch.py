"""Time one sparse layer against the dense feed-forward network it replaces.

Every back end computes the same plans on the same tokens, forward and backward. First each is
compared with a dense reference in float32, values and all gradients; one that disagrees gets no
time. So are other libraries' kernels, where they are installed: Tutel's around our experts,
ScatterMoE's, and MegaBlocks's, whose experts have no biases. The ratio is time per expert-token
over the dense network's time per token, measured in the same round: 1.00 means that routing,
copying and combining cost nothing.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarking import (
    NOT_APPLICABLE,
    Clock,
    add_flags,
    median_ms,
    parse,
    peak_megabytes,
    ratios,
    report,
    time_interleaved,
)
from other_experts import (
    OTHERS,
    WITHOUT_BIASES,
    NotExpressibleError,
    ids_and_weights,
    num_experts_of_every_token,
)

from gmoe_ltdr import MoE, TailRule, collect_routing, preset
from gmoe_ltdr.dispatch import create_dispatcher
from gmoe_ltdr.engines import use_expert_backend
from gmoe_ltdr.expert_backends import EXPERT_BACKENDS
from gmoe_ltdr.routing import Routing

# relative error of values and gradients allowed, by the type of the products
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2, "fp16": 5e-3}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COLUMNS = ["backend", "plan", "router", "experts_per_token", "ms_forward", "ms_backward"]
COLUMNS += ["ratio", "ratio_best", "peak_mb", "error"]


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    torch.manual_seed(0)
    device = args.device
    num_tokens = args.images * args.tokens
    x = torch.randn(args.images, args.tokens, args.dim, device=device)
    grad = torch.randn_like(x)
    ffn = nn.Sequential(
        nn.Linear(args.dim, args.hidden_dim), nn.GELU(), nn.Linear(args.hidden_dim, args.dim)
    ).to(device)

    cases: dict[str, Callable[[], tuple[float, ...]]] = {}
    rows: dict[str, dict] = {}
    unsaid: list[dict] = []
    failed = False
    cases["dense"] = timed(ffn, x, grad, ffn, args)
    rows["dense"] = {"backend": "ffn", "plan": "dense", "router": False, "experts_per_token": 1}
    for plan, bias in [(p, b) for p in args.plans for b in (True, False)]:
        backends = [b for b in args.backends if (b not in WITHOUT_BIASES) == bias]
        if not backends:
            continue
        layer = make_layer(plan, args, bias=bias)
        with collect_routing(layer) as collected:
            layer(x)
        routing = collected[""]
        expected = functools.partial(oracle, layer=layer, routing=routing)
        reference = gradients(expected, x, grad, layer, routing)
        for backend in backends:
            row = {"backend": backend, "plan": plan}
            try:
                without_router, whole = runs(layer, backend, routing)
                with autocast(args):
                    found = gradients(without_router, x, grad, layer, routing)
            except NotExpressibleError as error:
                print(f"{backend}, {plan}: {error}")
                unsaid.append({**row, "ratio": NOT_APPLICABLE})
                continue
            except (ValueError, ImportError, RuntimeError, AssertionError) as error:
                print(f"{backend}, {plan}: left out ({(str(error).splitlines() or ['?'])[0]})")
                continue
            error = max(relative_error(a, b) for a, b in zip(found, reference, strict=True))
            if not error < TOLERANCE[args.dtype]:
                print(f"{backend}, {plan}: WRONG, relative error {error:.1e}; not timed")
                failed = True
                continue
            row |= {"error": f"{error:.0e}"}
            row["experts_per_token"] = round(routing.num_assignments / num_tokens, 3)
            weights = routing.combine_weights_TE.detach()
            run = functools.partial(without_router, weights_TE=weights)
            for router, function in ((False, run), (True, whole)):
                name = f"{backend} {plan}{' router' if router else ''}"
                cases[name] = timed(function, x, grad, layer, args)
                rows[name] = {**row, "router": router}

    times = time_interleaved(cases, rounds=args.rounds, warmup=args.warmup)
    results = []
    for name, row in rows.items():
        ratio = [r / row["experts_per_token"] for r in ratios(times[name], times["dense"])]
        best = min(map(sum, times[name])) / min(map(sum, times["dense"]))
        results.append(
            {
                **row,
                "ms_forward": f"{median_ms(times[name], 0):.3f}",
                "ms_backward": f"{median_ms(times[name], 1):.3f}",
                "ratio": f"{statistics.median(ratio):.3f}",
                "ratio_best": f"{best / row['experts_per_token']:.3f}",
                "peak_mb": peak_megabytes(cases[name]) if device == "cuda" else "",
                "dtype": args.dtype,
                "T": num_tokens,
                "D": args.dim,
                "F": args.hidden_dim,
                "E": args.experts,
            }
        )
    report([*results, *unsaid], COLUMNS, args, script="bench_dispatch")
    return 1 if failed else 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  python scripts/bench_dispatch.py                       ViT-S/16 sizes on this CPU\n"
        "  python scripts/bench_dispatch.py --device cuda --dtype bf16 --images 96\n"
        "  python scripts/bench_dispatch.py --plans top2 --backends blocked loop --no-csv\n",
    )
    add_flags(parser, repeated="runs")
    add = parser.add_argument
    add("--dtype", choices=tuple(DTYPES), default="fp32",
        help="type of the matrix products, by autocast (default: fp32)")  # fmt: skip
    add("--backends", nargs="+", default=None,
        choices=("auto", *EXPERT_BACKENDS, "tutel", *OTHERS),
        help="default: blocked loop on a CPU, all on a GPU; those of other libraries where they "
        "are installed")  # fmt: skip
    add("--plans", nargs="+", default=["top1", "top2", "ltdr"], choices=("top1", "top2", "ltdr"),
        help="ltdr: two experts, and all of them for 30%% of the tokens")  # fmt: skip
    add("--images", type=int, default=32, help="images in the batch (default: 32)")
    add("--tokens", type=int, default=197, help="tokens per image (default: 197)")
    add("--dim", type=int, default=384, help="model width (default: 384, ViT-S)")
    add("--hidden-dim", type=int, default=1536, help="expert width (default: 1536)")
    add("--experts", type=int, default=6, help="number of experts (default: 6)")
    args = parse(parser, argv)
    on_gpu = ["triton", "grouped", "dense", "loop", "tutel", *OTHERS]
    args.backends = args.backends or (["blocked", "loop"] if args.device == "cpu" else on_gpu)
    return args


def make_layer(plan: str, args: argparse.Namespace, *, bias: bool) -> MoE:
    options = {
        "top1": {"top_k": 1, "tail_top_k": 1},
        "top2": {"top_k": 2, "tail_top_k": 2},
        "ltdr": {"top_k": 2, "tail_rule": TailRule(kind="quantile", value=0.3)},
    }[plan]
    # no noise and no dropout: every run computes the same plan
    spec = preset("ltdr", num_experts=args.experts, noise_std=0.0, expert_dropout=0.0, **options)
    torch.manual_seed(1)
    return MoE(args.dim, args.hidden_dim, spec, bias=(bias, bias)).to(args.device)


def runs(layer: MoE, backend: str, routing: Routing) -> tuple[Callable, Callable]:
    """The layer without its router, a function of tokens and combine weights; and with it, a
    function of tokens."""
    if backend in OTHERS:
        return runs_of_others(layer, backend, routing)
    choose(layer, backend)

    def without_router(x: Tensor, weights_TE: Tensor) -> Tensor:
        choose(layer, backend)  # all of a plan's cases share one layer
        plan = Routing(**{**vars(routing), "combine_weights_TE": weights_TE})
        dispatched = layer.dispatcher.dispatch(x.flatten(0, -2), plan)
        rows = layer.experts(dispatched.tokens_ND, dispatched.tokens_per_expert_e)
        return layer.dispatcher.combine(rows, dispatched).view_as(x)

    def whole(x: Tensor) -> Tensor:
        choose(layer, backend)
        return layer(x)

    return without_router, whole


def runs_of_others(layer: MoE, backend: str, routing: Routing) -> tuple[Callable, Callable]:
    k = num_experts_of_every_token(routing)
    compute = OTHERS[backend]()
    ids_TK, _ = ids_and_weights(routing.dispatch_mask_TE, routing.combine_weights_TE, k)

    def without_router(x: Tensor, weights_TE: Tensor) -> Tensor:
        weights_TK = weights_TE.gather(1, ids_TK)
        return compute(layer.experts, x.flatten(0, -2), ids_TK, weights_TK).view_as(x)

    def whole(x: Tensor) -> Tensor:
        tokens_TD = x.flatten(0, -2)
        plan = layer.router(tokens_TD, layer.context_of(x))
        chosen = ids_and_weights(plan.dispatch_mask_TE, plan.combine_weights_TE, k)
        return compute(layer.experts, tokens_TD, *chosen).view_as(x)

    return without_router, whole


def choose(layer: MoE, backend: str) -> None:
    use_expert_backend(layer, "auto")
    if backend == "tutel":
        layer.dispatcher = create_dispatcher("tutel", num_experts=layer.spec.num_experts)
    else:
        layer.dispatcher = create_dispatcher("local")
        use_expert_backend(layer, backend)


def oracle(x: Tensor, weights_TE: Tensor, layer: MoE, routing: Routing) -> Tensor:
    """Every expert on every token, in float32; the mask and the weights do the rest."""
    tokens_TD, experts = x.flatten(0, -2), layer.experts
    weights_TE = weights_TE * routing.dispatch_mask_TE
    out_TD = torch.zeros_like(tokens_TD)
    fc1_bias, fc2_bias = ([None] * experts.num_experts if b is None else b
                          for b in (experts.fc1_bias, experts.fc2_bias))  # fmt: skip
    for e in range(experts.num_experts):
        hidden_TF = F.gelu(F.linear(tokens_TD, experts.fc1_weight[e], fc1_bias[e]))
        expert_TD = F.linear(hidden_TF, experts.fc2_weight[e], fc2_bias[e])
        out_TD = out_TD + weights_TE[:, e : e + 1] * expert_TD
    return out_TD.view_as(x)


def gradients(
    compute: Callable, x: Tensor, grad: Tensor, layer: MoE, routing: Routing
) -> list[Tensor]:
    """Output, and gradients of tokens, combine weights and every parameter of the experts."""
    x = x.clone().requires_grad_()
    weights = routing.combine_weights_TE.detach().clone().requires_grad_()
    out = compute(x, weights)
    inputs = [x, weights, *layer.experts.parameters()]
    found = torch.autograd.grad(out, inputs, grad.to(out.dtype))
    mask = routing.dispatch_mask_TE  # outside the plan a weight's gradient means nothing
    return [out.detach(), found[0], found[1] * mask, *found[2:]]


def relative_error(found: Tensor, reference: Tensor) -> float:
    found, reference = found.double(), reference.double()
    return ((found - reference).norm() / reference.norm().clamp(min=1e-30)).item()


def autocast(args: argparse.Namespace):
    return torch.autocast(args.device, dtype=DTYPES[args.dtype], enabled=args.dtype != "fp32")


def timed(
    run: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor, module: nn.Module, args
) -> Callable[[], tuple[float, float]]:
    """Seconds of one forward and one backward, means over `--repeat` runs."""

    def measure() -> tuple[float, float]:
        forward = backward = 0.0
        clock = Clock(args.device, args.clock)
        leaf = x.clone().requires_grad_()
        for _ in range(args.repeat):
            clock.lap()
            with autocast(args):
                out = run(leaf)
            forward += clock.lap()
            out.backward(grad.to(out.dtype))
            backward += clock.lap()
            leaf.grad = None
            module.zero_grad(set_to_none=True)
        return forward / args.repeat, backward / args.repeat

    return measure


if __name__ == "__main__":
    sys.exit(main())
