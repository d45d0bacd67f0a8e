"""Draws EmojiDG: one small picture per code point and artist, rendered once into a cache.

The cache is the folder ``EmojiDG`` with one uint8 array ``(n, 64, 64, 3)`` per domain and an index,
``emojidg.json``, that names code points, labels, classes and the hash of each array. Every file
appears atomically and the index last, so a killed build leaves what was there before.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from domainbed_ext.datasets.emoji import (
    CACHE_FOLDER,
    CACHE_FORMAT,
    CACHE_INDEX,
    EMOJI_CLASSES,
    IMAGE_SIZE,
    label_table,
)
from domainbed_ext.datasets.emoji_archives import (
    ARCHIVES,
    ArchiveReader,
    EmojiArchive,
    fetch_archives,
    file_sha256,
    local_archives,
)
from domainbed_ext.datasets.emoji_drawings import DRAWERS, to_square
from domainbed_ext.errors import UsageError

Progress = Callable[[str, int, int], None]  # (domain, images done, images in all)


def build_emojidg(
    data_dir: str | os.PathLike[str],
    *,
    npm: bool = False,
    archives: str | os.PathLike[str] | None = None,
    rebuild: bool = False,
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> list[str]:
    """Makes sure the cache below ``data_dir`` holds EmojiDG's domains.

    Args:
        npm: also the two domains of EmojiDG6, which npm fetches.
        archives: a folder that already holds the archives; nothing is fetched then.
        rebuild: draw again even what is there and intact.
        progress: called after each image.
        announce: told in a line before archives are fetched.

    Returns:
        The domains that had to be drawn; empty when everything was there.
    """
    folder = Path(data_dir) / CACHE_FOLDER
    wanted = [archive for archive in ARCHIVES if archive.client == "pip" or npm]
    kept = {} if rebuild else intact_domains(folder)
    todo = [archive for archive in wanted if archive.domain not in kept]
    if not todo:
        return []
    _require_renderer()
    if archives is not None:
        paths = local_archives(todo, Path(archives))
    else:
        paths = fetch_archives(todo, folder / "archives", announce=announce)
    folder.mkdir(parents=True, exist_ok=True)
    entries = dict(kept)
    for archive in todo:
        entries[archive.domain] = _build_domain(archive, paths[archive.domain], folder, progress)
        _write_index(folder, {a.domain: entries[a.domain] for a in ARCHIVES if a.domain in entries})
    return [archive.domain for archive in todo]


def intact_domains(folder: Path) -> dict[str, dict[str, Any]]:
    """Index entries of the cached domains that today's archives gave and that are undamaged."""
    try:
        index = json.loads((folder / CACHE_INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if index.get("format") != CACHE_FORMAT or index.get("image_size") != IMAGE_SIZE:
        return {}
    pins = {archive.domain: archive.sha256 for archive in ARCHIVES}
    return {
        domain: entry
        for domain, entry in index["domains"].items()
        if entry.get("archive_sha256") == pins.get(domain)
        and (folder / entry["file"]).is_file()
        and file_sha256(folder / entry["file"]) == entry["sha256"]
    }


def _build_domain(
    archive: EmojiArchive, path: Path, folder: Path, progress: Progress | None
) -> dict[str, Any]:
    draw = DRAWERS[archive.domain](ArchiveReader(path))
    table = label_table()
    images, drawn = [], []
    for done, label in enumerate(table, start=1):
        if (drawing := draw(label.codepoint)) is not None:
            images.append(to_square(drawing))
            drawn.append(label)
        if progress is not None:
            progress(archive.domain, done, len(table))
    if len(images) != archive.num_images:
        raise RuntimeError(
            f"{archive.domain}: drew {len(images)} images, expected {archive.num_images}; the "
            "installed resvg-py or pillow cannot draw all of them"
        )
    target = folder / f"{archive.domain}.npy"
    buffer = io.BytesIO()
    np.save(buffer, np.stack(images))
    _write_atomically(target, buffer.getvalue())
    return {
        "file": target.name,
        "sha256": file_sha256(target),
        "archive": archive.requirement,
        "archive_sha256": archive.sha256,
        "codepoints": [label.codepoint for label in drawn],
        "labels": [EMOJI_CLASSES.index(label.class_name) for label in drawn],
    }


def _write_index(folder: Path, domains: dict[str, dict[str, Any]]) -> None:
    index = {
        "format": CACHE_FORMAT,
        "image_size": IMAGE_SIZE,
        "classes": list(EMOJI_CLASSES),
        "domains": domains,
    }
    _write_atomically(folder / CACHE_INDEX, json.dumps(index, indent=1).encode())


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _require_renderer() -> None:
    try:
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "drawing EmojiDG needs resvg-py; install the extra: pip install 'gmoe-ltdr[emoji]'"
        ) from error
