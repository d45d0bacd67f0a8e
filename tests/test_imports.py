"""The direction of imports: the method knows nothing of the protocol, and optional packages are
imported where they are used."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPTIONAL = {
    "tutel", "deepspeed", "transformers", "matplotlib", "resvg_py", "submitit", "ray", "wandb",
    "tensorboard", "lmms_eval", "onnx", "onnxruntime", "domainbed",
}  # fmt: skip
# Subclasses of another package's classes, for those who have it; they import it inside `try`.
INTEGRATIONS = {"gmoe_ltdr/vlm/transformers.py", "gmoe_ltdr/vlm/lmms_eval_model.py"}
FORBIDDEN_NAMES = {"misc.py", "utils.py", "util.py", "common.py", "helpers.py", "helper.py"}


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(tree: ast.AST, *, top_level_only: bool) -> set[str]:
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", files("gmoe_ltdr"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_method_does_not_know_the_protocol(path):
    assert "domainbed_ext" not in imported(ast.parse(path.read_text()), top_level_only=False)


@pytest.mark.parametrize(
    "path", files("gmoe_ltdr", "domainbed_ext"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_optional_packages_are_imported_where_used(path):
    assert not imported(ast.parse(path.read_text()), top_level_only=True) & OPTIONAL


def test_nobody_imports_an_integration_on_the_way():
    modules = {name.removesuffix(".py").replace("/", ".") for name in INTEGRATIONS}
    for path in files("gmoe_ltdr", "domainbed_ext"):
        if str(path.relative_to(ROOT)) in INTEGRATIONS:
            continue
        for node in ast.parse(path.read_text()).body:
            assert not (isinstance(node, ast.ImportFrom) and node.module in modules), path


def test_only_algorithms_and_training_know_the_method():
    users = {
        str(path.relative_to(ROOT / "domainbed_ext").parent / path.name).split("/")[0]
        for path in files("domainbed_ext")
        if "gmoe_ltdr" in imported(ast.parse(path.read_text()), top_level_only=True)
    }
    assert users <= {
        "algorithms",
        "backbones.py",
        "compilation.py",
        "routing_inspection.py",
        "weight_averaging.py",
    }


def test_file_names_say_something():
    assert not {p.name for p in files("gmoe_ltdr", "domainbed_ext")} & FORBIDDEN_NAMES
