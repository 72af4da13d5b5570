"""The working directory as `--address` sends it to the nodes of a cluster, without secrets."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

from dmrl_ray.errors import ConfigError

MOST_BYTES = 500 << 20
"""Ray refuses somewhat more, after packing it all."""

NOT_NEEDED = ("runs", ".git", ".venv", "venv", "__pycache__", "*.parquet")
"""Parts of a working directory that no node of a cluster needs."""

SECRET = (
    *(".ssh", ".aws", ".gnupg", ".kube", ".docker", ".azure", ".netrc", ".git-credentials"),
    *(".env*", "*.env", ".npmrc", ".pypirc", ".pgpass", "id_rsa*", "id_ed25519*", "id_ecdsa*"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "*credentials*", "*secret*"),
)
"""Names of files and folders that must not leave this machine; Python files excepted."""

SECRET_FILES = ("*token*",)
"""The same of files only."""


@dataclass
class Shipment:
    """Files that are sent, with their sizes, and files that are left out, with reasons."""

    folder: Path
    files: dict[str, int] = field(default_factory=dict)  # bytes, by path in the folder
    left_out: dict[str, str] = field(default_factory=dict)  # reasons, by path in the folder

    @property
    def size_bytes(self) -> int:
        """The size of all files."""
        return sum(self.files.values())

    @property
    def excludes(self) -> list[str]:
        """Patterns for Ray: exactly what is left out, whatever else has a name like it."""
        return [*NOT_NEEDED, *("/" + _escaped(path) for path in self.left_out)]

    def __str__(self) -> str:
        """Number and size, the largest files, and secrets left out."""
        most = sorted(self.files, key=lambda path: -self.files[path])[:3]
        largest = ", ".join(f"{path} ({_mb(self.files[path])})" for path in most)
        text = f"{len(self.files)} files of {self.folder}, {_mb(self.size_bytes)}"
        text += f"; the largest are {largest}" if most else ""
        return text + (f"; {self.without}" if self.left_out else "")

    @property
    def without(self) -> str:
        """The names that are left out, and why."""
        named = [f"{path} ({why})" for path, why in self.left_out.items()]
        more = f" and {len(named) - 10} more" if len(named) > 10 else ""
        return f"left out: {', '.join(named[:10])}{more}"


def shipment(folder: Path) -> Shipment:
    """List what of a working directory is to be sent to a cluster.

    Raises:
        ConfigError: it is a home directory, or too large.
    """
    folder = folder.resolve()
    if Path.home().resolve().is_relative_to(folder):
        raise ConfigError(
            f"{folder}: the working directory is sent to the cluster, and this one is or holds a "
            "home directory; change to the folder of the project"
        )
    found = Shipment(folder)
    for _ in _walk(folder, found, []):
        if found.size_bytes > MOST_BYTES:
            raise ConfigError(
                f"{folder}: the working directory is sent to the cluster, which takes "
                f"{_mb(MOST_BYTES)} at most, and this one has more: {found}; move what the nodes "
                "do not need, or name it in a file .rayignore"
            )
    return found


def _walk(folder: Path, found: Shipment, ignored: list[object]) -> Iterator[None]:
    # As Ray does: patterns of a folder hold below it.
    ignored = [*ignored, *get_excludes_from_ignore_files(folder, include_gitignore=True)]
    for path in sorted(folder.iterdir()):
        name = path.relative_to(found.folder).as_posix()
        if any(fnmatch(path.name, pattern) for pattern in NOT_NEEDED):
            continue
        if any(ignores(path) for ignores in ignored):  # type: ignore[operator]
            continue
        why = _why_not(path)
        if why:
            found.left_out[name] = why
        elif path.is_dir():
            yield from _walk(path, found, ignored)
        else:
            found.files[name] = path.stat().st_size
            yield


def _why_not(path: Path) -> str:
    """Why a file or folder is left out; "" if it is not."""
    try:
        kind = path.stat().st_mode
    except OSError:
        return "cannot be read"
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        return "not a file"
    if not os.access(path, os.R_OK | (os.X_OK if stat.S_ISDIR(kind) else 0)):
        return "cannot be read"
    targets = [path, path.resolve()] if path.is_symlink() else [path]
    if path.is_symlink() and stat.S_ISDIR(kind) and path.is_relative_to(targets[1]):
        return "a link to a folder that holds it"
    patterns = (*SECRET, *(() if stat.S_ISDIR(kind) else SECRET_FILES))
    names = {targets[0].name, *(targets[1].parts if path.is_symlink() else ())}
    secret = any(
        fnmatch(name.lower(), pattern) and not name.endswith(".py")
        for name in names
        for pattern in patterns
    )
    return "may be secret" if secret else ""


def _escaped(path: str) -> str:
    return "".join("\\" + c if c in "*?[]!#\\ " else c for c in path)


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MB"
