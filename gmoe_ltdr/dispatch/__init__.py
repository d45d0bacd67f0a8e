"""Dispatchers: carry tokens to their experts and bring the weighted results home."""

from gmoe_ltdr.dispatch.base import Dispatched, Dispatcher, create_dispatcher
from gmoe_ltdr.dispatch.local import LocalDispatcher

__all__ = ["Dispatched", "Dispatcher", "LocalDispatcher", "create_dispatcher"]
