"""A lock that processes of one machine, or of several that share a folder, take in turn."""

from __future__ import annotations

import errno
import fcntl
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_LOG_SECONDS = 60.0
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def file_lock(path: Path, *, wait: bool = True, purpose: str = "") -> Iterator[bool]:
    """Yield whether this process holds the lock of `path`, a file that is created and removed.

    The system releases the lock when the process ends or is killed. Waiting has no limit: it does not end before the
    holder does. On a file system without locks, every process holds it.

    Args:
        path: of the lock file. Its folder is created.
        wait: until the lock is free; otherwise False is yielded at once if it is not.
        purpose: what the holder does, for the log while this process waits.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    started = reported = time.monotonic()
    with path.open("w") as file:
        while not (locked := _try_lock(file.fileno(), path)) and wait:
            time.sleep(_POLL_SECONDS)
            if time.monotonic() - reported > _LOG_SECONDS:
                reported = time.monotonic()
                waited = round(reported - started)
                logger.info("waiting for %d s until another process is done with %s", waited, purpose or path)
        yield locked
        if locked:
            path.unlink(missing_ok=True)


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        logger.warning("%s is on a file system without locks: several processes may do the same work", path)
    return True
