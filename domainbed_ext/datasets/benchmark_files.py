"""Makes a benchmark's folder out of archives: domain/class/image, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from domainbed_ext.datasets.archives import Member, open_archive
from domainbed_ext.datasets.benchmarks import Benchmark, DomainNet, TerraIncognita
from domainbed_ext.datasets.folder import IMAGE_SUFFIXES
from domainbed_ext.errors import UsageError

PARTIAL = ".partial"
TERRA_CLASSES = (
    *("bird", "bobcat", "cat", "coyote", "dog"),
    *("empty", "opossum", "rabbit", "raccoon", "squirrel"),
)
ANNOTATIONS = "_annotations.json"

# Other names of domains, without blanks and the like.
_ALIASES = {
    "caltech": "Caltech101",
    "sun": "SUN09",
    "voc": "VOC2007",
    "pascal": "VOC2007",
    "voc2007": "VOC2007",
    "real": "Real World",
    "l100": "location_100",
    "l38": "location_38",
    "l43": "location_43",
    "l46": "location_46",
}


def install(
    dataset_class: type[Benchmark],
    archives: Sequence[Path],
    data_dir: Path,
    *,
    duplicates: Callable[[], Path],
    strict: bool,
    progress: Callable[[int], object] | None = None,
) -> str | None:
    """Unpacks archives into the data set's folder, which must not be there yet.

    Args:
        dataset_class: Which.
        archives: All that are needed.
        data_dir: Where data sets are kept.
        duplicates: Gives DomainNet's list of duplicates; called if the images are too many.
        strict: Refuse a number of images that no known copy has.
        progress: Called with the number of images so far.

    Returns:
        How the copy differs from the published one, or None.

    Raises:
        UsageError: The archives are not what is needed; nothing is left behind.
    """
    folder = data_dir / dataset_class.FOLDER
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _unpack(dataset_class, archives, partial, progress)
        problem = _checked(dataset_class, partial)
        if problem and dataset_class is DomainNet:
            remove_listed(partial, duplicates())
            problem = _checked(dataset_class, partial)
        known = dataset_class.is_known_copy(dataset_class.index_of(partial))
        if strict and not known:
            raise UsageError(str(problem))
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return problem


def _checked(dataset_class: type[Benchmark], folder: Path) -> str | None:
    index = dataset_class.index_of(folder)
    if len(index.class_names) != dataset_class.NUM_CLASSES:
        raise UsageError(
            f"the archives hold {len(index.class_names)} classes of {dataset_class.__name__}, "
            f"which has {dataset_class.NUM_CLASSES}"
        )
    return dataset_class.count_problem(index)


def _unpack(
    dataset_class: type[Benchmark],
    archives: Sequence[Path],
    folder: Path,
    progress: Callable[[int], object] | None,
) -> None:
    wanted = _terra_places(archives) if dataset_class is TerraIncognita else {}
    count = 0
    for archive in archives:
        with open_archive(archive) as members:
            for member in members:
                if wanted:
                    places = sorted(wanted.get(member.name.name, ()))
                else:
                    place = place_of(member.name, dataset_class.DOMAIN_FOLDERS)
                    places = [] if place is None else [place]
                if not places or not _is_image(member):
                    continue
                for place in places:
                    member.write_to(folder / place)
                count += len(places)
                if progress is not None and count % 100 < len(places):
                    progress(count)
    if not count:
        domains = ", ".join(dataset_class.DOMAIN_FOLDERS)
        raise UsageError(
            f"no image of {dataset_class.__name__} in {', '.join(map(str, archives))}; expected "
            f"domain/class/image with the domains {domains}"
        )


def place_of(name: PurePosixPath, domains: Sequence[str]) -> PurePosixPath | None:
    """Where a file belongs, by the first folder that is a domain: domain/class/rest."""
    plain = {_plain(domain): domain for domain in domains}
    plain.update({alias: name for alias, name in _ALIASES.items() if name in domains})
    for position, part in enumerate(name.parts[:-2]):
        domain = plain.get(_plain(part))
        if domain is not None:
            return PurePosixPath(domain, *name.parts[position + 1 :])
    return None


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _is_image(member: Member) -> bool:
    name = member.name.name
    outside = any(part.startswith(("__MACOSX", ".")) for part in member.name.parts)
    return name.lower().endswith(IMAGE_SUFFIXES) and not outside


def _terra_places(archives: Sequence[Path]) -> dict[str, set[PurePosixPath]]:
    """For each file name where it goes, from the annotations; empty where there are none.

    As in DomainBed, an image with several of the classes goes into each.
    """
    images: dict[str, tuple[str, str]] = {}  # id: (file name, location)
    classes: dict[int, str] = {}
    labels: dict[str, set[int]] = defaultdict(set)
    for content in _annotations(archives):
        classes.update({entry["id"]: entry["name"] for entry in content["categories"]})
        for image in content["images"]:
            images[image["id"]] = (PurePosixPath(image["file_name"]).name, str(image["location"]))
        for annotation in content["annotations"]:
            labels[annotation["image_id"]].add(annotation["category_id"])
    places: dict[str, set[PurePosixPath]] = {}
    for identity, (file_name, location) in images.items():
        domain = f"location_{location}"
        names = {classes[label] for label in labels[identity] if label in classes}
        if domain in TerraIncognita.DOMAIN_FOLDERS and names & set(TERRA_CLASSES):
            places[file_name] = {
                PurePosixPath(domain, name, file_name) for name in names & set(TERRA_CLASSES)
            }
    return places


def _annotations(archives: Sequence[Path]) -> Iterator[dict]:
    # The small archive is the one with the annotations: do not read through the images for them.
    for archive in sorted(archives, key=lambda path: path.stat().st_size if path.exists() else 0):
        found = False
        with open_archive(archive) as members:
            for member in members:
                if member.name.name.endswith(ANNOTATIONS):
                    found = True
                    with member.open() as file:
                        try:
                            yield json.load(file)
                        except ValueError as error:
                            raise UsageError(
                                f"{member.name} in {archive} is not valid JSON: {error}"
                            ) from error
                elif not found and _is_image(member):
                    break
        if found:
            return


def remove_listed(folder: Path, listing: Path) -> int:
    """Deletes the files that a list names, one a line, relative to the folder. Returns how many."""
    count = 0
    for line in listing.read_text(encoding="utf-8").splitlines():
        place = PurePosixPath(line.strip())
        if not place.parts:
            continue
        if place.is_absolute() or ".." in place.parts:
            raise UsageError(f"{listing} names a file elsewhere, {line.strip()!r}; it is not used")
        path = folder / place
        if path.is_file():
            path.unlink()
            count += 1
    return count
