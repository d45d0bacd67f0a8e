"""Where the field's benchmarks can be had. Links die: several places each, the published one first.

Checksums are those that other public programs list for the archives of DomainBed's own script and
for DomainNet's. Mirrors on the Hugging Face hub are checked by the number of images.
"""

from __future__ import annotations

from dataclasses import dataclass

_DRIVE = "https://drive.usercontent.google.com/download?id={}&export=download&confirm=t"
_HUB = "https://huggingface.co/datasets/PTeterwak/DomainBed_EasyHard/resolve/main/"
_BU = "http://csr.bu.edu/ftp/visda/2019/multi-source/"
_LILA = "https://storage.googleapis.com/public-datasets-lila/caltechcameratraps/"
_LILA_AZURE = "https://lilablobssc.blob.core.windows.net/caltechcameratraps/"


@dataclass(frozen=True)
class Remote:
    """A file to download.

    Attributes:
        url: Where.
        name: What to call it.
        md5, sha256, num_bytes: What it must be, as far as known.
    """

    url: str
    name: str
    md5: str | None = None
    sha256: str | None = None
    num_bytes: int | None = None


@dataclass(frozen=True)
class Source:
    """Archives that make a data set together.

    Attributes:
        title: What messages call the place.
        files: All are needed.
    """

    title: str
    files: tuple[Remote, ...]


def _mirrors(name: str) -> tuple[Source, ...]:
    """A research mirror that has each data set as a whole and, surely, in two parts."""
    title = "Hugging Face PTeterwak/DomainBed_EasyHard"
    whole = Remote(f"{_HUB}all/{name}.tar.gz", f"{name}-all.tar.gz")
    parts = tuple(
        Remote(f"{_HUB}{part}/{name}.tar.gz", f"{name}-{part}.tar.gz") for part in ("easy", "hard")
    )
    return Source(f"{title}, all", (whole,)), Source(f"{title}, easy and hard", parts)


def _lila(title: str, base: str) -> Source:
    return Source(
        title,
        (
            Remote(
                f"{base}eccv_18_annotations.tar.gz",
                "eccv_18_annotations.tar.gz",
                num_bytes=2_997_071,
            ),
            Remote(
                f"{base}eccv_18_all_images_sm.tar.gz",
                "eccv_18_all_images_sm.tar.gz",
                num_bytes=6_492_615_601,
            ),
        ),
    )


SOURCES: dict[str, tuple[Source, ...]] = {
    "PACS": (
        Source(
            "DomainBed's copy on Google Drive",
            (
                Remote(
                    _DRIVE.format("1JFr8f805nMUelQWWmfnJR3y4_SYoN5Pd"),
                    "PACS.zip",
                    md5="fd5db817f7cdafeef3bfd525aaf9b42e",
                ),
            ),
        ),
        *_mirrors("PACS"),
    ),
    "VLCS": (
        Source(
            "DomainBed's copy on Google Drive",
            (
                Remote(
                    _DRIVE.format("1skwblH1_okBwxWxmRsp9_qi15hyPpxg8"),
                    "VLCS.tar.gz",
                    md5="8870171eba660927d9668f4e515928e4",
                ),
            ),
        ),
        *_mirrors("VLCS"),
    ),
    "OfficeHome": (
        Source(
            "DomainBed's copy on Google Drive",
            (
                Remote(
                    _DRIVE.format("1uY0pj7oFsjMxRwaD3Sxy0jgel0fsYXLC"),
                    "office_home.zip",
                    md5="b1c14819770c4448fd5b6d931031c91c",
                ),
            ),
        ),
        *_mirrors("office_home"),
    ),
    "TerraIncognita": (
        _lila("LILA's public bucket", _LILA),
        _lila("LILA's former bucket", _LILA_AZURE),
        *_mirrors("terra_incognita"),
    ),
    "DomainNet": (
        Source(
            "Boston University",
            (
                Remote(
                    f"{_BU}groundtruth/clipart.zip",
                    "clipart.zip",
                    md5="cd0d8f2d77a4e181449b78ed62bccf1e",
                ),
                Remote(
                    f"{_BU}infograph.zip", "infograph.zip", md5="720380b86f9e6ab4805bb38b6bd135f8"
                ),
                Remote(
                    f"{_BU}groundtruth/painting.zip",
                    "painting.zip",
                    md5="1ae32cdb4f98fe7ab5eb0a351768abfd",
                ),
                Remote(
                    f"{_BU}quickdraw.zip", "quickdraw.zip", md5="bdc1b6f09f277da1a263389efe0c7a66"
                ),
                Remote(f"{_BU}real.zip", "real.zip", md5="dcc47055e8935767784b7162e7c7cca6"),
                Remote(f"{_BU}sketch.zip", "sketch.zip", md5="658d8009644040ff7ce30bb2e820850f"),
            ),
        ),
        *_mirrors("domain_net"),
    ),
}

# DomainBed's list of DomainNet's duplicates: 9,431 lines, fetched when needed, never shipped.
DUPLICATES = Remote(
    "https://raw.githubusercontent.com/facebookresearch/DomainBed/main/domainbed/misc/"
    "domain_net_duplicates.txt",
    "domain_net_duplicates.txt",
    sha256="a52b4ab70203f4f3df381077694dba3e33ff44c26407e1c5faca76919c702770",
)

# Where people find it with a browser.
_SHARED = (
    "https://huggingface.co/datasets/PTeterwak/DomainBed_EasyHard, or from the copies that users "
    "share at https://github.com/facebookresearch/DomainBed/issues/165"
)
BY_HAND = {
    "PACS": _SHARED,
    "VLCS": _SHARED,
    "OfficeHome": "https://www.hemanthdv.org/officeHomeDataset.html",
    "TerraIncognita": "https://lila.science/datasets/caltech-camera-traps (the ECCV 2018 benchmark "
    "images and their annotations)",
    "DomainNet": "http://ai.bu.edu/M3SDA/ (the six zip files, the cleaned version)",
}
