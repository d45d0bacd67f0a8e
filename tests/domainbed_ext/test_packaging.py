"""Both kinds of install put the start-up line into site-packages, and uninstalling removes it."""

from __future__ import annotations

import base64
import configparser
import csv
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PTH_NAME = "gmoe_ltdr_startup.pth"
PUBLISHED_IN_USE = """
from domainbed_ext.published import published_frame, published_sources
assert len(published_frame()) > 100
print(*(f"{source}.csv" for source in published_sources()))
"""

pytest.importorskip("setuptools", minversion="70.1", reason="building needs setuptools>=70.1")


def test_backend_adds_the_line_and_its_record(tmp_path):
    backend = _load_backend()
    wheel = tmp_path / "x-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("x.py", "")
        file.writestr("x-1.dist-info/RECORD", "x.py,,\nx-1.dist-info/RECORD,,\n")
    backend.add_startup_line(wheel)
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]
    with zipfile.ZipFile(wheel) as file:
        assert file.namelist() == ["x.py", PTH_NAME, "x-1.dist-info/RECORD"]
        content = file.read(PTH_NAME)
        rows = list(csv.reader(io.StringIO(file.read("x-1.dist-info/RECORD").decode())))
    assert content.count(b"\n") == 1
    assert content.startswith(b"import ")
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    assert rows[-1] == [PTH_NAME, f"sha256={digest}", str(len(content))]


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_install_activates_the_hook_and_uninstall_removes_it(tmp_path, kind):
    tree = _copy_of_the_tree(tmp_path / "tree")
    python, site_packages = _empty_environment(tmp_path / "venv")
    # The environment's own packages first, then those this test runs with (torch and so on).
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    stale = tree / "build" / "lib" / "gmoe_ltdr" / "deleted_since.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    flags = ["-e"] if kind == "editable" else []
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    _pip(python, "install", *offline, *flags, str(tree))

    assert (site_packages / PTH_NAME).is_file()
    assert not (site_packages / "gmoe_ltdr" / stale.name).exists()
    resolved = _run(
        [python, "-c", "import domainbed.scripts.train as m; print(m.__file__)"], cwd=tmp_path
    )
    expected = tree if kind == "editable" else site_packages
    assert Path(resolved.strip()) == expected / "domainbed_ext" / "scripts" / "train.py"
    classes = "domainbed_ext/datasets/data/emojidg_classes.csv"
    assert kind == "editable" or (site_packages / classes).is_file()
    # They lie outside the package, which has a link to them.
    found = _run([python, "-c", PUBLISHED_IN_USE], cwd=tmp_path).split()
    assert found == sorted(path.name for path in (ROOT / "results" / "reference").glob("*.csv"))

    _pip(python, "uninstall", "-y", "gmoe-ltdr")
    assert not (site_packages / PTH_NAME).exists()
    assert _run([python, "-c", "print('quiet')"], cwd=tmp_path) == "quiet\n"


def test_a_package_that_moved_away_does_not_disturb_python(tmp_path):
    python, site_packages = _empty_environment(tmp_path / "venv")
    (site_packages / PTH_NAME).write_text(_load_backend().PTH_LINE + "\n")
    done = subprocess.run(
        [python, "-c", "print('quiet')"], capture_output=True, text=True, cwd=tmp_path, env=_env()
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "quiet\n", "")


def test_pins_are_floors_and_build_needs_only_setuptools():
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    lists = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    requirements = [line for text in lists for line in text.split("\n") if line]
    pinned = [r for r in requirements if not r.startswith("gmoe-ltdr[") and ">=" not in r]
    assert pinned == []


def _load_backend():
    path = ROOT / "scripts" / "packaging" / "startup_hook_backend.py"
    spec = importlib.util.spec_from_file_location("startup_hook_backend", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _copy_of_the_tree(destination):
    """What a build reads; building in place would leave `build` and an egg-info behind."""
    destination.mkdir()
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, destination)
    for folder in ("domainbed_ext", "gmoe_ltdr", "scripts", "results/reference"):
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, destination / folder, ignore=skip, symlinks=True)
    return destination


def _empty_environment(folder):
    _run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    python = folder / "bin" / "python"
    return str(python), next(folder.glob("lib/python*/site-packages"))


def _pip(python, *args):
    _run([sys.executable, "-m", "pip", "-q", "--python", python, *args])


def _env():
    # The tree under test must be found through the install alone.
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DOMAINBED_EXT")}


def _run(command, cwd=None):
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=_env())
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout
