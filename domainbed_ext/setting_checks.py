"""Whether the runs that a table averages are repetitions of one setting.

Random draws of hyper-parameters differ from trial to trial, as they should; default
hyper-parameters, the number of steps and what `--hparams` changed do not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from domainbed_ext.datasets import get_dataset_class
from domainbed_ext.errors import UsageError
from domainbed_ext.records import Record
from domainbed_ext.train_args import SHARED

# Named after the run: its length, which "steps" says, and the run of the same trial it learns from.
_OF_THE_RUN = ("schedule_steps", "distill_teacher")
_MOST_NAMED = 4


def refuse_other_settings(records: Sequence[Record]) -> None:
    """Raises a UsageError when runs of one algorithm on one data set differ in what trials have in
    common.

    What a record does not say (DomainBed's say less, older ones too) is compared with nothing. Runs
    without a test domain stand in no average with others and may be of another setting.
    """
    seen: dict[tuple[str, str, bool], dict[str, tuple[Any, Record]]] = {}
    looked_at = set()
    for record in records:
        args = record["args"]
        job = tuple(
            str(args.get(name))
            for name in ("dataset", "algorithm", "test_envs", "trial_seed", "hparams_seed", "steps")
        )
        if job in looked_at:
            continue
        looked_at.add(job)
        scope = (args["dataset"], args["algorithm"], bool(args["test_envs"]))
        before = seen.setdefault(scope, {})
        settings = _settings(record)
        differing = [
            name for name, value in settings.items() if name in before and before[name][0] != value
        ]
        if differing:
            _refuse(record, settings, {name: before[name] for name in differing})
        for name, value in settings.items():
            before.setdefault(name, (value, record))


def _settings(record: Record) -> dict[str, Any]:
    """What all trials have in common: by name, with the draw where it is one that they share."""
    args, hparams = record["args"], record.get("hparams") or {}
    settings = {"steps": _num_steps(args)} if "steps" in args else {}
    seed = args["hparams_seed"]
    if seed == 0 or args.get("hparams_per_trial") == SHARED:
        draw = f" of draw {seed}" if seed else ""
        settings |= {f"{name}{draw}": value for name, value in hparams.items() if _is_common(name)}
    elif "hparams" in args:
        # What was changed in a draw cannot be told from what was drawn.
        changed = {name: value for name, value in _changed(args).items() if _is_common(name)}
        settings["--hparams"] = json.dumps(changed, sort_keys=True)
    return settings


def _is_common(hparam: str) -> bool:
    return hparam not in _OF_THE_RUN


def _num_steps(args: Mapping[str, Any]) -> Any:
    if args["steps"] is not None:
        return args["steps"]
    try:
        return get_dataset_class(args["dataset"]).N_STEPS
    except UsageError:  # somebody else's data set, or a folder that is not here
        return "the data set's"


def _changed(args: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return dict(json.loads(args["hparams"] or "{}"))
    except (TypeError, ValueError):
        return {"?": str(args["hparams"])}


def _refuse(
    record: Record, settings: Mapping[str, Any], before: Mapping[str, tuple[Any, Record]]
) -> None:
    args = record["args"]
    named = [f"{name} {value} and {settings[name]}" for name, (value, _) in before.items()]
    more = f" and {len(named) - _MOST_NAMED} more" if len(named) > _MOST_NAMED else ""
    first = next(iter(before.values()))[1]
    folders = " and ".join(str(r["args"].get("output_dir", "?")) for r in (first, record))
    raise UsageError(
        f"runs of {args['algorithm']} on {args['dataset']} differ in settings, so that they are no "
        f"trials of one: {', '.join(named[:_MOST_NAMED])}{more}, in {folders}; collect them from "
        "separate folders, or pass --allow-mixed"
    )
