"""Runs at every start of Python, through a `.pth` line: so it is tiny and imports next to nothing.

It offers the module names `domainbed.*` to Python's import system, behind every other finder. A
real DomainBed checkout on the path is therefore found first and stays as it is; without one,
`python -m domainbed.scripts.sweep` runs the embedded implementation. `DOMAINBED_EXT=off` leaves
Python alone. What happens once such a name is asked for stands in `upstream.py`.
"""

import os
import sys


class DomainBedFinder:
    """The last finder on `sys.meta_path`; it knows the names `domainbed` and `domainbed.*`."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "domainbed" and not name.startswith("domainbed."):
            return None
        from domainbed_ext.upstream import embedded_spec

        return embedded_spec(name)


def install():
    """Appends the finder, once, unless DOMAINBED_EXT says off."""
    if os.environ.get("DOMAINBED_EXT", "").lower() not in ("off", "0", "false", "no") and not any(
        finder is DomainBedFinder for finder in sys.meta_path
    ):
        sys.meta_path.append(DomainBedFinder)


install()
