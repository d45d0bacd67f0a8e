"""The one exception that a command line turns into a single clear line and exit status 2."""

from __future__ import annotations


class UsageError(ValueError):
    """Bad input: the message says what is wrong, where, which values, and what to do about it."""
