"""Folders in which nothing may change while a block runs, whoever runs the tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHANGES = {
    *("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.symlink"),
    *("os.chmod", "os.utime", "fcntl.flock", "shutil.rmtree"),
}
_folders: list[str] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if not _folders or (event != "open" and event not in CHANGES):
        return
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        if not (isinstance(flags, int) and flags & writes) and not set(str(mode or "")) & set(
            "wax+"
        ):
            return
    for argument in arguments:
        if isinstance(argument, str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(argument))
            if any(path == folder or path.startswith(f"{folder}/") for folder in _folders):
                raise AssertionError(f"{event} of {path}")


sys.addaudithook(_hook)


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    """Fail if anything in the folder is opened for writing, made, renamed or deleted.

    A hook of the interpreter sees what root may do on a read-only folder, too.
    """
    _folders.append(str(folder))
    try:
        yield
    finally:
        _folders.remove(str(folder))
