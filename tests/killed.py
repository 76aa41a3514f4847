"""Writers that are killed (SIGKILL) in the middle."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable

from usaf_ext import atomic

DISK_CALLS = ("fsync", "rename", "replace", "mkdir", "open", "rmdir", "unlink")


def dies_at(call: int, work, also: Iterable[tuple[object, str]] = ()) -> bool:
    """Run `work` in a child that is killed at its `call`-th call of those that touch the disk. Was it killed?

    `also`: other functions, each an object and the name it has there, whose calls count.
    """
    child = os.fork()
    if child == 0:
        try:
            left = call

            def deadly(function):
                def counted(*args, **kwargs):
                    nonlocal left
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*args, **kwargs)

                return counted

            for owner, name in (*((os, name) for name in DISK_CALLS), (atomic, "_exchange"), *also):
                setattr(owner, name, deadly(getattr(owner, name)))
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL
