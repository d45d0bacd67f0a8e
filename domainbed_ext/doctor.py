"""`ltdr doctor`: what this machine has, what it lacks, and the exact command to get it."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from domainbed_ext.datasets import DATASETS, DEFAULT_DATA_DIR, find_datasets
from domainbed_ext.hparams import VIT_ALGORITHMS
from domainbed_ext.provenance import code_version, installed_version
from domainbed_ext.upstream import is_switched_off

# Tutel's setup imports torch, and it is not on PyPI: hence two steps.
TUTEL_STEPS = (
    "pip install setuptools wheel ninja, then pip install --no-build-isolation "
    "git+https://github.com/microsoft/tutel@main (without CUDA: NO_CUDA=1 in front)"
)
# Extra: the modules that it brings, and the distributions they come in. Only those in use here.
EXTRAS = {
    "emoji": {"resvg_py": "resvg-py"},
    "plots": {"matplotlib": "matplotlib"},
    "tracking": {"wandb": "wandb"},
    "export": {"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"},
    "vlm": {"transformers": "transformers", "accelerate": "accelerate"},
    "slurm": {"submitit": "submitit"},
    "ray": {"ray": "ray"},
    "test": {"pytest": "pytest", "xdist": "pytest-xdist", "hypothesis": "hypothesis"},
}
# What DomainBed imports and this package does not: wilds with all it asks for would bring ten more.
CHECKOUT_NEEDS = {"wilds": "wilds", "pytz": "pytz", "tqdm": "tqdm"}
_COLORS = {"ok": "green", "missing": "red", "optional": "yellow", "none": "dim"}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: What was looked for.
        status: "ok", "missing" (needed), "optional" (not there, not needed) or "none".
        detail: Version or place.
        remedy: The command that gets it.
    """

    name: str
    status: str
    detail: str
    remedy: str = ""


def examine(data_dir: str = DEFAULT_DATA_DIR) -> list[Finding]:
    """Everything the report says."""
    findings = [Finding("Python", "ok", f"{platform.python_version()}, {sys.executable}")]
    findings.append(Finding("gmoe-ltdr", "ok", code_version()))
    findings += _torch()
    numeric = ("numpy", "pandas", "scikit-learn")
    for name in ("torchvision", "timm", *numeric, "safetensors", "tensorboard"):
        findings.append(_distribution(name))
    findings.append(_tutel())
    findings.append(_domainbed())
    findings += _extras()
    findings += _data(data_dir)
    return findings


def _torch() -> Iterator[Finding]:
    found = _distribution("torch")
    yield found
    if found.status != "ok":
        return
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            memory = properties.total_memory / 2**30
            yield Finding(f"device {number}", "ok", f"{properties.name}, {memory:.0f} GiB")
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        threads = torch.get_num_threads()
        built = (
            f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
        )
        yield Finding("device", "ok", f"cpu, {threads} threads (no CUDA device; {built})")
        capability = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "unknown")()
        bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        yield Finding("CPU kernels", "ok", capability)
    detail = "supported" if bf16 else 'no hardware support: stay with "precision": "fp32"'
    yield Finding("bfloat16", "ok" if bf16 else "none", detail)


def _distribution(name: str) -> Finding:
    number = installed_version(name)
    if number is None:
        return Finding(name, "missing", "not installed", f"pip install {name}")
    return Finding(name, "ok", number)


def _tutel() -> Finding:
    if find_spec("tutel") is None:
        detail = "not installed; only the dispatcher of that name needs it"
        return Finding("tutel", "optional", detail, TUTEL_STEPS)
    try:
        import tutel.moe  # noqa: F401
    except Exception as error:  # a build that does not fit this torch fails in many ways
        detail = f"installed, but does not import: {type(error).__name__}: {error}"
        return Finding("tutel", "optional", detail, TUTEL_STEPS)
    return Finding("tutel", "ok", installed_version("tutel") or "found")


