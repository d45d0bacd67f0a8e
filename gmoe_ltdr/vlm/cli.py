"""`ltdr vlm`: sparse vision-language models from the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gmoe_ltdr.spec import MoESpec
    from gmoe_ltdr.stats import RoutingStats

EXIT_OK, EXIT_USAGE = 0, 2
DESCRIPTION = "Sparse vision-language models: make them, look at them, see one learn."
EXAMPLES = """\
examples:
  a MoE-LLaVA checkpoint for transformers, routed as it was trained:
    ltdr vlm convert MoE-LLaVA-Phi2-2.7B-4e converted --tokenizer MoE-LLaVA-Phi2-2.7B-4e

  a Hugging Face LLaVA made sparse, to be trained with LTDR:
    ltdr vlm upcycle llava-1.5-7b sparse --preset ltdr --experts 4 --top_k 2 --layers sparse

  what is in a folder:
    ltdr vlm inspect sparse

  a tiny LLaVA from scratch, dense, top-2 and LTDR side by side, on a CPU in minutes:
    ltdr vlm demo
"""
# MoE-LLaVA's names of which layers are sparse
LAYERS = ("sparse", "first_half", "second_half", "dense")
# By the beginning of a model type that cannot be made sparse
_UPCYCLE_REMEDIES = {
    "ltdr": "it is sparse already: train it, look at it (ltdr vlm inspect), or give the dense one",
    "moe": "it is sparse already: use ltdr vlm convert",
}


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    convert = commands.add_parser("convert", help="a MoE-LLaVA checkpoint for transformers")
    convert.add_argument("source", help="folder with config.json and weights")
    convert.add_argument("folder", help="where to write")
    convert.add_argument(
        "--vision_tower", "--vision-tower", help="folder of the CLIP, where it is needed"
    )
    convert.add_argument("--tokenizer", help="folder of the tokenizer; brings a processor along")
    convert.add_argument(
        "--preset", default="baseline", help="router; baseline is MoE-LLaVA's (%(default)s)"
    )
    convert.add_argument(
        "--verify", action="store_true", help="load the result and run it once (takes memory)"
    )

    upcycle = commands.add_parser("upcycle", help="make a Hugging Face LLaVA sparse")
    upcycle.add_argument("source", help="folder of the dense LLaVA")
    upcycle.add_argument("folder", help="where to write")
    upcycle.add_argument("--preset", default="ltdr", help="router (%(default)s)")
    upcycle.add_argument(
        "--experts", type=int, help="per sparse layer (the preset's: 4 where it names no number)"
    )
    upcycle.add_argument(
        "--top_k", "--top-k", type=int, help="experts per token (the preset's; ltdr, baseline: 2)"
    )
    upcycle.add_argument(
        "--layers", nargs="+", metavar="LAYER",
        help=f"{', '.join(LAYERS)}, or numbers (the preset's: sparse, every other one)",
    )  # fmt: skip
    upcycle.add_argument("--seed", type=int, default=0, help="of the gates (%(default)s)")

    inspect = commands.add_parser("inspect", help="say what a folder holds")
    inspect.add_argument("folder", help="written by convert, upcycle or save_pretrained")

    demo = commands.add_parser("demo", help="train a tiny LLaVA from scratch")
    demo.add_argument(
        "--steps", type=int, default=900,
        help="of the dense model; every variant takes a third more (%(default)s)",
    )  # fmt: skip
    demo.add_argument("--seeds", type=int, default=3, help="of each variant (%(default)s)")
    demo.add_argument("--folder", help="write the LTDR model, statistics and figures there")
    return parser


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit status; bad input is one line on stderr."""
    args = build_parser(prog).parse_args(argv)
    run = {"convert": _convert, "upcycle": _upcycle, "inspect": _inspect, "demo": _demo}
    try:
        run[args.command](args)
    except (ValueError, TypeError, NotImplementedError, ImportError, OSError) as error:
        print(f"error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return EXIT_USAGE
    return EXIT_OK


def _convert(args: argparse.Namespace) -> None:
    from gmoe_ltdr.vlm.moe_llava_checkpoint import from_moe_llava

    folder = from_moe_llava(
        args.source,
        args.folder,
        preset=args.preset,
        vision_tower=args.vision_tower,
        tokenizer=args.tokenizer,
    )
    print(f"wrote {folder}")
    if args.preset not in ("baseline", "dar"):
        print(
            f"note: preset {args.preset!r} routes otherwise than this checkpoint was trained with, "
            "which changes its outputs; train it further"
        )
    if args.verify:
        print(_run_once(folder))


def _run_once(folder: Path) -> str:
    """Loads a model and lets it see one random picture."""
    import torch

    from gmoe_ltdr.collect import collect_routing
    from gmoe_ltdr.vlm.transformers import LTDRLlavaForConditionalGeneration

    model = LTDRLlavaForConditionalGeneration.from_pretrained(folder).eval()
    config = model.config
    side = config.vision_config.image_size
    ids = torch.tensor([[1, *[config.image_token_id] * config.image_seq_length, 2, 3]])
    pixels = torch.randn(1, 3, side, side, dtype=model.dtype)
    with torch.no_grad(), collect_routing(model) as routings:
        logits = model(input_ids=ids, pixel_values=pixels).logits
    if not torch.isfinite(logits).all():
        raise ValueError(f"{folder}: the converted model's logits are not finite")
    return f"verified: {len(routings)} sparse layers, logits {tuple(logits.shape)} finite"


def _upcycle(args: argparse.Namespace) -> None:
    import torch

    try:
        from transformers import AutoProcessor
    except ImportError as error:
        raise ImportError(
            f"upcycle needs transformers ({error}): pip install 'gmoe-ltdr[vlm]'"
        ) from error
    from gmoe_ltdr.vlm.checkpoint_files import needed, read_config_json, refuse_same_folder
    from gmoe_ltdr.vlm.decoder import vlm_preset
    from gmoe_ltdr.vlm.transformers import upcycle_llava

    of = f"the config.json of {args.source}"
    config = read_config_json(args.source)
    kind = str(needed(config, "model_type", of=of))
    if kind != "llava":
        remedy = _UPCYCLE_REMEDIES.get(kind.partition("_")[0], "give the folder of a dense one")
        raise ValueError(f"{args.source} has model_type {kind!r} and not 'llava'; {remedy}")
    refuse_same_folder(args.source, args.folder)
    given = {"num_experts": args.experts, "top_k": args.top_k}
    given = {name: value for name, value in given.items() if value is not None}
    spec = vlm_preset(args.preset, **given)
    model = _load_dense(args.source)
    if args.layers is not None:
        depth = len(model.model.language_model.layers)
        spec = replace(spec, layers=layer_indices(args.layers, depth))
    torch.manual_seed(args.seed)
    upcycle_llava(model, spec).save_pretrained(args.folder)
    if (Path(args.source) / "processor_config.json").is_file():
        AutoProcessor.from_pretrained(args.source).save_pretrained(args.folder)
    print(f"wrote {args.folder}: {_routing_in_words(spec)}")


def _load_dense(folder: str) -> Any:
    from safetensors import SafetensorError
    from transformers import LlavaForConditionalGeneration

    try:
        return LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto")
    except SafetensorError as error:
        raise ValueError(
            f"{folder}: a weight file is cut off or damaged ({error}); copy or download it again"
        ) from error


def layer_indices(names: Sequence[str], depth: int) -> tuple[int, ...]:
    """MoE-LLaVA's names of layers, or their numbers.

    Raises:
        ValueError: Neither.
    """
    named = {
        "sparse": range(0, depth, 2),
        "first_half": range(depth // 2),
        "second_half": range(depth // 2, depth),
        "dense": range(depth),
    }
    if len(names) == 1 and names[0] in named:
        return tuple(named[names[0]])
    try:
        return tuple(int(name) for name in names)
    except ValueError:
        raise ValueError(
            f"--layers {' '.join(names)}: give one of {', '.join(LAYERS)}, or numbers"
        ) from None


def _inspect(args: argparse.Namespace) -> None:
    from gmoe_ltdr.spec import MoESpec
    from gmoe_ltdr.vlm.checkpoint_files import needed, read_config_json, tensor_sizes

    config, of = read_config_json(args.folder), f"the config.json of {args.folder}"
    kind = config.get("model_type")
    if kind != "ltdr_llava":
        remedy = "ltdr vlm convert" if str(kind).startswith("moe_llava") else "ltdr vlm upcycle"
        raise ValueError(f"{args.folder} has model_type {kind!r}; use {remedy} first")
    spec = MoESpec.from_dict(needed(config, "moe_spec", of=of))
    text = needed(config, "text_config", of=of)
    family, depth, width = (
        needed(text, name, of=f"text_config in {of}")
        for name in ("model_type", "num_hidden_layers", "hidden_size")
    )
    sizes = tensor_sizes(Path(args.folder))
    in_experts = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
    total = sum(sizes.values())
    print(f"text model    {family}, {depth} layers, width {width}")
    print(f"sparse layers {' '.join(map(str, spec.block_indices(depth)))}")
    print(f"router        {_routing_in_words(spec)}")
    tail = f"{spec.resolved_tail_top_k} experts" if spec.activates_tail else "as others"
    print(f"tail tokens   {tail}")
    balanced = ", ".join(sorted(m.name.lower() for m in spec.balanced_modalities))
    print(f"balanced      {'nothing' if spec.balance == 'none' else balanced}")
    used = "how many a token uses, its router decides"
    if _takes_top_k(spec):
        idle = in_experts * (1 - spec.top_k / spec.num_experts)
        used = f"{round(total - idle):,} used by a token that is no tail"
    print(f"parameters    {total:,}; {used}")


def _takes_top_k(spec: MoESpec) -> bool:
    """Whether an ordinary token has `top_k` experts, whatever the token."""
    universal = spec.router == "cluster" and spec.router_options.get("universal", False)
    return spec.router not in ("dynamic", "expert_choice") and not universal


def _routing_in_words(spec: MoESpec) -> str:
    top_k = f", top-{spec.top_k}" if _takes_top_k(spec) else ""
    return f"{spec.router}, {spec.gate} gate, {spec.num_experts} experts{top_k}"


def _demo(args: argparse.Namespace) -> None:
    import json

    from gmoe_ltdr.vlm.demo import run_demo
    from gmoe_ltdr.vlm.report import routing_lines, table_lines, told_apart

    if args.steps < 3 or args.seeds < 1:
        raise ValueError(
            f"--steps {args.steps} --seeds {args.seeds}: at least 3 steps and 1 seed are needed"
        )
    start, results = run_demo(
        steps=args.steps, seeds=range(args.seeds), tell=lambda line: print(line, flush=True)
    )
    print()
    seeds = [f"seed {seed}" for seed in range(args.seeds)]
    rows = [
        [name, *(f"{a:.3f}" for a in result.accuracies), f"{result.mean:.3f}",
         f"{result.spread:.3f}" if args.seeds > 1 else "-"]
        for name, result in results.items()
    ]  # fmt: skip
    print("\n".join(table_lines(["right answers", *seeds, "mean", "spread"], rows)))
    print(f"\nBefore these steps the dense model had {start:.3f} right.")
    print(told_apart({name: result.accuracies for name, result in results.items()}))
    print("What their routers do:")
    for name, result in results.items():
        if result.stats is not None:
            print()
            print("\n".join(routing_lines(result.stats, title=name)))
    if args.folder:
        folder = Path(args.folder)
        results["LTDR"].model.save_pretrained(folder / "model")
        for name, result in results.items():
            if result.stats is not None:
                file = folder / f"routing_{name.lower()}.json"
                file.write_text(json.dumps(result.stats.to_dict()))
                _draw(result.stats, folder, name.lower())
        print(f"\nwrote {folder}")


def _draw(stats: RoutingStats, folder: Path, name: str) -> None:
    """The paper's figures, where matplotlib is installed."""
    from gmoe_ltdr.plots import plot_expert_load, plot_head_and_tail

    try:
        figures = {"load": plot_expert_load(stats), "rpv": plot_head_and_tail(stats)}
    except ImportError:
        return
    for kind, figure in figures.items():
        figure.savefig(folder / f"{kind}_{name}.png")


if __name__ == "__main__":
    sys.exit(main())
