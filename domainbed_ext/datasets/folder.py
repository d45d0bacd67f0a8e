"""Image files on the user's disk: ``domain/class/image`` folders and manifests that list files.

``--dataset folder:PATH`` and ``--dataset manifest:FILE`` need no code and no registration. Order
decides which image a split's key means, so it is DomainBed's: domains and classes alphabetical,
inside a class the sorted walk of its folder.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from domainbed_ext.datasets.base import (
    FileEnvironment,
    MultipleDomainDataset,
    backbone_image_size,
)
from domainbed_ext.errors import UsageError

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp"),
    *(".pgm", ".tif", ".tiff", ".webp"),
)
LAYOUT = "expected domain/class/image below it"
MANIFEST_COLUMNS = ("domain", "class", "path")
IMAGE_SIZE = 224


@dataclass(frozen=True)
class ImageIndex:
    """Which files there are: for each domain and class, paths in order."""

    paths: Mapping[str, Mapping[str, Sequence[str]]]

    @property
    def domains(self) -> list[str]:
        return list(self.paths)

    @property
    def class_names(self) -> list[str]:
        return list(next(iter(self.paths.values())))

    @property
    def num_images(self) -> int:
        return sum(len(files) for classes in self.paths.values() for files in classes.values())

    def environments(self, names: Sequence[str]) -> list[FileEnvironment]:
        """One environment per domain, called by `names`."""
        environments = []
        for name, classes in zip(names, self.paths.values(), strict=True):
            paths = [path for files in classes.values() for path in files]
            labels = [label for label, files in enumerate(classes.values()) for _ in files]
            environments.append(FileEnvironment(name, paths, labels))
        return environments


def scan_folder(root: str | os.PathLike[str], *, hint: str = "") -> ImageIndex:
    """Lists a ``domain/class/image`` folder.

    Args:
        root: The folder.
        hint: What to do when it is not there.
    """
    if not os.path.isdir(root):
        advice = f"; {hint}" if hint else ""
        raise UsageError(f"no data set folder at {os.fspath(root)} ({LAYOUT}){advice}")
    paths = {
        domain: {
            class_name: _image_files(os.path.join(root, domain, class_name))
            for class_name in _subfolders(os.path.join(root, domain))
        }
        for domain in _subfolders(root)
    }
    return checked_index(paths, os.fspath(root))


def read_manifest(path: str | os.PathLike[str]) -> ImageIndex:
    """Reads a CSV or JSON list of images with the columns domain, class and path.

    Relative paths start at the manifest's folder. JSON is a list of objects with these keys, or
    nested: domain to class to list of paths.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(
            f"no manifest at {file}; it lists one image per row, with the columns "
            f"{', '.join(MANIFEST_COLUMNS)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the manifest {file}: {error}") from error
    rows = _json_rows(text, file) if file.suffix.lower() == ".json" else _csv_rows(text, file)
    paths: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        domain, class_name, image = (str(row[column]).strip() for column in MANIFEST_COLUMNS)
        files = paths.setdefault(domain, {}).setdefault(class_name, [])
        files.append(os.path.join(file.parent, image))
    ordered = {
        domain: {name: sorted(classes[name]) for name in sorted(classes)}
        for domain, classes in sorted(paths.items())
    }
    return checked_index(ordered, str(file))


def checked_index(paths: Mapping[str, Mapping[str, Sequence[str]]], source: str) -> ImageIndex:
    """Refuses what no data set can be made of, naming the place."""
    if len(paths) < 2:
        found = f"only the domain {next(iter(paths))!r}" if paths else "no domain"
        raise UsageError(
            f"{source} holds {found}; domain generalization needs two or more, each with its "
            "classes below it"
        )
    if not any(files for classes in paths.values() for files in classes.values()):
        suffixes = " ".join(IMAGE_SUFFIXES)
        raise UsageError(f"no images in {source}; {LAYOUT}, with one of the endings {suffixes}")
    first, *others = paths
    for domain in others:
        extra = sorted(set(paths[domain]) - set(paths[first]))
        lacking = sorted(set(paths[first]) - set(paths[domain]))
        if extra or lacking:
            differences = [f"lacks {_some(lacking)}"] * bool(lacking)
            differences += [f"adds {_some(extra)}"] * bool(extra)
            raise UsageError(
                f"the classes of {source} differ between domains: compared with {first!r}, "
                f"{domain!r} {' and '.join(differences)}; give every domain the same classes"
            )
    for domain, classes in paths.items():
        for class_name, files in classes.items():
            if not files:
                raise UsageError(
                    f"class {class_name!r} of domain {domain!r} in {source} has no images; add "
                    "some, or remove the class from every domain"
                )
    return ImageIndex(paths)


