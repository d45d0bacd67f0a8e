"""The `ltdr` command: one name for the scripts, and a check of the machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

# Command: (module with the main function, one line).
COMMANDS = {
    "train": ("domainbed_ext.scripts.train", "train one algorithm on one data set"),
    "distill": ("domainbed_ext.scripts.distill", "train the dense twin of a finished sparse run"),
    "sweep": ("domainbed_ext.scripts.sweep", "run many training jobs; stop and go on at any time"),
    "collect": ("domainbed_ext.scripts.collect_results", "make tables of a sweep's results"),
    "top": ("domainbed_ext.scripts.list_top_hparams", "list a sweep's best hyper-parameters"),
    "plot": ("domainbed_ext.scripts.plot", "draw learning curves of runs and sweeps"),
    "inspect": ("domainbed_ext.scripts.inspect_routing", "see what a model's routers do"),
    "download": ("domainbed_ext.scripts.download", "fetch data sets and check them"),
    "data": ("domainbed_ext.scripts.data_check", "check images: unreadable, counts, duplicates"),
    "vlm": ("gmoe_ltdr.vlm.cli", "sparse vision-language models: convert, upcycle, demo"),
    "doctor": ("domainbed_ext.doctor", "say what this machine has, and how to get the rest"),
}

HELP = """\
usage: ltdr COMMAND [options]

Sparse mixture-of-experts vision transformers with long-tailed distribution-aware routing, measured
by DomainBed's protocol.

commands:
{commands}

`ltdr COMMAND --help` explains a command and shows examples; `ltdr --version` prints the version.

a first sweep, on data that needs no download:
  ltdr sweep --algorithms ERM_ViT GMOE LTDR --datasets RotatedDigits --n_hparams 1 --n_trials 1 \\
      --single_test_envs --test_envs 0 --steps 200
  ltdr collect --input_dir sweep_output

the same commands under DomainBed's names:
  python -m domainbed.scripts.{{train,sweep,collect_results,download,list_top_hparams}}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Hands over to a command. Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "help"):
        lines = (f"  {command:9} {text}" for command, (_, text) in COMMANDS.items())
        print(HELP.format(commands="\n".join(lines)), end="")
        return 0
    if name == "--version":
        from domainbed_ext.provenance import code_version

        print(f"ltdr {code_version()}")
        return 0
    if name not in COMMANDS:
        print(
            f"error: unknown command {name!r}; choose among {', '.join(COMMANDS)}", file=sys.stderr
        )
        return 2
    command: Callable[..., Any] = import_module(COMMANDS[name][0]).main
    try:
        return command(arguments[1:], prog=f"ltdr {name}") or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # `ltdr doctor | head` has seen enough; Python must not try to flush what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
