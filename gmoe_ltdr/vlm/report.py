"""What routers do with words and with image tokens, as text for a terminal.

Per layer and modality: the experts' shares (figure 4 of the paper), tail tokens, and the histogram
of routing-probability variance, RPV (figure 1b; split into head and tail, figure 5).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from gmoe_ltdr.routing import Modality
from gmoe_ltdr.rpv_bins import rpv_edges
from gmoe_ltdr.stats import RoutingStats

_BAR = 32  # characters of a full one


def routing_lines(stats: RoutingStats, *, title: str) -> Iterator[str]:
    """A table of layers, and a histogram if the statistics are detailed."""
    width = max(len(name) for name in stats.layers)
    yield title
    yield f"  {'layer':{width}}  tokens    experts/token  tail   RPV     load of each expert"
    for layer in stats.layers:
        for modality in (Modality.LANGUAGE, Modality.VISION):
            numbers = stats.of(layer, modality=modality)
            if not numbers.num_tokens:
                continue
            load = " ".join(f"{share:.2f}" for share in numbers.load_E)
            yield (
                f"  {layer:{width}}  {modality.name.lower():8}  {numbers.experts_per_token:13.2f}"
                f"  {numbers.tail_share:.2f}  {numbers.rpv:.4f}  {load}"
            )
    if stats.detailed:
        yield from histogram_lines(stats)


def histogram_lines(stats: RoutingStats) -> Iterator[str]:
    """How many tokens have which RPV, all layers together: # head, + tail."""
    edges = rpv_edges(stats.num_experts(stats.layers[0])).tolist()
    for modality in (Modality.LANGUAGE, Modality.VISION):
        numbers = stats.of(modality=modality)
        if not numbers.num_tokens or numbers.head_bins_H is None or numbers.tail_bins_H is None:
            continue
        yield f"  RPV of {modality.name.lower()} tokens (# head, + tail)"
        head, tail = numbers.head_bins_H.tolist(), numbers.tail_bins_H.tolist()
        most = max(h + t for h, t in zip(head, tail, strict=True))
        for left, right, num_head, num_tail in zip(edges, edges[1:], head, tail, strict=False):
            total = num_head + num_tail
            if not total:
                continue
            bar = "#" * round(_BAR * num_head / most) + "+" * round(_BAR * num_tail / most)
            share = total / numbers.num_tokens
            yield f"    {left:.2f}-{right:.2f}  {share:6.1%}  {bar}"


def table_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns aligned, the first to the left."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        first, *rest = (cell.rjust(w) for cell, w in zip(row, widths, strict=True))
        yield "  ".join([first.strip().ljust(widths[0]), *rest]).rstrip()


def told_apart(accuracies: Mapping[str, Sequence[float]]) -> str:
    """One sentence: how far variants lie apart beside how far the seeds of one do.

    Args:
        accuracies: One per seed, by variant.
    """
    means = [statistics.mean(found) for found in accuracies.values()]
    between = max(means) - min(means)
    if min(map(len, accuracies.values())) < 2:
        return (
            f"The variants lie up to {between:.3f} apart; one seed shows no spread, so nobody can "
            "say whether that is chance."
        )
    within = max(max(found) - min(found) for found in accuracies.values())
    verdict = "so these are not told apart here" if within >= between else "so seeds alone do less"
    return (
        f"The variants' means lie up to {between:.3f} apart, the seeds of one variant up to "
        f"{within:.3f}: {verdict}."
    )
