"""What an import of `domainbed` leads to: a checkout with our additions, or the embedded package.

`_startup.py` calls `find_spec` before any other finder is asked. They are asked here, and what they
find is returned, so a real `domainbed` package always wins; of its modules, those in `EXTENDED` get
our additions (`upstream_additions.py`) right after they have run. Where nobody finds anything, the
names of DomainBed's scripts lead to ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

# Modules of a checkout that get additions.
EXTENDED = tuple(
    f"domainbed.{module}"
    for module in ("algorithms", "hparams_registry", "datasets", "networks", "command_launchers")
)
PACKAGES = {
    "domainbed": "domainbed_ext",
    "domainbed.scripts": "domainbed_ext.scripts",
}
MODULES = {
    f"domainbed.scripts.{script}": f"domainbed_ext.scripts.{script}"
    for script in ("train", "sweep", "collect_results", "download", "list_top_hparams")
}


_STARTUP_MODULE = "domainbed_ext._startup"
_asking = threading.local()


def is_switched_off() -> bool:
    """Whether DOMAINBED_EXT says off."""
    return os.environ.get("DOMAINBED_EXT", "").lower() in ("off", "0", "false", "no")


def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None) -> Any:
    """The spec of `domainbed` or of a module below it, or None."""
    if is_switched_off():  # since the start
        return None
    names: set[str] = _asking.__dict__.setdefault("names", set())
    if name in names:  # asked by a finder that, like this one, asks all others
        return None
    names.add(name)
    try:
        spec = _ask_other_finders(name, path, target)
    finally:
        names.discard(name)
    if spec is None:
        return embedded_spec(name)
    if name in EXTENDED and getattr(spec.loader, "exec_module", None) is not None:
        _extend_after_execution(spec.loader)
    return spec


def _ask_other_finders(name: str, path: Sequence[str] | None, target: ModuleType | None) -> Any:
    for finder in list(sys.meta_path):
        if getattr(finder, "__module__", None) == _STARTUP_MODULE:
            continue
        find = getattr(finder, "find_spec", None)
        spec = None if find is None else find(name, path, target)
        if spec is not None:
            return spec
    return None


def _extend_after_execution(loader: Any) -> None:
    """Has the loader add to a module that it has executed, also when that is reloaded.

    The method is replaced on this one object, not its class: inspect, runpy and pickle see the
    loader they know.
    """
    execute = loader.exec_module
    if getattr(execute, "extends_domainbed", False):  # a zip file's loader serves many modules
        return

    def exec_module(module: ModuleType) -> None:
        execute(module)
        if module.__name__ in EXTENDED:
            from domainbed_ext.upstream_additions import extend

            extend(module)

    exec_module.extends_domainbed = True  # type: ignore[attr-defined]
    loader.exec_module = exec_module


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
