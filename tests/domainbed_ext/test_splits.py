from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from upstream_checkout import ask_upstream, needs_upstream

from domainbed_ext.errors import UsageError
from domainbed_ext.seeds import seed_hash
from domainbed_ext.splits import TEST, TRAIN, VALIDATION, emojidg_folds, split_dataset

# Printed by DomainBed b93c22a for split_dataset(range(100), 20, 0).
OUT_KEYS = [26, 86, 2, 55, 75, 93, 16, 73, 54, 95]
IN_KEYS = [43, 62, 3, 71, 45, 48, 6, 99, 82, 76]


def test_split_has_domainbeds_keys_in_its_order():
    first, rest = split_dataset(range(100), 20, 0)
    assert (len(first), len(rest)) == (20, 80)
    assert first.keys[:10] == OUT_KEYS
    assert rest.keys[:10] == IN_KEYS
    assert sorted(first.keys + rest.keys) == list(range(100))
    assert all(type(key) is int for key in first.keys)


def test_a_split_reads_the_data_set_at_its_keys():
    letters = "abcdefghij"
    first, rest = split_dataset(letters, 4, 1)
    assert [first[i] for i in range(len(first))] == [letters[key] for key in first.keys]
    assert set(first) | set(rest) == set(letters)
    assert first.dataset is letters


@pytest.mark.parametrize("n", [0, 10])
def test_either_part_can_be_empty(n):
    first, rest = split_dataset(range(10), n)
    assert (len(first), len(rest)) == (n, 10 - n)


@pytest.mark.parametrize("n", [-1, 11])
def test_an_impossible_size_is_refused(n):
    with pytest.raises(UsageError, match="of 10"):
        split_dataset(range(10), n)


@pytest.mark.upstream
@needs_upstream
def test_splits_of_many_sizes_and_seeds_are_upstreams():
    question = [
        [size, int(size * fraction), seed_hash(trial, env)]
        for size in (1, 2, 16, 300, 1671)
        for fraction in (0.0, 0.2, 0.5)
        for trial in range(3)
        for env in range(4)
    ]
    code = """
from domainbed.lib.misc import split_dataset
parts = [split_dataset(range(size), n, seed) for size, n, seed in question]
print(json.dumps([[part.keys for part in pair] for pair in parts]))
"""
    ours = [[part.keys for part in split_dataset(range(s), n, seed)] for s, n, seed in question]
    assert ours == ask_upstream(code, question)


CODEPOINTS = [f"{0x1F600 + i:x}" for i in range(23)]
CLASSES = ["face"] * 11 + ["hand"] * 12


def test_emojidg_folds_follow_the_rule():
    """The rule spelled out another way: rank by hash inside the class, fold = rank mod 5."""
    for trial_seed in range(6):
        roles = emojidg_folds(CODEPOINTS, CLASSES, trial_seed=trial_seed)
        for name in ("face", "hand"):
            members = [c for c, cls in zip(CODEPOINTS, CLASSES, strict=True) if cls == name]
            digest = {c: hashlib.sha256(b"emojidg:0:" + c.encode()).hexdigest() for c in members}
            for rank, codepoint in enumerate(sorted(members, key=digest.__getitem__)):
                fold = rank % 5
                expected = TRAIN
                if fold == (0 + trial_seed) % 5:
                    expected = TEST
                if fold == (1 + trial_seed) % 5:
                    expected = VALIDATION
                assert roles[CODEPOINTS.index(codepoint)] == expected


def test_emojidg_folds_rotate_and_cover_every_code_point_once():
    roles = np.stack([emojidg_folds(CODEPOINTS, CLASSES, trial_seed=t) for t in range(5)])
    for column in roles.T:
        assert Counter(column.tolist()) == {TRAIN: 3, VALIDATION: 1, TEST: 1}
    again = emojidg_folds(CODEPOINTS, CLASSES, trial_seed=5)
    np.testing.assert_array_equal(again, roles[0])


def test_emojidg_folds_do_not_depend_on_the_order_of_the_table_or_on_case():
    order = np.random.RandomState(0).permutation(len(CODEPOINTS))
    shuffled = emojidg_folds(
        [CODEPOINTS[i].upper() for i in order], [CLASSES[i] for i in order], trial_seed=2
    )
    np.testing.assert_array_equal(shuffled, emojidg_folds(CODEPOINTS, CLASSES, trial_seed=2)[order])


def test_emojidg_tables_that_make_no_sense_are_refused():
    with pytest.raises(UsageError, match="2 code points but 1 classes"):
        emojidg_folds(["1f600", "1f601"], ["face"], trial_seed=0)
    with pytest.raises(UsageError, match="1f600"):
        emojidg_folds(["1f600", "1F600"], ["face", "face"], trial_seed=0)
