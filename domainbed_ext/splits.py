"""Which images of a domain are trained on, validated on and tested on.

`split_dataset` is DomainBed's split, key order included. `emojidg_folds` is the one split that
differs on purpose: it follows the code point, so that a concept never sits in one domain's training
part and in another's validation part.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from domainbed_ext.errors import UsageError

TRAIN, VALIDATION, TEST = 0, 1, 2
EMOJIDG_SEED = 0
EMOJIDG_FOLDS = 5


class SubsetSplit:
    """The items of a data set at `keys`, in that order, usable as a torch map-style data set.

    Attributes:
        dataset: The whole data set.
        keys: Indices into it.
    """

    def __init__(self, dataset: Any, keys: Sequence[int]) -> None:
        self.dataset = dataset
        self.keys = list(keys)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.keys[index]]

    def __len__(self) -> int:
        return len(self.keys)


def split_dataset(dataset: Any, n: int, seed: int = 0) -> tuple[SubsetSplit, SubsetSplit]:
    """Splits a data set at random into `n` items and the rest, key for key as DomainBed does.

    The protocol calls the first part "out" (held out) and the second "in", with the seed
    `seed_hash(trial_seed, environment)`.
    """
    total = len(dataset)
    if not 0 <= n <= total:
        raise UsageError(f"cannot take {n} items out of a data set of {total}; choose 0 to {total}")
    keys = list(range(total))
    # RandomState and a list, not an array or a Generator: only these give upstream's order.
    np.random.RandomState(seed).shuffle(keys)
    return SubsetSplit(dataset, keys[:n]), SubsetSplit(dataset, keys[n:])


def emojidg_folds(
    codepoints: Sequence[str], classes: Sequence[str], *, trial_seed: int
) -> npt.NDArray[np.int64]:
    """The role of each code point of EmojiDG's label table: 0 train, 1 validation, 2 test.

    Inside a class the code points are ordered by a hash and dealt to five folds. With trial seed t,
    fold t mod 5 is the test fold, the next one validates, and the other three train. The answer
    depends on the code point and the table alone, so it is the same in every domain.

    Args:
        codepoints: Hexadecimal code points, each once, the whole label table.
        classes: The class of each.
        trial_seed: Rotates the roles of the folds.
    """
    if len(codepoints) != len(classes):
        raise UsageError(
            f"{len(codepoints)} code points but {len(classes)} classes; give one class for each"
        )
    lowered = [codepoint.lower() for codepoint in codepoints]
    if len(set(lowered)) != len(lowered):
        twice = sorted({codepoint for codepoint in lowered if lowered.count(codepoint) > 1})
        raise UsageError(
            f"code points listed twice: {', '.join(twice[:5])}; the label table names each once"
        )

    members: defaultdict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(classes):
        members[name].append(index)
    roles = np.full(len(lowered), TRAIN, dtype=np.int64)
    for indices in members.values():
        ordered = sorted(indices, key=lambda index: _emojidg_hash(lowered[index]))
        for rank, index in enumerate(ordered):
            turn = (rank - trial_seed) % EMOJIDG_FOLDS
            roles[index] = {0: TEST, 1: VALIDATION}.get(turn, TRAIN)
    return roles


def _emojidg_hash(codepoint: str) -> str:
    return hashlib.sha256(f"emojidg:{EMOJIDG_SEED}:{codepoint}".encode()).hexdigest()
