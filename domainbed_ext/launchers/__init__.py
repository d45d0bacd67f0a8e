"""Launchers: ways to run the jobs of a sweep, one file each, by name in `REGISTRY`.

Another package adds its own: a subclass of `Launcher` and `REGISTRY["mine"] = MyLauncher`.
"""

from __future__ import annotations

from domainbed_ext.launchers.base import TRAIN_MODULE, Launcher
from domainbed_ext.launchers.dummy import DummyLauncher
from domainbed_ext.launchers.local import LocalLauncher
from domainbed_ext.launchers.multi_gpu import MultiGpuLauncher
from domainbed_ext.launchers.ray import RayLauncher
from domainbed_ext.launchers.slurm import SlurmLauncher

__all__ = ["REGISTRY", "TRAIN_MODULE", "Launcher"]

REGISTRY: dict[str, type[Launcher]] = {
    "local": LocalLauncher,
    "multi_gpu": MultiGpuLauncher,
    "slurm": SlurmLauncher,
    "ray": RayLauncher,
    "dummy": DummyLauncher,
}
