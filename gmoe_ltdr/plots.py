"""Figures of what routers do, as the paper draws them. Needs the extra [plots].

    plot_expert_load(stats).savefig("load.png")

Each function takes statistics and gives a matplotlib Figure; none touches pyplot's global state.
Figures of RPV need `RoutingStats(detailed=True)`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gmoe_ltdr.routing import Modality
from gmoe_ltdr.rpv_bins import largest_rpv, rpv_edges
from gmoe_ltdr.stats import RoutingStats
from gmoe_ltdr.token_stats import TokenStats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MODALITIES = {"vision": Modality.VISION, "language": Modality.LANGUAGE}
_HEAD_COLOR, _TAIL_COLOR = "#4477aa", "#ee6677"


def plot_rpv_histogram(
    stats_of: Mapping[str, RoutingStats], *, layer: str | None = None, density: bool = False
) -> Figure:
    """How many tokens have which RPV: one curve per model and modality (figure 1b).

    Args:
        stats_of: Detailed statistics by name, of models with equally many experts.
        layer: None: all layers together.
        density: Shares of the tokens, for models that saw different numbers of them.
    """
    figure = _new_figure(6.4, 3.8)
    axes = figure.subplots()
    num_experts = _num_experts(next(iter(stats_of.values())))
    edges = rpv_edges(num_experts).numpy()
    for model, stats in stats_of.items():
        for name, numbers in _modalities_of(stats, layer).items():
            head_H, tail_H = _bins(numbers)
            label = f"{model}, {name}" if len(stats_of) > 1 else name
            count_H = head_H + tail_H
            height_H = count_H / numbers.num_tokens if density else count_H
            axes.stairs(height_H, edges, label=f"{label} ({numbers.num_tokens:,} tokens)")
    axes.set_yscale("symlog", linthresh=1e-4 if density else 1)
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, edges[-1])
    axes.set_xlabel(f"routing-probability variance (at most {largest_rpv(num_experts):.3g})")
    axes.set_ylabel("share of tokens" if density else "tokens")
    axes.legend()
    return figure


def plot_expert_load(stats: RoutingStats) -> Figure:
    """Share of each expert in each layer's choices, by modality (figure 4).

    Above, first choices; below, all choices, where the tail tokens' further experts show.
    """
    by_modality: dict[str, list[TokenStats]] = {}
    for layer in stats.layers:
        for name, numbers in _modalities_of(stats, layer).items():
            by_modality.setdefault(name, []).append(numbers)
    width = max(3.2, 1.2 + 0.55 * len(stats.layers)) * len(by_modality) + 1.2
    figure = _new_figure(width, 5.2)
    panels = figure.subplots(2, len(by_modality), sharex=True, sharey=True, squeeze=False)
    for column, (name, layers) in enumerate(by_modality.items()):
        for row, (what, loads) in enumerate(
            [
                ("first choices", [numbers.load_E for numbers in layers]),
                ("all choices", [numbers.selected_load_E for numbers in layers]),
            ]
        ):
            axes = panels[row, column]
            _stack(axes, loads)
            axes.set_title(f"{name}: {what}", fontsize=10)
            axes.set_xticks(range(len(stats.layers)), _short(stats.layers))
        panels[1, column].set_xlabel("block")
    panels[0, 0].set_ylabel("share of choices")
    panels[1, 0].set_ylabel("share of choices")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", title="expert")
    return figure


def plot_head_and_tail(stats: RoutingStats, *, layer: str | None = None) -> Figure:
    """How many of an image's head and tail tokens have which RPV (figure 5).

    Args:
        stats: Detailed statistics; their vision tokens are shown.
        layer: None: the mean over all layers.
    """
    numbers = stats.of(layer, modality=Modality.VISION)
    edges = rpv_edges(_num_experts(stats)).numpy()
    figure = _new_figure(8.0, 3.4)
    panels = figure.subplots(1, 2, sharex=True)
    parts = (
        ("head", _HEAD_COLOR, numbers.head_rpv, _bins(numbers)[0]),
        ("tail", _TAIL_COLOR, numbers.tail_rpv, _bins(numbers)[1]),
    )
    for axes, (name, color, rpv, count_H) in zip(panels, parts, strict=True):
        per_image_H = count_H / max(numbers.num_images, 1)
        axes.bar(edges[:-1], per_image_H, np.diff(edges), align="edge", color=color, edgecolor="w")
        axes.set_title(f"{name}: {per_image_H.sum():.1f} tokens, mean RPV {rpv:.3g}", fontsize=10)
        axes.set_xlabel("routing-probability variance")
        axes.set_xlim(0, edges[-1])
    panels[0].set_ylabel("tokens per image")
    figure.suptitle(f"vision tokens, mean RPV {numbers.rpv:.3g}", fontsize=11)
    return figure


def plot_domains(stats_of: Mapping[str, RoutingStats], *, unseen: Collection[str] = ()) -> Figure:
    """Which experts each domain's vision tokens choose first, layer by layer.

    Args:
        stats_of: Statistics by domain.
        unseen: Domains that were not trained on; marked.
    """
    layers = next(iter(stats_of.values())).layers
    figure = _new_figure(
        2.0 + 0.45 * len(layers) * _num_experts(next(iter(stats_of.values()))),
        1.4 + 0.4 * len(stats_of),
    )
    panels = figure.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    load_LGE = np.stack(
        [
            [stats.of(layer, modality=Modality.VISION).load_E for stats in stats_of.values()]
            for layer in layers
        ]
    )
    largest = load_LGE.max()
    images = []
    for axes, load_GE, short in zip(panels, load_LGE, _short(layers), strict=True):
        images.append(axes.imshow(load_GE, vmin=0, vmax=largest, cmap="Blues", aspect="auto"))
        for (row, column), share in np.ndenumerate(load_GE):
            color = "white" if share > 0.6 * largest else "black"
            text = f"{share:.2f}".removeprefix("0")
            axes.text(column, row, text, color=color, ha="center", va="center", fontsize=8)
        axes.set_title(f"block {short}", fontsize=10)
        axes.set_xticks(range(load_GE.shape[1]))
        axes.set_xlabel("expert")
    names = [f"{name} (unseen)" if name in unseen else name for name in stats_of]
    panels[0].set_yticks(range(len(names)), names)
    figure.colorbar(images[0], ax=panels, label="share of first choices")
    return figure


def _new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"figures need {error.name}: pip install 'gmoe-ltdr[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _stack(axes: Axes, loads: list[Any]) -> None:
    """One bar per layer, made of the experts' shares."""
    load_NE = np.stack(loads)
    bottom_N = np.zeros(len(load_NE))
    colors = _expert_colors(load_NE.shape[1])
    for expert in range(load_NE.shape[1]):
        axes.bar(
            range(len(load_NE)),
            load_NE[:, expert],
            bottom=bottom_N,
            color=colors[expert],
            edgecolor="white",
            linewidth=0.5,
            label=str(expert),
        )
        bottom_N += load_NE[:, expert]
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylim(0, 1)


def _expert_colors(num_experts: int) -> Any:
    from matplotlib import colormaps

    if num_experts <= 10:
        return colormaps["tab10"](range(10))
    return colormaps["viridis"](np.linspace(0, 1, num_experts))


def _modalities_of(stats: RoutingStats, layer: str | None) -> dict[str, TokenStats]:
    """The modalities that there are tokens of."""
    numbers_of = {
        name: stats.of(layer, modality=modality) for name, modality in _MODALITIES.items()
    }
    return {name: numbers for name, numbers in numbers_of.items() if numbers.num_tokens}


def _bins(numbers: TokenStats) -> tuple[np.ndarray, np.ndarray]:
    if numbers.head_bins_H is None or numbers.tail_bins_H is None:
        raise ValueError("this figure needs RoutingStats(detailed=True)")
    return numbers.head_bins_H, numbers.tail_bins_H


def _num_experts(stats: RoutingStats) -> int:
    return stats.num_experts(stats.layers[0])


def _short(layers: list[str]) -> list[str]:
    """The numbers of "blocks.8.mlp" and the like; whole names where they have none."""
    numbers = [[part for part in name.split(".") if part.isdigit()] for name in layers]
    return [found[0] if found else name for found, name in zip(numbers, layers, strict=True)]
