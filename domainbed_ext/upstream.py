"""The names `domainbed.*` without a DomainBed checkout: they lead to the embedded implementation.

`_startup.py` calls `embedded_spec` only after every other finder has failed, so a real `domainbed`
package always wins and is never touched.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

PACKAGES = {
    "domainbed": "domainbed_ext",
    "domainbed.scripts": "domainbed_ext.scripts",
}
MODULES = {
    f"domainbed.scripts.{script}": f"domainbed_ext.scripts.{script}"
    for script in ("train", "sweep", "collect_results", "download", "list_top_hparams")
}


def embedded_spec(name: str) -> ModuleSpec | None:
    """The spec under which `name` is served, or None if this name is not ours to serve."""
    if name in PACKAGES:
        if not _parent_is_embedded(name):
            return None
        spec = ModuleSpec(name, _PackageLoader(), is_package=True)
        spec.submodule_search_locations = []
        return spec
    if name in MODULES and _parent_is_embedded(name):
        loader = _AliasLoader(MODULES[name])
        return ModuleSpec(name, loader, origin=loader.origin)
    return None


def _parent_is_embedded(name: str) -> bool:
    parent_name = name.rpartition(".")[0]
    if not parent_name:
        return True
    parent = sys.modules.get(parent_name)
    # A file-less parent that is not ours is a namespace package: some folder that happens to be
    # called "domainbed", an output folder for example. Only a package with a file is a checkout.
    return getattr(parent, "__file__", None) is None


class _PackageLoader(Loader):
    """Makes the empty packages `domainbed` and `domainbed.scripts`."""

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = f"{module.__name__}, embedded: see {PACKAGES[module.__name__]}."


class _AliasLoader(Loader):
    """Serves a module of `domainbed_ext` under another name, to `import` and to `python -m`."""

    def __init__(self, target: str) -> None:
        self.target = target
        spec = importlib.util.find_spec(target)
        if spec is None or spec.loader is None:
            raise ModuleNotFoundError(f"No module named {target!r}", name=target)
        self.origin = spec.origin
        self._loader: Any = spec.loader

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        # importlib returns whatever stands in sys.modules after this: both names then mean one
        # and the same module, whose __spec__ keeps its own name.
        sys.modules[module.__name__] = importlib.import_module(self.target)

    # What `python -m`, inspect and linecache ask of a loader.
    def get_code(self, name: str) -> CodeType | None:
        return self._loader.get_code(self.target)

    def get_source(self, name: str) -> str | None:
        return self._loader.get_source(self.target)

    def get_filename(self, name: str) -> str:
        return self._loader.get_filename(self.target)

    def is_package(self, name: str) -> bool:
        return False
