"""Failures that a command line tells in one line: bad input (exit status 2) and divergence."""

from __future__ import annotations


class UsageError(ValueError):
    """Bad input: the message says what is wrong, where, which values, and what to do about it."""


class DivergedError(RuntimeError):
    """A loss, or a parameter, that is not finite any more."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step
