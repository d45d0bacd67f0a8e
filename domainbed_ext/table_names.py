"""The names in tables, in the order they are printed: data sets, algorithms, environments."""

from __future__ import annotations

from collections.abc import Sequence

from domainbed_ext.errors import UsageError
from domainbed_ext.hparams import order_algorithms
from domainbed_ext.records import Record
from domainbed_ext.selection import num_environments

AVERAGE = "Avg"

_SPAWRIOUS = ("Test", "SC_group_1", "SC_group_2")
# DomainBed's data sets in its order, with the short names its tables give the environments.
UPSTREAM_ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "Debug28": ("0", "1", "2"),
    "Debug224": ("0", "1", "2"),
    "ColoredMNIST": ("+90%", "+80%", "-90%"),
    "RotatedMNIST": ("0", "15", "30", "45", "60", "75"),
    "VLCS": ("C", "L", "S", "V"),
    "PACS": ("A", "C", "P", "S"),
    "OfficeHome": ("A", "C", "P", "R"),
    "TerraIncognita": ("L100", "L38", "L43", "L46"),
    "DomainNet": ("clip", "info", "paint", "quick", "real", "sketch"),
    "SVIRO": ("aclass", "escape", "hilux", "i3", "lexus", "tesla", "tiguan", "tucson", "x5", "zoe"),
    "WILDSCamelyon": tuple(f"hospital_{i}" for i in range(5)),
    "WILDSFMoW": tuple(f"region_{i}" for i in range(6)),
    **{
        f"Spawrious{kind}_{level}": _SPAWRIOUS
        for kind in ("O2O", "M2M")
        for level in ("easy", "medium", "hard")
    },
}
DATASET_ORDER: tuple[str, ...] = (
    *UPSTREAM_ENVIRONMENTS,
    "RotatedDigits",
    "ColoredDigits",
    "EmojiDG",
    "EmojiDG6",
)


def dataset_names(records: Sequence[Record]) -> list[str]:
    """The data sets of the records, DomainBed's first and in its order, then ours, then folders and
    manifests.
    """
    present = sorted({record["args"]["dataset"] for record in records})
    return [name for name in DATASET_ORDER if name in present] + [
        n for n in present if n not in DATASET_ORDER
    ]


def algorithm_names(records: Sequence[Record], dataset: str) -> list[str]:
    """The algorithms that have records on a data set, in the order of table rows."""
    return order_algorithms(
        r["args"]["algorithm"] for r in records if r["args"]["dataset"] == dataset
    )


def environment_names(dataset: str, records: Sequence[Record]) -> list[str]:
    """The names of a data set's environments: DomainBed's short ones, those in the records, or the
    data set's own.
    """
    if dataset in UPSTREAM_ENVIRONMENTS:
        return list(UPSTREAM_ENVIRONMENTS[dataset])
    own = [record for record in records if record["args"]["dataset"] == dataset]
    recorded = {
        tuple(names) for r in own if (names := (r.get("provenance") or {}).get("environments"))
    }
    if len(recorded) > 1:
        shown = " and ".join(str(list(names)) for names in sorted(recorded)[:2])
        raise UsageError(
            f"records of {dataset} disagree on its environments: {shown}; "
            "collect them from separate folders"
        )
    if recorded:
        return [str(name) for name in recorded.pop()]
    known = _registered_environments(dataset)
    return known or [
        f"env{env}" for env in range(max((num_environments([r]) for r in own), default=0))
    ]


def _registered_environments(dataset: str) -> list[str]:
    # Imported here: it may bring torch along, which reading most tables does without.
    from domainbed_ext.datasets import environment_names as registered

    try:
        return [str(name) for name in registered(dataset)]
    except (ValueError, KeyError, OSError):
        # A folder that is not on this machine, or a data set registered elsewhere.
        return []