def _some(names: Sequence[str]) -> str:
    listing = ", ".join(repr(name) for name in names[:5])
    return listing if len(names) <= 5 else f"{listing} and {len(names) - 5} more"


def _subfolders(folder: str | os.PathLike[str]) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.is_dir() and not entry.name.startswith((".", "__MACOSX"))
        )


def _image_files(folder: str) -> list[str]:
    return [
        os.path.join(place, name)
        for place, _, names in sorted(os.walk(folder, followlinks=True))
        for name in sorted(names)
        # macOS leaves "._picture.jpg" beside pictures; they are no images.
        if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("._")
    ]


def _csv_rows(text: str, file: Path) -> list[dict[str, str]]:
    reader = csv.DictReader(text.splitlines())
    _require_columns(reader.fieldnames or (), file, "its first line")
    rows = list(reader)
    for number, row in enumerate(rows, start=2):
        if any(not row[column] for column in MANIFEST_COLUMNS):
            raise UsageError(
                f"{file}, line {number}: a value is missing; each row needs "
                f"{', '.join(MANIFEST_COLUMNS)}"
            )
    return rows


def _json_rows(text: str, file: Path) -> list[dict[str, str]]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{file} is not valid JSON: {error}") from error
    if isinstance(content, dict):
        try:
            return [
                {"domain": domain, "class": class_name, "path": path}
                for domain, classes in content.items()
                for class_name, files in classes.items()
                for path in files
            ]
        except (AttributeError, TypeError):
            content = None
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise UsageError(
            f"{file}: expected a list of objects with {', '.join(MANIFEST_COLUMNS)}, or an object "
            "that maps each domain to its classes and each class to a list of paths"
        )
    for number, row in enumerate(content):
        _require_columns(row, file, f"entry {number}")
    return content


def _require_columns(found: Any, file: Path, place: str) -> None:
    missing = [column for column in MANIFEST_COLUMNS if column not in found]
    if missing:
        raise UsageError(
            f"the manifest {file} lacks {', '.join(missing)} in {place}, which has "
            f"{', '.join(map(str, found)) or 'nothing'}; needed are {', '.join(MANIFEST_COLUMNS)}"
        )


class ImageFileDataset(MultipleDomainDataset):
    """A data set of image files; `ENVIRONMENTS` names them in the index's order."""

    CHECKPOINT_FREQ = 300
    N_WORKERS = 2
    INPUT_SHAPE = (3, IMAGE_SIZE, IMAGE_SIZE)

    def __init__(
        self, index: ImageIndex, test_envs: Sequence[int], hparams: Mapping[str, Any]
    ) -> None:
        size = backbone_image_size(hparams) or IMAGE_SIZE
        super().__init__(
            index.environments(self.ENVIRONMENTS or index.domains),
            index.class_names,
            input_shape=(3, size, size),
            test_envs=test_envs,
            hparams=hparams,
        )


class IndexedDataset(ImageFileDataset):
    """What ``folder:PATH`` and ``manifest:FILE`` make classes of, with DomainBed's constructor."""

    INDEX: ClassVar[ImageIndex]

    def __init__(
        self, root: str | None, test_envs: Sequence[int], hparams: Mapping[str, Any]
    ) -> None:
        super().__init__(self.INDEX, test_envs, hparams)


def dataset_class_for(name: str) -> type[IndexedDataset]:
    """The class of ``folder:PATH`` or ``manifest:FILE``, whose place is read here."""
    kind, _, place = name.partition(":")
    if not place:
        raise UsageError(f"data set {name!r} names no place; write {kind}:PATH")
    path = Path(place).expanduser()
    index = scan_folder(path) if kind == "folder" else read_manifest(path)
    if len(index.class_names) == 1:
        only = index.class_names[0]
        raise UsageError(f"{path} holds only the class {only!r}; there is nothing to tell it from")
    return type(name, (IndexedDataset,), {"INDEX": index, "ENVIRONMENTS": tuple(index.domains)})
