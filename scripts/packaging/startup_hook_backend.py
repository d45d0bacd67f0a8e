"""The build backend: setuptools, plus one `.pth` line in every wheel it makes.

`python -m domainbed.scripts.sweep` has to work straight after `pip install`, with or without a
DomainBed checkout. Python offers one way to run code before `-m` looks for its module: a `.pth`
file in site-packages. setuptools has no option for such a file, and its usual work-arounds lose it
in editable installs. Adding it to the finished wheel covers `pip install .` and
`pip install -e .` alike, and a RECORD line makes uninstalling remove it.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import zipfile
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

# .pth files run in alphabetical order; this one has to come after setuptools' "__editable__.*".
PTH_NAME = "gmoe_ltdr_startup.pth"
# One line, because `site` runs each line by itself. A package that is no longer there (a moved
# editable checkout) must not print a traceback at every start of Python.
PTH_LINE = r'import sys; exec("try:\n import domainbed_ext._startup\nexcept ImportError: pass")'


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """Builds the wheel and adds the start-up line."""
    # setuptools packs whatever an earlier build left there, modules deleted since included.
    shutil.rmtree(Path("build", "lib"), ignore_errors=True)
    name = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    add_startup_line(Path(wheel_directory) / name)
    return name


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """Builds the editable wheel and adds the start-up line."""
    name = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    add_startup_line(Path(wheel_directory) / name)
    return name


def add_startup_line(wheel: Path) -> None:
    """Writes the `.pth` file and its RECORD line into a wheel, which is replaced in one go."""
    content = (PTH_LINE + "\n").encode()
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    record_line = f"{PTH_NAME},sha256={digest},{len(content)}\n".encode()
    unfinished = wheel.with_suffix(".unfinished")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(unfinished, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                # The wheel format wants RECORD last, so the new file goes in front of it.
                pth_entry = zipfile.ZipInfo(PTH_NAME, date_time=entry.date_time)
                pth_entry.external_attr = 0o644 << 16
                new.writestr(pth_entry, content, zipfile.ZIP_DEFLATED)
                data = data + record_line
            new.writestr(entry, data)
    os.replace(unfinished, wheel)
