"""Files and folders that are either whole or not there: written under a temporary name, synced, renamed.

A temporary name is `.{name}.{random}.tmp` beside the target. What a killed writer left behind is never looked at by a
reader, and the next writer of the same target removes it, unless its owner still holds the lock on it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def _sync(path: Path) -> None:
    """fsync a file or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for root, _folders, files in os.walk(folder):
        for name in files:
            _sync(Path(root) / name)
        _sync(Path(root))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step. False where the system or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(error, os.strerror(error), str(second))


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A new locked folder beside `target`; leftovers of killed writers of the same target go first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{target.name}.*.tmp"):
        with contextlib.suppress(OSError):
            descriptor = os.open(leftover, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its writer lives
                _remove(leftover)
            finally:
                os.close(descriptor)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    lock = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield staging
    finally:
        _remove(staging)
        os.close(lock)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path to write; on leaving it becomes `path`. On an exception `path` stays as it was."""
    target = Path(path)
    with _staging(target) as staging:
        temporary = staging / target.name
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary empty folder to fill; on leaving it becomes `path`, in place of an older folder there.

    On an exception, or when killed, `path` stays as it was.

    Raises:
        FileExistsError: `path` is a file.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise FileExistsError(errno.EEXIST, "a file stands where the folder should go", str(target))
    with _staging(target) as staging:
        temporary = staging / target.name
        temporary.mkdir()
        yield temporary
        _sync_tree(temporary)
        if not target.exists():
            os.rename(temporary, target)
        elif not _exchange(temporary, target):
            os.rename(target, staging / "old")  # two steps: this file system cannot swap names
            os.rename(temporary, target)
        _sync(target.parent)
