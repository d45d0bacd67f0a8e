"""Comparison routers with state or losses of their own, on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from domainbed_ext.algorithms import get_algorithm_class
from domainbed_ext.distributed import OtherRankError, current_ranks
from domainbed_ext.errors import UsageError
from domainbed_ext.records import read_records
from domainbed_ext.runs import prepare_run
from domainbed_ext.train_args import TrainArgs
from domainbed_ext.train_checks import check_args
from domainbed_ext.training_job import train
from tests.distributed import run_ranks

# Nothing drawn at random, so that one process computes the same. Seven images are not shared
# evenly.
QUIET = {"moe_expert_dropout": 0.0, "drop_path": 0.0, "batch_size": 7, "ema_decay": 0.9}
ROUTERS = {
    "DYNAMIC": {},
    "DYNAMIC, sharing experts": {"moe_dispatcher": "all_to_all"},
    # each rank compares and balances its own tokens, so these losses are others
    "STGC": {"moe_noise_std": 0.0, "stgc_weight": 0.0, "moe_balance_weight": 0.0},
    "DEEPSEEK, sharing experts": {"moe_balance_weight": 0.0, "moe_dispatcher": "all_to_all"},
    "GROUPS": {"moe_noise_std": 0.0, "moe_balance_weight": 0.0},
    # two steps dense, two of evolution, one of routing
    "EVOMOE": {
        "evomoe_dense_share": 0.4,
        "evomoe_evolution_share": 0.4,
        "moe_balance_weight": 0.0,
    },
    "LTDR, experts choose": {
        "ltdr_selection": "expert_choice",
        "ltdr_tail_scope": "image",
        "moe_noise_std": 0.0,
        "moe_dispatcher": "all_to_all",
    },
}
# after which sums that round differently have moved a token over the edge of an expert's choice
FEWER_STEPS = {"LTDR, experts choose": 2}


def arguments(folder: Path, case: str, **hparams) -> TrainArgs:
    return TrainArgs(
        algorithm=case.split(",")[0],
        dataset="Debug28",
        output_dir=str(folder),
        hparams={**QUIET, **ROUTERS[case], **hparams},
        steps=FEWER_STEPS.get(case, 5),
        checkpoint_freq=2,
        device="cpu",
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", ROUTERS)
def test_two_ranks_equal_one_process(tmp_path, case):
    expected = train(arguments(tmp_path / "one", case))
    run_ranks(train, 2, arguments(tmp_path / "two", case))
    records = read_records(tmp_path / "two" / "results.jsonl")
    assert len(records) == len(expected) > 1
    for ours, theirs in zip(records, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if isinstance(value, float) and name not in ("step_time", "conflict_share"):
                slack = 5e-3 if name in ("tail_share", "experts_per_token") else 5e-5
                assert ours[name] == pytest.approx(value, abs=slack), name


def check_expert_parallelism_is_refused(algorithm: str) -> None:
    args = arguments(Path("unused"), algorithm, moe_dispatcher="all_to_all")
    error = UsageError if current_ranks().is_first else OtherRankError
    with pytest.raises(error, match=f"moe_dispatcher='all_to_all': {algorithm} "):
        prepare_run(args, check_args(args))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["STGC", "EVOMOE"])
def test_expert_parallelism_is_refused(algorithm):
    run_ranks(check_expert_parallelism_is_refused, 2, algorithm)


class Stop(BaseException):
    """Ends a run between two steps."""


def train_until(args: TrainArgs, stop_at: int) -> None:
    algorithm = get_algorithm_class(args.algorithm)
    plain_update, steps = algorithm.update, []

    def update(self, minibatches, unlabeled=None):
        if len(steps) == stop_at:
            raise Stop
        steps.append(None)
        return plain_update(self, minibatches, unlabeled)

    algorithm.update = update
    try:
        train(args)
    except Stop:
        pass
    finally:
        algorithm.update = plain_update


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["DYNAMIC", "EVOMOE"])
def test_a_stopped_run_goes_on(tmp_path, algorithm):
    """In EvoMoE's stage of evolution, where DDP waits for other gradients than at the start."""
    run_ranks(train, 2, arguments(tmp_path / "whole", algorithm))
    run_ranks(train_until, 2, arguments(tmp_path / "parts", algorithm), 4)
    (first, second) = read_records(tmp_path / "parts" / "results.jsonl")
    assert (first["step"], second["step"]) == (0, 2)
    run_ranks(train, 2, arguments(tmp_path / "parts", algorithm))
    whole, parts = (read_records(tmp_path / n / "results.jsonl") for n in ("whole", "parts"))
    for ours, theirs in zip(parts, whole, strict=True):
        for name in theirs.keys() - {"step_time", "args", "provenance"}:
            assert ours[name] == theirs[name], name


@pytest.mark.slow
def test_conflicts_are_parted_on_two_ranks(tmp_path):
    run_ranks(train, 2, arguments(tmp_path, "STGC", stgc_weight=1.0))
    records = read_records(tmp_path / "results.jsonl")
    assert all(record["conflict_loss"] > 0 for record in records)
