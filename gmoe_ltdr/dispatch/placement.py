"""Which rank holds which experts: contiguous blocks of nearly equal size.

Six experts on four ranks: 0 and 1, 2 and 3, 4, 5. Contiguous, so that rows ordered by expert are
ordered by rank too.
"""

from __future__ import annotations


def experts_per_rank(num_experts: int, num_ranks: int) -> list[int]:
    """How many experts each rank holds; the first ranks hold one more where it does not divide.

    Raises:
        ValueError: More ranks than experts.
    """
    if num_ranks > num_experts:
        raise ValueError(
            f"{num_ranks} ranks cannot share {num_experts} experts: a rank would hold none. Use "
            f"expert-parallel groups of at most {num_experts} ranks (torch.distributed."
            "new_subgroups), each with a copy of all experts, or more experts"
        )
    fewest, extra = divmod(num_experts, num_ranks)
    return [fewest + (rank < extra) for rank in range(num_ranks)]


def experts_of_rank(num_experts: int, num_ranks: int, rank: int) -> range:
    """The experts that rank `rank` of a group holds."""
    counts = experts_per_rank(num_experts, num_ranks)
    first = sum(counts[:rank])
    return range(first, first + counts[rank])
