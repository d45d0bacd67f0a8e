"""Trains the dense twin of a finished sparse run: `ltdr distill`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from domainbed_ext.datasets import get_dataset_class
from domainbed_ext.errors import UsageError
from domainbed_ext.exit_status import EXIT_USAGE
from domainbed_ext.hparams import hparam_names, parse_hparams
from domainbed_ext.router_hparams import ROUTER_HPARAMS
from domainbed_ext.scripts import train
from domainbed_ext.train_args import TrainArgs
from domainbed_ext.train_checks import run_hparams

# What the teacher's run has decided: flags of `train` that would make it another experiment.
FROM_TEACHER = (
    *("algorithm", "dataset", "test_envs", "task", "hparams_seed", "trial_seed", "seed"),
    *("holdout_fraction", "uda_holdout_fraction", "hparams_per_trial"),
)

# And these it has merely chosen.
_TAKEN_OVER = ("data_dir", "steps", "checkpoint_freq")

DESCRIPTION = """\
Train a dense ViT on a finished sparse run: the same backbone, data, splits, seeds and
hyper-parameters, with cross-entropy plus a distillation loss (BCKD) towards the sparse model. The
run is an ordinary one of the algorithm DISTILL: it can be stopped and gone on with, has records and
tables, and its model is the dense student alone.
"""
EXAMPLES = """\
examples:
  ltdr distill --teacher sweep_output/0123456789abcdef0123456789abcdef --output_dir distilled/first

  all LTDR runs of a sweep, then a table:
    for run in $(grep -l '"algorithm": "LTDR"' sweep_output/*/model.json); do
      ltdr distill --teacher "$(dirname $run)" --output_dir distilled/"$(basename $(dirname $run))"
    done
    ltdr collect --input_dir distilled

  with a weight of its own, and further flags of `ltdr train`:
    ltdr distill --teacher RUN --output_dir OUT --hparams '{"distill_weight": 2.0}' --device cuda

hparams of its own: distill_weight (1.0), distill_beta (1.0), distill_logits ("ovr" or "raw"),
distill_detach_weight (false); the others are the teacher's unless changed.
"""


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line; flags of `train` that are not here are passed on."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s --teacher RUN --output_dir DIR [--hparams JSON] [flags of train]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--teacher", required=True, metavar="RUN", help="folder of the finished sparse run"
    )
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="of the new run")
    parser.add_argument(
        "--hparams",
        metavar="JSON",
        help="""hyper-parameters to change: '{"distill_weight": 2.0}'""",
    )
    return parser


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """The command line. Returns the exit status."""
    args, passed_on = build_parser(prog).parse_known_args(argv)
    try:
        decided = [
            flag for flag in passed_on if flag.split("=")[0].removeprefix("--") in FROM_TEACHER
        ]
        if decided:
            raise UsageError(
                f"{decided[0]} is the teacher's to say; `ltdr train --algorithm DISTILL` takes it, "
                "with the hparam distill_teacher"
            )
        run = student_args(Path(args.teacher), args.output_dir, args.hparams)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return train.main([*run.command_line(), *passed_on], prog=prog)


def student_args(teacher: Path, output_dir: str, hparams: str | None) -> TrainArgs:
    """The run that distills a teacher.

    Args:
        teacher: Folder of a finished run.
        output_dir: Of the new run.
        hparams: What to change, as JSON.
    """
    from domainbed_ext.saved_models import read_model_info

    info = read_model_info(teacher)
    run = info["args"]
    kept = {name: run[name] for name in (*FROM_TEACHER, *_TAKEN_OVER) if name in run}
    args = TrainArgs(**{**kept, "algorithm": "DISTILL", "output_dir": output_dir})
    names = hparam_names("DISTILL", args.dataset)
    wanted: dict[str, Any] = {
        # a random draw of the teacher's seeds is of no interest here
        **{h.name: h.default for h in ROUTER_HPARAMS["DISTILL"]()},
        **{name: value for name, value in info["model_hparams"].items() if name in names},
        "distill_teacher": str(teacher.resolve()),
    }
    if wanted["schedule_steps"] == (args.steps or get_dataset_class(args.dataset).N_STEPS):
        wanted["schedule_steps"] = 0  # the run's, whatever its number of steps is
    wanted |= parse_hparams(hparams, "DISTILL", args.dataset)
    plain = run_hparams(args)
    changes = {n: value for n, value in wanted.items() if n not in plain or plain[n] != value}
    return replace(args, hparams=json.dumps(changes))


if __name__ == "__main__":
    sys.exit(main())
