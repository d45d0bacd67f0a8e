"""Archives from strangers, and the folders made of them."""

from __future__ import annotations

import functools
import gzip
import io
import json
import os
import random
import stat
import tarfile
import zipfile
from pathlib import PurePosixPath

import pytest

from domainbed_ext.datasets import archives as module
from domainbed_ext.datasets.archives import open_archive
from domainbed_ext.datasets.benchmark_files import install, place_of, remove_listed
from domainbed_ext.datasets.benchmarks import PACS, DomainNet, OfficeHome, TerraIncognita
from domainbed_ext.errors import UsageError


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path, files, mode="w:gz"):
    """Files by name; a content of None makes a pipe, a string a link to there."""
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            if content is None:
                entry.type = tarfile.FIFOTYPE
            elif isinstance(content, str):
                kind, _, entry.linkname = content.partition(":")
                entry.type = tarfile.SYMTYPE if kind == "sym" else tarfile.LNKTYPE
            else:
                entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def contents(path):
    found = {}
    with open_archive(path) as members:
        for member in members:
            with member.open() as file:
                found[str(member.name)] = file.read()
    return found


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_tars_of_any_compression(tmp_path, mode):
    files = {"a/b.jpg": b"one", "./c.jpg": b"two"}
    path = write_tar(tmp_path / "any name", files, mode)
    assert contents(path) == {"a/b.jpg": b"one", "c.jpg": b"two"}


def test_a_zip(tmp_path):
    path = write_zip(tmp_path / "x", {"a/": b"", "a/b.jpg": b"one"})
    assert contents(path) == {"a/b.jpg": b"one"}


def test_links_inside_are_followed(tmp_path):
    files = {"a/b.jpg": b"one", "a/c.jpg": "hard:a/b.jpg", "d/e.jpg": "sym:../a/b.jpg"}
    path = write_tar(tmp_path / "x.tar", files)
    assert set(contents(path).values()) == {b"one"}


BAD_NAMES = ["../evil.jpg", "a/../../evil.jpg", "/etc/evil.jpg", "..\\evil.jpg", "C:evil.jpg"]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_names_that_lead_elsewhere_are_refused(tmp_path, write, name):
    path = write(tmp_path / "x", {name: b"evil"})
    with pytest.raises(UsageError, match="would be written elsewhere"):
        contents(path)


@pytest.mark.parametrize(
    "link", ["sym:/etc/passwd", "sym:../../secret", "hard:../secret", "sym:../../a/b.jpg"]
)
def test_links_that_lead_elsewhere_are_refused(tmp_path, link):
    path = write_tar(tmp_path / "x.tar", {"a/b.jpg": b"one", "a/link.jpg": link})
    with pytest.raises(UsageError, match=r"link that leads elsewhere, 'a/link\.jpg'"):
        contents(path)


def test_other_things_are_refused(tmp_path):
    with pytest.raises(UsageError, match="device or pipe"):
        contents(write_tar(tmp_path / "pipe.tar", {"a/b.jpg": None}))
    entry = zipfile.ZipInfo("a/link.jpg")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(entry, "/etc/passwd")
    with pytest.raises(UsageError, match="holds a link"):
        contents(tmp_path / "link.zip")
    (tmp_path / "text").write_text("no archive")
    with pytest.raises(UsageError, match="neither a zip nor a tar"):
        contents(tmp_path / "text")
    with pytest.raises(UsageError, match="no archive at"):
        contents(tmp_path / "nothing")


