"""The errors of usaf_ext. Bad arguments raise TypeError or ValueError; these are for everything else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


class UsafError(RuntimeError):
    """Base of every error that is usaf_ext's own."""


class StoreError(UsafError):
    """A store, delta or checkpoint is damaged, foreign, too new, or does not fit the model."""


class BudgetError(UsafError):
    """A memory budget is too small; the message names the smallest that works."""


class DeviceError(UsafError):
    """A device call failed."""


@contextmanager
def named(where: str | os.PathLike) -> Iterator[None]:
    """Put `where` before the text of a StoreError that is raised inside."""
    try:
        yield
    except StoreError as error:
        raise StoreError(f"{where}: {error}") from error
