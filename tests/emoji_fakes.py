"""Small stand-ins for EmojiDG's archives and cache: tests never fetch the real ones."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile

import numpy as np

from domainbed_ext.datasets.emoji import (
    CACHE_FORMAT,
    CACHE_INDEX,
    EMOJI_CLASSES,
    IMAGE_SIZE,
    EmojiDG6,
    label_table,
)
from domainbed_ext.datasets.emoji_archives import EmojiArchive

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 36 36">'
    '<circle fill="{color}" cx="18" cy="18" r="9"/></svg>'
)


def write_wheel(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)


def write_tgz(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def svg_archive(folder, domain, prefix, colors, client="pip"):
    """A wheel with one coloured disc per code point, and its pin."""
    path = folder / f"{domain}-1.0-py3-none-any.whl"
    write_wheel(path, {f"{prefix}{code}.svg": SVG.format(color=c) for code, c in colors.items()})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return EmojiArchive(domain, client, f"{domain}==1.0", path.name, digest, len(colors))


def write_cache(data_dir, domains=EmojiDG6.ENVIRONMENTS, per_class=10, lacking=3):
    """A cache of flat grey images whose value is the label; each domain lacks some code points."""
    folder = data_dir / "EmojiDG"
    folder.mkdir(parents=True)
    table = [
        [label for label in label_table() if label.class_name == class_name][:per_class]
        for class_name in EMOJI_CLASSES
    ]
    entries = {}
    for number, domain in enumerate(domains):
        drawn = [label for labels in table for label in labels]
        del drawn[number * lacking : (number + 1) * lacking]
        labels = [EMOJI_CLASSES.index(label.class_name) for label in drawn]
        images = np.ones((len(drawn), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        images *= np.array(labels, np.uint8)[:, None, None, None]
        np.save(folder / f"{domain}.npy", images)
        entries[domain] = {
            "file": f"{domain}.npy",
            "codepoints": [label.codepoint for label in drawn],
            "labels": labels,
        }
    index = {"format": CACHE_FORMAT, "image_size": IMAGE_SIZE, "domains": entries}
    (folder / CACHE_INDEX).write_text(json.dumps(index), encoding="utf-8")
    return folder
