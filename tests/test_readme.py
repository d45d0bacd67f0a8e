"""What the README shows, runs."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from domainbed_ext import sweep_flags
from domainbed_ext.algorithms import ALGORITHMS
from domainbed_ext.cli import COMMANDS
from domainbed_ext.hparams import CORE_ALGORITHMS
from domainbed_ext.launchers import REGISTRY
from domainbed_ext.scripts import collect_results, sweep

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL))


def commands() -> list[list[str]]:
    """The shell lines, continuation lines joined, comments removed."""
    lines = SHELL.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_commands_parse():
    ours = [words for words in commands() if words[0] == "ltdr" and len(words) > 2]
    assert {words[1] for words in ours} >= {"download", "sweep", "collect", "plot", "inspect"}
    for words in ours:
        assert words[1] in COMMANDS
        import_module(COMMANDS[words[1]][0]).build_parser().parse_args(words[2:])
    upstream = [words for words in commands() if words[:2] == ["python", "-m"]]
    names = {"domainbed.scripts.sweep": sweep, "domainbed.scripts.collect_results": collect_results}
    assert {words[2] for words in upstream} == set(names)
    for words in upstream:
        names[words[2]].build_parser().parse_args(words[3:])


def test_commands_of_the_tables_page_parse():
    page = (ROOT / "docs" / "tables.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^    ltdr (.*)$", page, flags=re.MULTILINE)
    found = [shlex.split(line, comments=True) for line in lines]
    assert {words[0] for words in found} == {"sweep", "collect", "top", "plot"}
    for name, *words in found:
        import_module(COMMANDS[name][0]).build_parser().parse_args(words)


def test_commands_of_the_clusters_page_and_of_the_help_parse():
    page = (ROOT / "docs" / "clusters.md").read_text()
    for text in (page, sweep_flags.EXAMPLES):
        lines = re.findall(r"^    ltdr sweep (.*)$", text.replace("\\\n", " "), flags=re.MULTILINE)
        assert len(lines) >= 5
        for line in lines:
            words = shlex.split(line.replace("...", ""), comments=True)
            args = sweep_flags.build_parser().parse_args(words)
            assert args.command_launcher in REGISTRY
    for launcher in REGISTRY:
        assert f"`{launcher}`" in page


def test_algorithms_are_listed():
    routers = (ROOT / "docs" / "routers.md").read_text().splitlines()
    for name in ALGORITHMS:
        if name in CORE_ALGORITHMS:
            assert f"| `{name}` |" in README
        else:
            assert f"## {name}" in routers


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)", README):
        assert (ROOT / target).exists(), target
