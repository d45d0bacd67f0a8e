"""The `ltdr` command."""

from __future__ import annotations

import configparser
import subprocess
import sys
from pathlib import Path

import pytest

from domainbed_ext.cli import COMMANDS, main
from domainbed_ext.provenance import code_version

ROOT = Path(__file__).resolve().parents[2]


def test_help_names_every_command(capsys):
    for flags in ([], ["--help"], ["-h"]):
        assert main(flags) == 0
        out = capsys.readouterr().out
        assert all(f"  {command} " in out for command in COMMANDS)
        assert "{{" not in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: ltdr {command}")


def test_version_is_the_packages(capsys):
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"ltdr {config['metadata']['version']}")
    assert code_version().startswith(config["metadata"]["version"])


def test_an_unknown_command_is_refused(capsys):
    assert main(["tain"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown command 'tain'; choose among train")


def test_exit_status_is_the_commands(tmp_path, capsys):
    assert main(["train", "--algorithm", "nope", "--output_dir", str(tmp_path / "x")]) == 2
    assert "unknown algorithm" in capsys.readouterr().err


def test_help_is_quick_to_start():
    code = (
        "import sys; import domainbed_ext.cli as cli; cli.main(['--help']);"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.endswith("False\n"), done.stderr
