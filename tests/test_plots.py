"""Figures show the numbers that they are given."""

import numpy as np
import pytest
import torch

from gmoe_ltdr import Modality, plots
from gmoe_ltdr.routers.token_choice import route
from gmoe_ltdr.stats import RoutingStats
from gmoe_ltdr.tail import TailRule
from tests.vectors import ABCD, logits

pytest.importorskip("matplotlib")

V, T = int(Modality.VISION), int(Modality.LANGUAGE)


def statistics(kinds=(V, V, V, V), *, layers=("blocks.8.mlp", "blocks.10.mlp")) -> RoutingStats:
    """Tokens A, B, C, D in RPV bins 0, 1, 6, 17; as vision tokens, C and D are tail."""
    routing = route(
        logits(ABCD),
        torch.tensor([kinds], dtype=torch.uint8),
        top_k=2,
        tail_top_k=4,
        tail_rule=TailRule(),
        weighting="renormalize",
    )
    stats = RoutingStats(detailed=True)
    stats.add(dict.fromkeys(layers, routing))
    return stats


def curves(figure) -> dict[str, list[float]]:
    (axes,) = figure.axes
    return {patch.get_label(): patch.get_data().values.tolist() for patch in axes.patches}


def test_histogram_counts_tokens_per_modality():
    expected = np.zeros(19)
    expected[[0, 6, 17]] = 2  # two layers
    drawn = curves(plots.plot_rpv_histogram({"": statistics([V, T, V, V])}))
    assert set(drawn) == {"vision (6 tokens)", "language (2 tokens)"}
    assert drawn["vision (6 tokens)"] == expected.tolist()
    assert np.flatnonzero(drawn["language (2 tokens)"]).tolist() == [1]


def test_histograms_of_two_models_and_of_one_layer():
    stats = {"LTDR": statistics(), "GMOE": statistics([V, V, T, T])}
    drawn = curves(plots.plot_rpv_histogram(stats, layer="blocks.8.mlp", density=True))
    assert len(drawn) == 3
    assert sum(drawn["LTDR, vision (4 tokens)"]) == pytest.approx(1)
    assert drawn["GMOE, language (2 tokens)"][17] == 0.5


def test_loads_are_stacked_to_one():
    figure = plots.plot_expert_load(statistics([V, V, V, T]))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        f"{modality}: {which} choices"
        for which in ("first", "all")
        for modality in ("vision", "language")
    ]
    for axes in figure.axes:
        tops = {bar.get_x(): bar.get_y() + bar.get_height() for bar in axes.patches}
        assert all(top == pytest.approx(1) for top in tops.values())
    for axes in figure.axes[2:]:
        assert [label.get_text() for label in axes.get_xticklabels()] == ["8", "10"]
    # vision tokens A, B, C: all choose expert 0 first
    assert [bar.get_height() for bar in figure.axes[0].patches[:2]] == [1, 1]


def test_head_and_tail_tokens_per_image():
    head, tail = plots.plot_head_and_tail(statistics()).axes
    heights = [bar.get_height() for bar in head.patches]
    assert np.flatnonzero(heights).tolist() == [0, 1]
    assert max(heights) == 1  # one token in each of an image's two layers
    assert np.flatnonzero([bar.get_height() for bar in tail.patches]).tolist() == [6, 17]
    assert head.get_title() == "head: 2.0 tokens, mean RPV 0.00625"
    assert tail.get_title() == "tail: 2.0 tokens, mean RPV 0.12"


def test_domains_side_by_side():
    figure = plots.plot_domains({"photo": statistics(), "sketch": statistics()}, unseen=["sketch"])
    first = figure.axes[0]
    assert [label.get_text() for label in first.get_yticklabels()] == ["photo", "sketch (unseen)"]
    assert first.images[0].get_array().tolist() == [[1, 0, 0, 0]] * 2
    assert [axes.get_title() for axes in figure.axes[:2]] == ["block 8", "block 10"]


def test_plain_statistics_have_no_histogram():
    plain = RoutingStats()
    plain.load_state(
        {"num_forwards": 0, "num_experts": {"a": 2}, "sums": {"a": torch.ones(1, 2, 15)}}
    )
    with pytest.raises(ValueError, match=r"needs RoutingStats\(detailed=True\)"):
        plots.plot_rpv_histogram({"": plain})
