"""Which numbers may share a table, and what to say below it: mixed records, missing runs,
unfinished jobs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from domainbed_ext.errors import UsageError
from domainbed_ext.hparams import order_algorithms
from domainbed_ext.records import JobCount, Record, of_deployed_weights, weights_of
from domainbed_ext.selection import (
    LeaveOneDomainOut,
    SelectionMethod,
    num_environments,
    test_acc_key,
)
from domainbed_ext.setting_checks import refuse_other_settings
from domainbed_ext.train_args import DRAWN, SHARED

NEEDS_EVERY_DOMAIN = "an average needs every domain"


def refuse_mixed(records: Sequence[Record]) -> None:
    """Raises a UsageError when an average would mix numbers that are not comparable.

    Records that say nothing about their origin (DomainBed's own) are taken as they are.
    """
    seen: dict[tuple[str, str, str], tuple[str, Record]] = {}
    for record in of_deployed_weights(records):
        args, provenance = record["args"], record.get("provenance") or {}
        row = f"{args['algorithm']} on {args['dataset']}"
        for key, scope in [
            ("data_fingerprint", args["dataset"]),
            ("backbone_weights", row),
            ("eval_tail_scope", row),
            ("weights", row),
        ]:
            if provenance.get(key) is not None:
                _refuse_difference(seen, (key, scope, ""), str(provenance[key]), record)
        if args.get("holdout_fraction") is not None:  # else trials would not be the same splits
            where = ("holdout_fraction", args["dataset"], "")
            _refuse_difference(seen, where, str(float(args["holdout_fraction"])), record)
        if args["hparams_seed"] != 0:  # else there is no draw
            where = ("hparams_per_trial", args["dataset"], "")
            _refuse_difference(seen, where, args.get("hparams_per_trial", DRAWN), record)
        if isinstance(record.get("hparams"), dict):
            job = (
                f"test_envs {args['test_envs']}, hparams seed {args['hparams_seed']}, "
                f"trial {args['trial_seed']}"
            )
            text = repr(sorted(record["hparams"].items()))
            _refuse_difference(seen, ("hparams", row, job), text, record)
    refuse_other_settings(of_deployed_weights(records))


def explain_missing(
    records: Sequence[Record], method: type[SelectionMethod], dataset: str, algorithm: str, env: int
) -> str:
    """Why a method has no number for a test environment: which runs are missing, in words for below
    a table.
    """
    own = [
        r
        for r in records
        if r["args"]["dataset"] == dataset and r["args"]["algorithm"] == algorithm
    ]
    single = [record for record in own if record["args"]["test_envs"] == [env]]
    if not single:
        return f"no run with test_envs [{env}]"
    single = of_deployed_weights(single)
    if not single:
        return "SWAD's weights are evaluated when a run has ended, and none has"
    if method is not LeaveOneDomainOut:
        lacking = [
            key
            for key in (test_acc_key(single[-1], env), f"env{env}_out_acc")
            if key not in single[-1]
        ]
        return (
            f"the records lack {', '.join(lacking)}"
            if lacking
            else "no record has a finite validation accuracy"
        )
    with_env = [
        r["args"]["test_envs"]
        for r in own
        if len(r["args"]["test_envs"]) == 2 and env in r["args"]["test_envs"]
    ]
    if not with_env:
        return (
            "leave-one-domain-out needs the runs with two test environments "
            "(a sweep with --selection leave-one-out, or without --single_test_envs)"
        )
    others = [other for other in range(num_environments(single)) if other != env]
    missing = [
        sorted([env, other]) for other in others if not any(other in pair for pair in with_env)
    ]
    if missing:
        return (
            f"leave-one-domain-out needs the runs with test_envs {', '.join(map(str, missing))} too"
        )
    return (
        "no draw of hyper-parameters has, at one step, exactly one record with this test "
        "environment alone and one with each other environment held out too "
        "(jobs unfinished, or run twice)"
    )


def sweep_notes(records: Sequence[Record], jobs: JobCount | None) -> list[str]:
    """What a reader of the tables should know besides the numbers, one sentence each."""
    notes = []
    if jobs is not None and jobs.unfinished:
        shown = ", ".join(jobs.unfinished[:3]) + (", ..." if len(jobs.unfinished) > 3 else "")
        notes.append(
            f"{len(jobs.unfinished)} of {jobs.total} jobs are unfinished"
            f"{f', {len(jobs.failed)} of them failed' if jobs.failed else ''}; "
            f"their records so far are included ({shown})"
        )
    if jobs is not None and jobs.empty:
        shown = ", ".join(jobs.empty[:3]) + (", ..." if len(jobs.empty) > 3 else "")
        notes.append(
            f"{len(jobs.empty)} of {jobs.total} jobs are finished without a record ({shown}); "
            "delete their folders to run them again"
        )
    for dataset in sorted({record["args"]["dataset"] for record in records}):
        own = [record for record in records if record["args"]["dataset"] == dataset]
        draws: defaultdict[str, set[int]] = defaultdict(set)
        for record in own:
            draws[record["args"]["algorithm"]].add(record["args"]["hparams_seed"])
        if len({len(seeds) for seeds in draws.values()}) > 1:
            counts = ", ".join(f"{name} {len(draws[name])}" for name in order_algorithms(draws))
            notes.append(
                f"{dataset}: the algorithms had unequal numbers of hyper-parameter draws ({counts})"
            )
    averaged = {
        (r["args"]["dataset"], r["args"]["algorithm"], weights)
        for r in of_deployed_weights(records)
        if (weights := weights_of(r)) not in (None, "raw")
    }
    notes += [
        f"{dataset}: the accuracies of {algorithm} are of averaged weights ({weights})"
        for dataset, algorithm, weights in sorted(averaged)
    ]
    if any(record["args"].get("hparams_per_trial") == SHARED for record in records):
        notes.append(
            "all trials share their draws of hyper-parameters (--hparams_per_trial shared): the "
            "standard errors are those of splits and training, and not comparable with DomainBed's"
        )
    recorded = [record.get("provenance") or {} for record in records]
    silent = sum(not provenance for provenance in recorded)
    if 0 < silent < len(records):
        notes.append(
            f"{silent} of {len(records)} records do not say which data and weights they used"
        )
    versions = sorted(
        {str(p["code_version"]) for p in recorded if p.get("code_version") is not None}
    )
    if len(versions) > 1:
        notes.append(f"the records come from different versions of the code: {', '.join(versions)}")
    return notes


def _refuse_difference(
    seen: dict[tuple[str, str, str], tuple[str, Record]],
    where: tuple[str, str, str],
    value: str,
    record: Record,
) -> None:
    first_value, first = seen.setdefault(where, (value, record))
    if first_value == value:
        return
    key, scope, job = where
    folders = " and ".join(str(r["args"].get("output_dir", "?")) for r in (first, record))
    what = (
        f"two sets of hparams for one job ({job})"
        if key == "hparams"
        else f"{key} {first_value!r} and {value!r}"
    )
    raise UsageError(
        f"records of {scope} are not comparable: {what}, in {folders}; "
        "collect them from separate folders, or pass --allow-mixed"
    )
