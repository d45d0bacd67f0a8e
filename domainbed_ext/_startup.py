"""Runs at every start of Python, through a `.pth` line: so it is tiny and imports next to nothing.

It watches for one name, `domainbed`. A real DomainBed checkout on the path is found as ever, and
gets our algorithms, data sets and launcher added once its modules have run; without a checkout,
`python -m domainbed.scripts.sweep` runs the embedded implementation. `DOMAINBED_EXT=off` leaves
Python alone. What happens once such a name is asked for stands in `upstream.py`.
"""

import os
import sys


class DomainBedFinder:
    """The first finder on `sys.meta_path`; it has an opinion on `domainbed` and `domainbed.*`."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "domainbed" and not name.startswith("domainbed."):
            return None
        try:
            from domainbed_ext.upstream import find_spec
        except ImportError:  # uninstalled while this process ran
            return None
        return find_spec(name, path, target)


def install():
    """Puts the finder first, once, unless DOMAINBED_EXT says off."""
    # By module name, not identity: this module may be reloaded.
    if os.environ.get("DOMAINBED_EXT", "").lower() in ("off", "0", "false", "no"):
        return
    if not any(getattr(finder, "__module__", None) == __name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, DomainBedFinder)


install()