def test_bombs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GROWTH_FREE", 1000)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/b.jpg", b"\0" * 10_000_000)
    with pytest.raises(UsageError, match="more than 100 times its size"):
        contents(tmp_path / "x.zip")


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz"])
def test_truncated_archives_are_said_to_be(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    files = {f"a/{i}.jpg": os.urandom(5000) for i in range(10)}
    if kind == "zip":
        write_zip(path, files)
    else:
        write_tar(path, files, {"tar": "w", "tar.gz": "w:gz", "tar.xz": "w:xz"}[kind])
    os.truncate(path, path.stat().st_size * 2 // 3)
    with pytest.raises(UsageError, match="fetch it again"):
        contents(path)


def test_a_tampered_zip_is_said_to_be(tmp_path):
    path = write_zip(tmp_path / "x.zip", {"a/b.jpg": b"one" * 100})
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match="damaged"):
        contents(path)


def write_deflated_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


WRITERS = {
    "zip": write_zip,
    "deflated zip": write_deflated_zip,
    "tar": functools.partial(write_tar, mode="w"),
    "tar.gz": functools.partial(write_tar, mode="w:gz"),
    "tar.bz2": functools.partial(write_tar, mode="w:bz2"),
    "tar.xz": functools.partial(write_tar, mode="w:xz"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_no_damage_is_silent(tmp_path, kind):
    """Cut off anywhere, or bits flipped anywhere: refused in one line, or it makes no difference.

    The exception are the contents of a tar that is not compressed: it has no checksum of them.
    """
    draw = random.Random(kind)
    files = {f"domain/class{i}/{i}.jpg": draw.randbytes(2000) for i in range(6)}
    good = WRITERS[kind](tmp_path / "good", files).read_bytes()
    path = tmp_path / "damaged"
    refusals = []
    for number in range(60):
        damaged = bytearray(good)
        if number % 2:
            del damaged[draw.randrange(len(good)) :]
        else:
            damaged[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            found = contents(path)
        except UsageError as error:
            refusals.append(str(error))
        else:
            assert found.keys() == files.keys()
            assert found == files or (kind == "tar" and not number % 2)
    assert len(refusals) >= 20
    assert not any("\n" in refusal for refusal in refusals)


def test_a_tar_without_an_end_is_cut_off(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a/1.jpg": b"1" * 512, "a/2.jpg": b"2" * 512}, "w")
    os.truncate(path, 2 * 512)  # right after the first file
    with pytest.raises(UsageError, match=r"damaged \(no further entry, and no end"):
        contents(path)


def test_a_tar_that_never_ends_is_not_read_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GROWTH_FREE", 1 << 20)
    path = write_tar(tmp_path / "x.tar", {"a/1.jpg": b"1"}, "w")
    path.write_bytes(gzip.compress(path.read_bytes() + bytes(5 << 20)))
    with pytest.raises(UsageError, match="does not end"):
        contents(path)


@pytest.mark.parametrize("target", ["sym:absent.jpg", "hard:a/absent.jpg", "sym:link.jpg"])
def test_links_to_nothing_are_said_to_be(tmp_path, target):
    path = write_tar(tmp_path / "x.tar", {"a/b.jpg": b"one", "a/link.jpg": target})
    with pytest.raises(UsageError, match=r"damaged \(a/link\.jpg is a link to nothing"):
        contents(path)


@pytest.mark.parametrize(
    ("dataset_class", "name", "place"),
    [
        (PACS, "kfold/art_painting/dog/pic_001.jpg", "art_painting/dog/pic_001.jpg"),
        (PACS, "x/PACS/sketch/dog/1.png", "sketch/dog/1.png"),
        (PACS, "photo/1.png", None),
        (PACS, "readme/1.png", None),
        (
            OfficeHome,
            "OfficeHomeDataset_10072016/RealWorld/Alarm_Clock/1.jpg",
            "Real World/Alarm_Clock/1.jpg",
        ),
        (OfficeHome, "Real World/Desk_Lamp/1.jpg", "Real World/Desk_Lamp/1.jpg"),
        (DomainNet, "real/airplane/real_002_000001.jpg", "real/airplane/real_002_000001.jpg"),
        (TerraIncognita, "t/location_38/cat/1.jpg", "location_38/cat/1.jpg"),
    ],
)
def test_places(dataset_class, name, place):
    found = place_of(PurePosixPath(name), dataset_class.DOMAIN_FOLDERS)
    assert found == (None if place is None else PurePosixPath(place))


def pacs_files(prefix="kfold/", per_class=1):
    return {
        f"{prefix}{domain}/class{label}/{i}.jpg": f"{domain} {label} {i}".encode()
        for domain in PACS.DOMAIN_FOLDERS
        for label in range(7)
        for i in range(per_class)
    }


def no_duplicates():
    raise AssertionError("not for this data set")


@pytest.fixture
def small_pacs(monkeypatch):
    monkeypatch.setattr(PACS, "DOMAIN_COUNTS", (7, 7, 7, 7))
    monkeypatch.setattr(PACS, "NUM_IMAGES", 28)


def test_install_makes_the_layout(tmp_path, small_pacs):
    files = {**pacs_files(), "kfold/splits.txt": b"", "__MACOSX/photo/class0/._0.jpg": b""}
    archive = write_zip(tmp_path / "x.zip", files)
    assert install(PACS, [archive], tmp_path, duplicates=no_duplicates, strict=True) is None
    path = tmp_path / "PACS" / "photo" / "class3" / "0.jpg"
    assert path.read_bytes() == b"photo 3 0"
    assert len(list((tmp_path / "PACS").glob("*/*/*"))) == 28
    assert sorted(p.name for p in tmp_path.iterdir()) == ["PACS", "x.zip"]


def test_install_leaves_nothing_of_a_wrong_archive(tmp_path, small_pacs):
    files = pacs_files()
    many = write_zip(tmp_path / "many.zip", pacs_files(per_class=2))
    evil = write_zip(tmp_path / "evil.zip", {**files, "../photo/class0/x.jpg": b""})
    other = write_zip(tmp_path / "other.zip", {"a/b/c.jpg": b""})
    for archive, message in [
        (many, "56 images in 7 classes"),
        (evil, "elsewhere"),
        (other, "no image of PACS .* art_painting, cartoon"),
    ]:
        with pytest.raises(UsageError, match=message):
            install(PACS, [archive], tmp_path, duplicates=no_duplicates, strict=True)
        assert sorted(p.suffix for p in tmp_path.iterdir()) == [".zip"] * 3
    problem = install(PACS, [many], tmp_path, duplicates=no_duplicates, strict=False)
    assert "56 images in 7 classes" in problem
    assert (tmp_path / "PACS").is_dir()


def test_terra_incognita_from_annotations(tmp_path, monkeypatch):
    """As in DomainBed: four places, ten classes, an image with two of them goes into both."""
    monkeypatch.setattr(TerraIncognita, "NUM_CLASSES", 2)
    monkeypatch.setattr(TerraIncognita, "DOMAIN_COUNTS", (2, 2, 2, 3))
    locations = ["100", 38, "43", "46"]
    images = [
        {"id": f"{loc}-{name}", "file_name": f"{loc}-{name}.jpg", "location": loc}
        for loc in [*locations, "7"]
        for name in ("cat", "dog", "car")
    ]
    images.append({"id": "both", "file_name": "both.jpg", "location": "46"})
    annotations = [
        {"image_id": image["id"], "category_id": {"cat": 6, "dog": 2, "car": 9}[name]}
        for image in images
        for name in [image["id"].rpartition("-")[2]]
        if name != "both"
    ]
    annotations += [{"image_id": "both", "category_id": label} for label in (6, 2, 6)]
    # 46 has cat, dog, and both twice: four files. One of its own is not in the archive.
    categories = [{"id": i, "name": n} for i, n in ((6, "cat"), (2, "dog"), (9, "car"))]
    halves = [
        {"images": images, "annotations": annotations[::2], "categories": categories},
        {"images": images, "annotations": annotations[1::2], "categories": categories},
    ]
    labels = write_tar(
        tmp_path / "annotations.tar.gz",
        {f"x/{i}_annotations.json": json.dumps(half).encode() for i, half in enumerate(halves)},
    )
    pictures = write_tar(
        tmp_path / "images.tar.gz",
        {
            f"eccv/{image['file_name']}": image["id"].encode() + b" " * 500
            for image in images
            if image["id"] != "46-dog"
        },
    )
    archives = [pictures, labels]
    problem = install(TerraIncognita, archives, tmp_path, duplicates=no_duplicates, strict=False)
    root = tmp_path / "terra_incognita"
    found = sorted(str(path.relative_to(root)) for path in root.glob("*/*/*"))
    expected = [f"location_{k}/{n}/{k}-{n}.jpg" for k in (100, 38, 43, 46) for n in ("cat", "dog")]
    expected.remove("location_46/dog/46-dog.jpg")
    expected += ["location_46/cat/both.jpg", "location_46/dog/both.jpg"]
    assert found == sorted(expected)
    assert problem is None


def test_domain_nets_duplicates_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(DomainNet, "NUM_CLASSES", 1)
    monkeypatch.setattr(DomainNet, "DOMAIN_COUNTS", (2, 3, 3, 3, 3, 2))
    parts = [
        write_zip(
            tmp_path / f"{domain}.zip", {f"{domain}/ant/{domain}_{i}.jpg": b"" for i in range(3)}
        )
        for domain in DomainNet.DOMAIN_FOLDERS
    ]
    listing = tmp_path / "list.txt"
    listing.write_text("clipart/ant/clipart_1.jpg\nsketch/ant/sketch_0.jpg\nreal/ant/gone.jpg\n\n")
    problem = install(DomainNet, parts, tmp_path, duplicates=lambda: listing, strict=True)
    assert problem is None
    root = tmp_path / "domain_net"
    assert len(list(root.glob("*/*/*"))) == 16
    assert not (root / "clipart" / "ant" / "clipart_1.jpg").exists()
    listing.write_text("../list.txt\n")
    with pytest.raises(UsageError, match="names a file elsewhere"):
        remove_listed(root, listing)
