"""The names `domainbed.*` lead to a checkout if there is one, and else to the embedded scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("train", "sweep", "collect_results", "download", "list_top_hparams")
HOOK = "import domainbed_ext._startup\n"


@pytest.fixture
def python(tmp_path):
    """Runs Python as after an install: the tree on the path and the hook imported at start-up."""
    # sitecustomize stands in for the .pth line; test_packaging.py tests the line itself.
    start = tmp_path / "start"
    start.mkdir()
    (start / "sitecustomize.py").write_text(HOOK)

    def run(*args, first=(), cwd=tmp_path, **variables):
        path = os.pathsep.join(str(p) for p in (*first, start, ROOT))
        env = {k: v for k, v in os.environ.items() if k != "DOMAINBED_EXT"}
        env.update(PYTHONPATH=path, **variables)
        command = [sys.executable, *args]
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_python_m_runs_the_embedded_script(python, script):
    alias = python("-m", f"domainbed.scripts.{script}", "--help")
    own = python("-m", f"domainbed_ext.scripts.{script}", "--help", DOMAINBED_EXT="off")
    assert alias.returncode == own.returncode == 0, alias.stderr + own.stderr
    assert alias.stdout.replace("domainbed.scripts", "domainbed_ext.scripts") == own.stdout


def test_import_gives_the_very_same_module(python):
    code = (
        "import domainbed.scripts.train as alias, domainbed_ext.scripts.train as own;"
        "from domainbed.scripts import train;"
        "print(alias is own is train, own.__spec__.name)"
    )
    assert python("-c", code).stdout == "True domainbed_ext.scripts.train\n"


def test_start_up_imports_two_tiny_modules(python):
    code = (
        "import sys; print(sorted(m for m in sys.modules if m.startswith('domainbed')));"
        "print('importlib.util' in sys.modules)"
    )
    modules, util = python("-S", "-c", HOOK + code).stdout.splitlines()
    assert modules == "['domainbed_ext', 'domainbed_ext._startup']"
    assert util == "False"


def test_off_switches_it_off(python):
    done = python("-m", "domainbed.scripts.train", "--help", DOMAINBED_EXT="off")
    assert done.returncode != 0
    assert "No module named 'domainbed'" in done.stderr


def test_unknown_names_stay_unknown(python):
    for name in ("domainbed.algorithms", "domainbed.scripts.nothing", "domainbedx"):
        done = python("-c", f"import {name}")
        assert f"No module named '{name}'" in done.stderr


def test_a_folder_called_domainbed_is_not_a_checkout(python, tmp_path):
    (tmp_path / "domainbed" / "results").mkdir(parents=True)
    done = python("-m", "domainbed.scripts.train", "--help")
    assert done.returncode == 0, done.stderr


def test_a_checkout_wins(python, tmp_path):
    package = tmp_path / "checkout" / "domainbed" / "scripts"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "train.py").write_text("print('the real one')")
    done = python("-m", "domainbed.scripts.train", first=[tmp_path / "checkout"])
    assert done.stdout == "the real one\n"
    # What the checkout lacks is not filled in: that would mix two programs.
    missing = python("-m", "domainbed.scripts.sweep", first=[tmp_path / "checkout"])
    assert missing.returncode != 0
    assert "No module named domainbed.scripts.sweep" in missing.stderr


def test_finders_that_ask_all_others_do_not_ask_for_ever(python):
    code = """
import sys
class Delegating:
    @staticmethod
    def find_spec(name, path=None, target=None):
        for finder in sys.meta_path:
            if finder is not Delegating and (spec := finder.find_spec(name, path, target)):
                return spec
sys.meta_path.insert(1, Delegating)
import domainbed
print(domainbed.__doc__)
"""
    assert python("-c", code).stdout.startswith("domainbed, embedded")


def test_installing_twice_and_reloading_leave_one_finder(python):
    code = (
        "import importlib, sys, domainbed_ext._startup as s; s.install(); importlib.reload(s);"
        "print(sum(getattr(f, '__module__', '') == s.__name__ for f in sys.meta_path))"
    )
    assert python("-c", code).stdout == "1\n"


def test_off_counts_from_the_moment_it_is_said(python):
    code = "import os; os.environ['DOMAINBED_EXT'] = 'off'; import domainbed"
    assert "No module named 'domainbed'" in python("-c", code).stderr


def test_without_the_hook_importing_it_is_enough(python):
    code = "import domainbed_ext._startup, domainbed; print(domainbed.__doc__)"
    done = python("-S", "-c", code)
    assert done.stdout.startswith("domainbed, embedded"), done.stderr
