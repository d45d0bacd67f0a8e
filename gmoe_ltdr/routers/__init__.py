"""Routers, one file each, found by name.

A new router is one file here: subclass `Router`, decorate it with `@register_router("name")`.
"""

import importlib
import pkgutil

from gmoe_ltdr.routers.base import Router, available_routers, create_router, register_router

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Router", "available_routers", "create_router", "register_router"]
