"""A sweep's tables as terminal output, text, Markdown, LaTeX, HTML, and for programs CSV and JSON.

Each format is one function from a `Report` to text. DomainBed's own form is in
`domainbed_tables.py`.
"""

from __future__ import annotations

import html
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import IO

from domainbed_ext.report import Report, report_rows, report_summary, report_tables
from domainbed_ext.table_names import AVERAGE

_LATEX_ESCAPES = {c: "\\" + c for c in "%_&#{}$"} | {
    "\\": r"\textbackslash{}",
    "~": r"\~{}",
    "^": r"\^{}",
}


def render_text(report: Report) -> str:
    """Plain ASCII text."""
    stream = io.StringIO()
    print_rich(report, stream, plain=True)
    return stream.getvalue()


def print_rich(report: Report, stream: IO[str], *, plain: bool = False) -> None:
    """Prints to a terminal, with colours where the stream has them; `plain` means ASCII and no
    wrapping.
    """
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    console = Console(
        file=stream,
        width=1000 if plain else None,
        color_system=None if plain else "auto",
        highlight=False,
    )

    def show(text: str, style: str = "") -> None:
        line = Text(text if plain else text.replace("+/-", "±"), style=style)
        console.print(line, soft_wrap=True)

    show(report_summary(report))
    for table in report_tables(report):
        show("")
        show(table.title, "bold")
        grid = Table(box=box.ASCII_DOUBLE_HEAD if plain else box.SIMPLE_HEAD)
        for index, name in enumerate(table.header):
            last = name == AVERAGE
            grid.add_column(
                Text(name if plain else name.replace(", ", ",\n")),
                justify="left" if index < table.labels else "right",
                style="bold" if last else "",
                no_wrap=True,
            )
        for row in table.rows:
            grid.add_row(*(Text(cell if plain else cell.replace("+/-", "±")) for cell in row))
        # a table wider than the terminal wraps; it never loses the ends of its numbers
        wanted = Measurement.get(console, console.options.update(max_width=10_000), grid).maximum
        console.print(grid, width=max(console.width, wanted), crop=False)
        for note in table.footnotes:
            show(f"  {note}", "dim")
    if report.notes:
        show("")
    for note in report.notes:
        show(f"Note: {note}.", "yellow")


def render_markdown(report: Report) -> str:
    """GitHub's Markdown."""

    def escape(text: str) -> str:
        return text.replace("|", r"\|").replace("+/-", "±")

    lines = [report_summary(report)]
    for table in report_tables(report):
        lines += ["", f"### {escape(table.title)}", ""]
        lines += ["| " + " | ".join(map(escape, table.header)) + " |"]
        rules = [":---" if index < table.labels else "---:" for index in range(len(table.header))]
        lines += ["|" + "|".join(rules) + "|"]
        lines += ["| " + " | ".join(map(escape, row)) + " |" for row in table.rows]
        lines += ["", *(f"- {escape(note)}" for note in table.footnotes)]
    lines += ["", *(f"> {escape(note)}." for note in report.notes)] if report.notes else []
    return "\n".join(lines).rstrip() + "\n"


def render_latex(report: Report) -> str:
    """Tables to \\input into a paper that loads booktabs."""

    def escape(text: str) -> str:
        return "".join(_LATEX_ESCAPES.get(c, c) for c in text).replace("+/-", r"$\pm$")

    lines = [f"% {report_summary(report)}", r"% needs \usepackage{booktabs}"]
    for table in report_tables(report):
        columns = "l" * table.labels + "r" * (len(table.header) - table.labels)
        lines += [
            "",
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{escape('. '.join([table.title, *table.footnotes]))}.}}",
            rf"  \begin{{tabular}}{{{columns}}}",
            r"    \toprule",
            *(f"    {' & '.join(map(escape, row))} \\\\" for row in [table.header]),
            r"    \midrule",
            *(f"    {' & '.join(map(escape, row))} \\\\" for row in table.rows),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
        ]
    lines += [f"% Note: {note}." for note in report.notes]
    return "\n".join(lines) + "\n"


_HTML_STYLE = """
:root { color-scheme: light dark }
body { font-family: system-ui, sans-serif; line-height: 1.4; margin: 2em auto; max-width: 75em;
       padding: 0 1em }
div { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #8884; padding: .3em .8em; text-align: right;
         white-space: nowrap }
thead th { border-bottom: 2px solid #888 }
th[scope=row], .words { font-weight: normal; text-align: left }
tbody tr:hover { background: #8882 }
section { margin-top: 2.5em }
h2 { font-size: 1.1em }
ul, nav { font-size: .9em }
"""


def render_html(report: Report) -> str:
    """One page that needs nothing else, light or dark as the reader's other windows."""

    def escape(text: str) -> str:
        return html.escape(text.replace("+/-", "±"))

    def row(cells: Sequence[str], labels: int) -> str:
        first, *words = map(escape, cells[:labels])
        numbers = [f"<td>{escape(cell)}</td>" for cell in cells[labels:]]
        labelled = [f'<td class="words">{cell}</td>' for cell in words]
        return "<tr>" + "".join([f'<th scope="row">{first}</th>', *labelled, *numbers]) + "</tr>"

    def header(cells: Sequence[str], labels: int) -> str:
        kinds = [' class="words"' if index < labels else "" for index in range(len(cells))]
        pairs = zip(kinds, map(escape, cells), strict=True)
        texts = [f'<th scope="col"{kind}>{cell}</th>' for kind, cell in pairs]
        return "<tr>" + "".join(texts) + "</tr>"

    tables = report_tables(report)
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><title>Results</title>',
        '<meta name="viewport" content="width=device-width">',
        f"<style>{_HTML_STYLE}</style></head><body>",
        f"<p>{escape(report_summary(report))}</p>",
        *(f"<p>Note: {escape(note)}.</p>" for note in report.notes),
        "<nav><ol>",
        *(
            f'<li><a href="#table{number}">{escape(table.title)}</a></li>'
            for number, table in enumerate(tables, start=1)
        ),
        "</ol></nav>",
    ]
    for number, table in enumerate(tables, start=1):
        lines += [
            f'<section id="table{number}"><h2>{escape(table.title)}</h2>',
            "<div><table><thead>",
            header(table.header, table.labels),
            "</thead><tbody>",
            *(row(cells, table.labels) for cells in table.rows),
            "</tbody></table></div>",
        ]
        if table.footnotes:
            notes = [f"<li>{escape(note)}</li>" for note in table.footnotes]
            lines += ["<ul>", *notes, "</ul>"]
        lines.append("</section>")
    return "\n".join([*lines, "</body></html>"]) + "\n"


def render_csv(report: Report) -> str:
    """One number a row; the columns are those of the frames."""
    return str(report_rows(report).round(6).to_csv(index=False, lineterminator="\n"))


def render_json(report: Report) -> str:
    """One object: counts, notes, and the rows of the CSV, null where there is no number."""
    rows = json.loads(report_rows(report).round(6).to_json(orient="records"))
    jobs = report.jobs and asdict(report.jobs)
    content = {
        "total_records": report.total_records,
        "jobs": jobs,
        "notes": report.notes,
        "rows": rows,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


RENDERERS: dict[str, tuple[Callable[[Report], str], str]] = {
    "rich": (render_text, "txt"),
    "markdown": (render_markdown, "md"),
    "latex": (render_latex, "tex"),
    "csv": (render_csv, "csv"),
    "json": (render_json, "json"),
    "html": (render_html, "html"),
}