def _domainbed() -> Finding:
    # The path alone, not our own finder, which would answer with the embedded implementation.
    path = [os.getcwd(), *(entry for entry in sys.path if entry)]
    spec = PathFinder.find_spec("domainbed", path)
    if spec is not None and spec.origin is not None:
        return _checkout(Path(spec.origin).parent)
    if _hook_is_active():
        return Finding("domainbed", "ok", "embedded; `python -m domainbed.scripts.*` works")
    detail = "embedded, as `python -m domainbed_ext.scripts.*` (the start-up hook is off)"
    return Finding("domainbed", "ok", detail)


def _checkout(package: Path) -> Finding:
    """What is added to a checkout, or why nothing is."""
    from domainbed_ext.upstream_additions import DIGITS, lacking_names

    where = f"the checkout at {package}"
    if not _hook_is_active():
        if is_switched_off():
            return Finding("domainbed", "ok", f"{where}, nothing added: DOMAINBED_EXT is off")
        detail = f"{where}, nothing added: the start-up line is not installed or did not run"
        remedy = "pip install gmoe-ltdr into this Python, and start it without -S"
        return Finding("domainbed", "optional", detail, remedy)
    lacking = lacking_names(package)
    if lacking:
        detail = f"{where}, a version that is not known (no {', '.join(lacking)}): not all is added"
        return Finding("domainbed", "optional", detail, "python -m domainbed_ext.scripts.sweep")
    added = ", ".join([*VIT_ALGORITHMS, *DIGITS, "ltdr_local", "ltdr_slurm"])
    detail = f"{where}, with {added} added by the start-up line"
    missing = [name for module, name in CHECKOUT_NEEDS.items() if find_spec(module) is None]
    if missing:
        remedy = f"pip install --no-deps {' '.join(missing)}"
        return Finding("domainbed", "optional", f"{detail}; lacks {', '.join(missing)}", remedy)
    return Finding("domainbed", "ok", detail)


def _hook_is_active() -> bool:
    # Imported at start-up or not at all; importing it here would switch it on.
    startup = sys.modules.get("domainbed_ext._startup")
    return (
        startup is not None and startup.DomainBedFinder in sys.meta_path and not is_switched_off()
    )


def _extras() -> Iterator[Finding]:
    for extra, modules in EXTRAS.items():
        missing = [name for module, name in modules.items() if find_spec(module) is None]
        if missing:
            detail = f"without {', '.join(missing)}"
            remedy = f"pip install {' '.join(missing)}"
            yield Finding(f"extra [{extra}]", "optional", detail, remedy)
        else:
            yield Finding(f"extra [{extra}]", "ok", ", ".join(modules.values()))


def _data(data_dir: str) -> Iterator[Finding]:
    found = find_datasets(data_dir)
    for item in found:
        where = "embedded" if item.path is None else str(item.path)
        status = "missing" if item.num_images == 0 else "ok"
        problem = f"; {item.problem}" if item.problem else ""
        yield Finding(item.name, status, f"{item.num_images} images, {where}{problem}")
    for name in DATASETS:
        if name not in {item.name for item in found}:
            remedy = f"ltdr download {name} --data_dir {data_dir}"
            yield Finding(name, "none", f"not in {data_dir}", remedy)


def print_report(findings: Sequence[Finding], console: Console) -> None:
    """The findings as a table on a terminal, as lines elsewhere."""
    if not console.is_terminal:
        for item in findings:
            remedy = f"  -> {item.remedy}" if item.remedy else ""
            print(f"{item.name:18} {item.status:9} {item.detail}{remedy}")
        return
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in ("", "", "found", "to get it"):
        table.add_column(column, overflow="fold")
    for item in findings:
        color = _COLORS[item.status]
        table.add_row(item.name, f"[{color}]{item.status}[/]", item.detail, item.remedy)
    console.print(table)


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """The command line. Exit status 1 when something that is needed is missing."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Say what this machine has for training, and the command that gets the rest.",
        epilog="example: ltdr doctor --data_dir /path/to/data",
    )
    parser.add_argument("--data_dir", default=DEFAULT_DATA_DIR, help="default: %(default)s")
    findings = examine(parser.parse_args(argv).data_dir)
    print_report(findings, Console())
    return 1 if any(item.status == "missing" for item in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
