"""Runs nothing and prints the commands."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from domainbed_ext.launchers.base import Launcher


@dataclass(frozen=True, kw_only=True)
class DummyLauncher(Launcher):
    """Prints each command, ready for a shell or a cluster's queue."""

    hands_over = True
    only_shows = True

    def launch(self, commands: Sequence[Sequence[str]]) -> list[Path]:
        for command in commands:
            print(f"Dummy launcher: {shlex.join(command)}")
        return []
