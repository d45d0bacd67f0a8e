"""Learning curves as a figure: a row per data set and test domain, a panel per metric, a colour per
algorithm. Drawn without a display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from domainbed_ext.errors import UsageError
from domainbed_ext.selection import SPLITS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURE_ENDINGS = (".png", ".svg", ".pdf")

# Okabe and Ito's colours, told apart with any kind of colour vision; dashes for those who print.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)))
_TITLES = {
    "in": "training domains, trained on",
    "out": "training domains, held out",
    "test": "test domain",
    "loss": "training loss",
}
_UNITS = {"step_time": "seconds per step", "mem_gb": "memory (GiB)", "lr": "learning rate"}
_FEW_POINTS = 12  # more markers than these would hide the dashes
_PANEL_INCHES = (3.1, 2.3)


def curve_figure(
    curves: pd.DataFrame,
    *,
    metrics: Sequence[str],
    domain_names: Mapping[str, Sequence[str]],
    algorithms: Sequence[str],
) -> Figure:
    """The figure: mean over trials as a line, from the lowest to the highest trial as a band.

    Args:
        curves: What `curves_frame` returned, one draw per trial.
        metrics: One panel each, in this order.
        domain_names: The names of each data set's domains; the data sets come in this order.
        algorithms: In the order of the legend.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            "drawing needs matplotlib; install the extra: pip install 'gmoe-ltdr[plots]'"
        ) from None

    styles = _styles(algorithms)
    rows = sorted(
        curves.groupby(["dataset", "test_envs"]),
        key=lambda row: (list(domain_names).index(row[0][0]), not row[0][1], row[0][1]),
    )
    width, height = _PANEL_INCHES
    size = (width * max(len(metrics), 2), height * len(rows) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, ((dataset, test_envs), own) in zip(parts, rows, strict=True):
        names = [domain_names[dataset][env] for env in test_envs]
        tested = f"test domain {' and '.join(names)}" if names else "all domains trained"
        part.suptitle(f"{dataset}, {tested}", x=0.01, ha="left", fontsize="medium", weight="bold")
        panels = part.subplots(1, len(metrics), squeeze=False)[0]
        for panel, metric in zip(panels, metrics, strict=True):
            _draw(panel, own[own["metric"] == metric], styles)
            _label(panel, metric, unseen=own["metric"].str.endswith("_unseen_acc").any())
    _add_legend(figure, curves, styles)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Writes the figure in the form that the path's ending names; equal figures, equal bytes."""
    from matplotlib import rc_context

    undated: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    # Type 42 keeps letters as letters, which journals ask for.
    with rc_context({"pdf.fonttype": 42, "svg.hashsalt": "gmoe-ltdr"}):
        figure.savefig(path, dpi=150, metadata=undated.get(path.suffix))


def _styles(algorithms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and a dash for each; the two repeat after different numbers of algorithms."""
    return {
        name: {"color": color, "linestyle": dash}
        for name, color, dash in zip(algorithms, cycle(_COLORS), cycle(_DASHES), strict=False)
    }


def _draw(panel: Axes, curves: pd.DataFrame, styles: Mapping[str, dict[str, Any]]) -> None:
    for algorithm, style in styles.items():
        own = curves[curves["algorithm"] == algorithm]
        # A mean over the trials that go on would jump where one ends.
        trials = own.pivot_table("value", "step", "trial_seed").dropna()
        if trials.empty:
            continue
        marker = "o" if len(trials) <= _FEW_POINTS else ""
        panel.plot(trials.index, trials.mean(axis=1), marker=marker, markersize=3, **style)
        if trials.shape[1] > 1:
            lowest, highest = trials.min(axis=1), trials.max(axis=1)
            band = {"color": style["color"], "alpha": 0.2, "linewidth": 0}
            panel.fill_between(trials.index, lowest, highest, **band)


def _label(panel: Axes, metric: str, *, unseen: bool) -> None:
    title = _TITLES.get(metric, metric)
    panel.set_title(
        f"{title}, unseen concepts" if unseen and metric == "test" else title, fontsize="medium"
    )
    if not panel.lines:
        panel.set_axis_off()
        panel.text(0.5, 0.5, "not recorded", transform=panel.transAxes, ha="center", va="center")
        return
    accuracy = metric in SPLITS or metric.endswith("_acc")
    panel.set_xlabel("training step")
    panel.set_ylabel("accuracy (%)" if accuracy else _UNITS.get(metric, metric))
    panel.grid(alpha=0.3, linewidth=0.5)
    panel.spines[["top", "right"]].set_visible(False)


def _add_legend(figure: Figure, curves: pd.DataFrame, styles: Mapping[str, dict[str, Any]]) -> None:
    from matplotlib.lines import Line2D

    trials = curves.groupby(["dataset", "test_envs", "algorithm"])["trial_seed"].nunique()
    room = int(figure.get_figwidth() / (0.6 + 0.1 * max(map(len, styles))))
    handles = [Line2D([], [], label=name, **style) for name, style in styles.items()]
    numbers = sorted(set(trials))
    counted = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    title = f"mean over {counted} trials, band from the lowest to the highest"
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=max(1, min(len(handles), room)),
        title=None if numbers == [1] else title,
        frameon=False,
        alignment="left",
        fontsize="medium",
        title_fontsize="small",
    )
