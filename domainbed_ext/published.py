"""Numbers that papers and repositories have published, to stand beside ours and never among them.

    from domainbed_ext.published import published_frame

    published_frame(["gmoe", "ltdr"]).query("dataset == 'PACS'")

One CSV file per source, one number a row, in `results/reference` of the repository, which is
`domainbed_ext/reference` too and goes into the wheel. The columns:

    source, year, table   whose number it is, and where it stands
    quoted_by             who it was taken from, where not from the source itself
    dataset, environment  DomainBed's names; "Avg" is the mean over environments
    algorithm, backbone   as the source calls them, and what it starts from
    protocol, selection   what was held out; how the model was selected, or "not stated"
    mean, stderr          accuracy and spread in percent, as printed
    note                  what else a reader has to know
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from domainbed_ext.errors import UsageError

PUBLISHED_COLUMNS = (
    "source",
    "year",
    "table",
    "quoted_by",
    "dataset",
    "environment",
    "algorithm",
    "backbone",
    "protocol",
    "selection",
    "mean",
    "stderr",
    "note",
)
NOT_STATED = "not stated"

_FOLDER = Path(__file__).parent / "reference"


def published_sources() -> list[str]:
    """The sources there are: the names of their files."""
    return sorted(path.stem for path in _FOLDER.glob("*.csv"))


def published_frame(sources: Iterable[str] | None = None) -> pd.DataFrame:
    """The published numbers of these sources, or of all; the columns are `PUBLISHED_COLUMNS`."""
    known = published_sources()
    if not known:
        raise UsageError(f"{_FOLDER} holds no published numbers; install the package again")
    wanted = known if sources is None else list(dict.fromkeys(sources))
    for source in wanted:
        if source not in known:
            raise UsageError(f"no published numbers of {source!r}; choose among {', '.join(known)}")
    files = [_FOLDER / f"{source}.csv" for source in wanted]
    frame = pd.concat(
        [pd.read_csv(file, dtype=str, keep_default_na=False) for file in files], ignore_index=True
    )
    numbers = {name: pd.to_numeric(frame[name]) for name in ("year", "mean", "stderr")}
    return frame.assign(**numbers).astype({"year": "Int64", "mean": float, "stderr": float})
