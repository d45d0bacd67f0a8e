"""The tables as DomainBed prints them, byte for byte: its text and its LaTeX.

For scripts that parse that text, for comparing with published logs, and as the test that the
numbers are the same. Every quirk is kept: cells padded and cut to a fixed width, a blank before the
end of each line, averages over whatever domains a trial happens to have. `renderers.py` holds the
formats meant for reading.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from domainbed_ext.hparams import order_algorithms
from domainbed_ext.records import Record
from domainbed_ext.selection import SELECTION_METHODS, SelectionMethod
from domainbed_ext.table_names import dataset_names, environment_names
from domainbed_ext.tables import cell_of
from domainbed_ext.trial_values import sweep_accs

_RESULTS_WIDTH = 20
_AVERAGES_WIDTH = 25


def render_domainbed(
    records: Sequence[Record],
    *,
    methods: Iterable[type[SelectionMethod]] = SELECTION_METHODS,
    latex: bool = False,
) -> str:
    """All tables of a sweep in DomainBed's own form."""
    if latex:
        lines = [
            r"\documentclass{article}",
            r"\usepackage{booktabs}",
            r"\usepackage{adjustbox}",
            r"\begin{document}",
            r"\section{Full DomainBed results}",
            f"% Total records: {len(records)}",
        ]
    else:
        lines = [f"Total records: {len(records)}"]
    for method in methods:
        lines += ["", rf"\subsection{{Model selection: {method.name}}}"] if latex else []
        lines += _method_lines(records, method, latex)
    lines += [r"\end{document}"] if latex else []
    return "\n".join(lines) + "\n"


def _method_lines(
    records: Sequence[Record], method: type[SelectionMethod], latex: bool
) -> list[str]:
    algorithms = order_algorithms(record["args"]["algorithm"] for record in records)
    datasets = dataset_names(records)
    accs = sweep_accs(records, method)
    lines: list[str] = []
    averages: dict[str, list[list[float]]] = {algorithm: [] for algorithm in algorithms}
    for dataset in datasets:
        names = environment_names(dataset, records)
        table = []
        for algorithm in algorithms:
            per_env = [accs.get((dataset, algorithm, env), {}) for env in range(len(names))]
            table.append([algorithm, *_cells([list(env.values()) for env in per_env], latex)])
            by_trial: defaultdict[int, list[float]] = defaultdict(list)
            for env in per_env:
                for trial, acc in env.items():
                    by_trial[trial].append(acc)
            averages[algorithm].append(
                [float(np.mean(by_trial[trial])) for trial in sorted(by_trial)]
            )
        lines += ["", rf"\subsubsection{{{dataset}}}"] if latex else []
        header = f"Dataset: {dataset}, model selection method: {method.name}"
        lines += _table_lines(table, header, ["Algorithm", *names, "Avg"], _RESULTS_WIDTH, latex)
    lines += ["", r"\subsubsection{Averages}"] if latex else []
    table = [[algorithm, *_cells(averages[algorithm], latex)] for algorithm in algorithms]
    header = f"Averages, model selection method: {method.name}"
    return lines + _table_lines(
        table, header, ["Algorithm", *datasets, "Avg"], _AVERAGES_WIDTH, latex
    )


def _cells(columns: Sequence[Sequence[float]], latex: bool) -> list[str]:
    cells = [cell_of(values) if values else None for values in columns]
    sign = r"$\pm$" if latex else "+/-"
    texts = ["X" if cell is None else f"{cell.mean:.1f} {sign} {cell.stderr:.1f}" for cell in cells]
    means = [cell.mean for cell in cells if cell is not None and cell.mean is not None]
    complete = len(means) == len(columns)
    return [*texts, f"{sum(means) / len(means):.1f}" if complete and means else "X"]


def _table_lines(
    rows: Sequence[Sequence[str]], header: str, columns: Sequence[str], width: int, latex: bool
) -> list[str]:
    def line(row: Sequence[str]) -> str:
        cells = [cell.ljust(width)[:width] for cell in row]
        return " & ".join(cells) + r" \\" if latex else "  ".join(cells) + " "

    if not latex:
        return ["", f"-------- {header}", line(columns), *(line(row) for row in rows)]
    bold = [r"\textbf{" + column.replace("%", r"\%") + "}" for column in columns]
    return [
        "",
        r"\begin{center}",
        r"\adjustbox{max width=\textwidth}{%",
        r"\begin{tabular}{l" + "c" * (len(columns) - 1) + "}",
        r"\toprule",
        line(bold),
        r"\midrule",
        *(line(row) for row in rows),
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{center}",
    ]
