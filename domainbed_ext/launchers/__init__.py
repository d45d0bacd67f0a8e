"""Launchers: ways to run the jobs of a sweep, one file each, by name in `REGISTRY`.

Another package adds its own: a subclass of `Launcher` and `REGISTRY["mine"] = MyLauncher`.
"""

from __future__ import annotations

from domainbed_ext.launchers.base import TRAIN_MODULE, Launcher
from domainbed_ext.launchers.dummy import DummyLauncher
from domainbed_ext.launchers.local import LocalLauncher

__all__ = ["REGISTRY", "TRAIN_MODULE", "Launcher"]

REGISTRY: dict[str, type[Launcher]] = {"local": LocalLauncher, "dummy": DummyLauncher}
