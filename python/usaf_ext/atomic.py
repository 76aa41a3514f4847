"""Files and folders that are either whole or not there: written under a temporary name, synced, renamed.

They are written in a folder `.{name}.{random}.tmp` beside the target. What a killed writer left behind is never looked
at by a reader, and the next writer of the same target removes it, unless its owner still holds the lock on it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_REPLACED = ".replaced"  # inside the temporary folder: what stood at the target before


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


def _lock(folder: Path, *, wait: bool) -> int | None:
    """Descriptor that holds the folder's lock, or None: the folder is gone, or another process holds it."""
    descriptor = None
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            return descriptor
    if descriptor is not None:
        os.close(descriptor)
    return None


def _clean_up_after_the_killed(target: Path) -> None:
    leftover = re.compile(rf"\.{re.escape(target.name)}\.[a-z0-9_]{{8}}\.tmp")  # as mkdtemp names it
    for folder in [path for path in target.parent.iterdir() if leftover.fullmatch(path.name)]:
        descriptor = _lock(folder, wait=False)
        if descriptor is None:
            continue  # its writer lives
        if (folder / _REPLACED).exists() and not target.exists():
            os.rename(folder / _REPLACED, target)  # killed between the two renames of atomic_directory
        _remove(folder)
        os.close(descriptor)


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A new locked folder beside `target`; leftovers of killed writers of the same target go first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _clean_up_after_the_killed(target)
    while True:
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        descriptor = _lock(staging, wait=True)
        # Gone: another writer's clean-up came between. There, but not locked: a file system without locks.
        if descriptor is not None or staging.exists():
            break
    try:
        yield staging
    finally:
        _remove(staging)
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path to write; on leaving it becomes `path`, in place of an older file there.

    On an exception, or when killed, `path` stays as it was.

    Raises:
        IsADirectoryError: `path` is a folder.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder stands where the file should go", str(target))
    with _staging(target) as staging:
        temporary = staging / target.name
        yield temporary
        _sync(temporary)
        os.replace(temporary, target)
        _sync(target.parent)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary empty folder to fill; on leaving it becomes `path`, in place of an older folder there.

    On an exception, or when killed, `path` stays as it was. (Where the file system cannot swap two names there is an
    instant without `path`; killed in it, the next writer puts the old folder back.)

    Raises:
        FileExistsError: `path` is a file.
    """
    target = Path(os.path.realpath(path))
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
            os.rename(target, staging / _REPLACED)
            try:
                os.rename(temporary, target)
            except BaseException:
                os.rename(staging / _REPLACED, target)
                raise
        _sync(target.parent)
