"""How runs learn: their records as curves over steps.

    from domainbed_ext.learning_curves import chosen_draws, curves_frame
    from domainbed_ext.records import load_records

    curves = chosen_draws(curves_frame(load_records("sweep")))
    curves.query("metric == 'test'").pivot_table("value", "step", "algorithm")

One value a row: `dataset`, `test_envs` (a tuple), `algorithm`, `hparams_seed`, `trial_seed`,
`metric`, `step`, `value`. The metrics are "in", "out" and "test" (see `selection.split_accs`), and
every number of a record under its own key. Accuracies are in percent. The average of a run with
SWAD is one point at its end and on no curve. `curve_figure.py` draws them.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from domainbed_ext.records import Record, weights_of
from domainbed_ext.selection import split_accs

CURVE_COLUMNS = (
    "dataset",
    "test_envs",
    "algorithm",
    "hparams_seed",
    "trial_seed",
    "metric",
    "step",
    "value",
)

_RUN = ["dataset", "test_envs", "algorithm", "trial_seed", "hparams_seed"]


def curves_frame(records: Sequence[Record]) -> pd.DataFrame:
    """All curves of all runs."""
    rows: list[tuple[object, ...]] = []
    for record in records:
        if weights_of(record) == "swad":
            continue
        args = record["args"]
        seeds = args["hparams_seed"], args["trial_seed"]
        run = (args["dataset"], tuple(args["test_envs"]), args["algorithm"], *seeds)
        values = {split: 100 * acc for split, acc in split_accs(record).items()}
        for key, value in record.items():
            if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                values[key] = 100 * value if key.endswith("_acc") else value
        rows += [(*run, metric, record["step"], value) for metric, value in values.items()]
    frame = pd.DataFrame(rows, columns=list(CURVE_COLUMNS))
    return frame.astype({"step": int, "value": float}).sort_values("step", kind="stable")


def chosen_draws(curves: pd.DataFrame) -> pd.DataFrame:
    """Of each trial, the hyper-parameter draw that training-domain validation selects."""
    validated = curves[curves["metric"] == "out"]
    best = validated.groupby(_RUN, as_index=False)["value"].max()
    # Of equal draws the one with the highest seed counts, as in `selection.py`.
    best = best.sort_values(["value", "hparams_seed"]).drop_duplicates(_RUN[:-1], keep="last")
    return curves.merge(best[_RUN], on=_RUN, how="inner")
