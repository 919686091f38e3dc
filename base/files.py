"""Atomic file writes and file locks."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file so that a crash at any time leaves either the old contents or the new ones, never a part.

    Writes go to a temporary file in the same folder (renaming is atomic only within a file system), which is flushed
    to disk and renamed over the target when the block ends without an error. Raises FileExistsError for a target that
    is no file: renaming over /dev/null would take it away from everyone.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "exists, and is not a file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb+") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            error.filename = error.filename or str(path)  # a full disk does not say what it has no room for
        raise
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # make the rename durable too; Windows cannot open folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def nearest_place(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists (it may be a file): where something would be made."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


@contextlib.contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive file lock, released even if the process is killed; raises BlockingIOError if it is taken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        if sys.platform == "win32":
            import msvcrt

            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            except PermissionError:
                raise BlockingIOError from None
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
