"""Seeds and job hashes, against values printed by DomainBed b93c22a (Python 3.11, NumPy 2.4)."""

from __future__ import annotations

import pytest

from domainbed_ext.seeds import job_hash, seed_hash


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((), 225909452),
        ((0,), 1003224347),
        ((0, 0), 894182419),
        ((0, 1), 1514274641),
        ((0, 2), 1325548499),
        ((0, 3), 1796103049),
        ((1, 0), 785910682),
        ((2, 0), 472130416),
        ((1, 1), 1442673865),
        ((1, "lr"), 103267603),
        (("PACS", "ERM", [0], 0, 0), 94828300),
        (("PACS", "LTDR", [0], 0, 0), 1809246421),
        (("PACS", "LTDR", [3], 1, 2), 932413489),
        (("Debug28", "LTDR", [0], 0, 0), 1254117012),
    ],
)
def test_seed_hash_is_domainbeds(args, expected):
    assert seed_hash(*args) == expected


@pytest.mark.parametrize(
    ("algorithm", "seed", "expected"),
    [
        ("ERM", 94828300, "7358bc3c867a56585b37a848f2aaa0c1"),
        ("LTDR", 1809246421, "d44d1ce4cdaf1e00e407b550a3c82a39"),
    ],
)
def test_job_hash_is_domainbeds(algorithm, seed, expected):
    train_args = {
        "trial_seed": 0,
        "algorithm": algorithm,
        "data_dir": "/data",
        "dataset": "PACS",
        "holdout_fraction": 0.2,
        "hparams_seed": 0,
        "seed": seed,
        "task": "domain_generalization",
        "test_envs": [0],
    }
    assert job_hash(train_args) == expected


def test_job_hash_of_a_small_object():
    assert job_hash({"foo": "bar"}) == "94232c5b8fc9272f6f73a1e36eb68fcf"
