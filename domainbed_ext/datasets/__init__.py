"""The data sets: embedded, fetched and on the disk, all in DomainBed's form.

Importing this package imports nothing heavy: a data set's module is loaded when it is asked for.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from domainbed_ext.errors import UsageError

if TYPE_CHECKING:
    from domainbed_ext.datasets.base import MultipleDomainDataset

DEFAULT_DATA_DIR = "data"

_MODULES = {
    "Debug28": "debug",
    "Debug224": "debug",
    "RotatedDigits": "digits",
    "ColoredDigits": "digits",
    "EmojiDG": "emoji",
    "EmojiDG6": "emoji",
    "PACS": "benchmarks",
    "VLCS": "benchmarks",
    "OfficeHome": "benchmarks",
    "TerraIncognita": "benchmarks",
    "DomainNet": "benchmarks",
}
DATASETS = list(_MODULES)
EMBEDDED_DATASETS = ["Debug28", "Debug224", "RotatedDigits", "ColoredDigits"]


def get_dataset_class(name: str) -> type[MultipleDomainDataset]:
    """The class of a name in `DATASETS`, or of ``folder:PATH`` or ``manifest:FILE``."""
    if name.startswith(("folder:", "manifest:")):
        from domainbed_ext.datasets.folder import dataset_class_for

        return dataset_class_for(name)
    if name not in _MODULES:
        close = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.5)
        guess = f" (did you mean {close[0]}?)" if close else ""
        raise UsageError(
            f"unknown data set {name!r}{guess}; choose among {', '.join(DATASETS)}, folder:PATH "
            "(domain/class/image) or manifest:FILE"
        )
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def environment_names(name: str) -> list[str]:
    """Names of a data set's environments, in the order that `test_envs` indexes."""
    return list(get_dataset_class(name).ENVIRONMENTS)


def num_environments(name: str) -> int:
    """Number of a data set's environments."""
    return len(environment_names(name))


@dataclass(frozen=True)
class FoundDataset:
    """A data set that is there.

    Attributes:
        name: In `DATASETS`.
        path: Where; None for an embedded one.
        num_images: How many it holds; 0 if it cannot be read.
        problem: What is wrong with it, or how it differs from the published copy; None if nothing.
    """

    name: str
    path: Path | None
    num_images: int
    problem: str | None = None


def find_datasets(data_dir: str | Path = DEFAULT_DATA_DIR) -> list[FoundDataset]:
    """What can be trained on: the embedded data sets and those below ``data_dir``."""
    found = [FoundDataset("Debug28", None, 48), FoundDataset("Debug224", None, 48)]
    found += [FoundDataset("RotatedDigits", None, 1797), FoundDataset("ColoredDigits", None, 1797)]
    return found + _find_emojidg(Path(data_dir)) + _find_benchmarks(Path(data_dir))


def _find_emojidg(data_dir: Path) -> list[FoundDataset]:
    from domainbed_ext.datasets.emoji import (
        CACHE_FOLDER,
        CACHE_INDEX,
        IMAGE_SIZE,
        load_domains,
        read_index,
    )

    folder = data_dir / CACHE_FOLDER
    if not (folder / CACHE_INDEX).is_file():
        return []
    try:
        domains = read_index(folder)["domains"]
    except UsageError as error:
        return [FoundDataset("EmojiDG", folder, 0, str(error))]
    found = []
    for name in ("EmojiDG", "EmojiDG6"):
        environments = environment_names(name)
        if not all(environment in domains for environment in environments):
            continue
        try:
            loaded = load_domains(folder, environments, size=IMAGE_SIZE)
        except UsageError as error:
            found.append(FoundDataset(name, folder, 0, str(error)))
            continue
        found.append(FoundDataset(name, folder, sum(map(len, loaded))))
    return found


def _find_benchmarks(data_dir: Path) -> list[FoundDataset]:
    from domainbed_ext.datasets import benchmarks

    found = []
    for name in (name for name, module in _MODULES.items() if module == "benchmarks"):
        dataset_class = getattr(benchmarks, name)
        folder = data_dir / dataset_class.FOLDER
        if not folder.is_dir():
            continue
        try:
            index = dataset_class.index(data_dir)
        except UsageError as error:
            found.append(FoundDataset(name, folder, 0, str(error)))
            continue
        problem = dataset_class.count_problem(index)
        found.append(FoundDataset(name, folder, index.num_images, problem))
    return found
