"""Files and named arrays: written whole or not at all, and never read back wrong.

Everything a run writes on a disk goes through `synced_file`, which is the only place that opens a
file for writing; all that is read of a run goes through `open_inside`. Neither follows links, which
a run folder does not contain: a folder of others cannot lead out of itself. Numbers are stored as
safetensors, anything else (strings, too) as ``.npz``; nothing on disk is a pickle.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Protocol, TypeAlias, cast

import numpy as np
import safetensors
import safetensors.numpy
from pydantic import StringConstraints

from dmrl_ray.errors import ConfigError, StorageError
from dmrl_ray.types import Arrays

CHUNK_BYTES = 1 << 20

Data: TypeAlias = bytes | memoryview
"""The content of a file."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file as a commit names it."""

    path: Annotated[str, StringConstraints(pattern=r"^[a-z_]+/\w[\w.-]*$")]  # in the run folder
    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: str, data: Data) -> FileRecord:
        """The record of a file with this content."""
        return cls(path, memoryview(data).nbytes, hashlib.sha256(data).hexdigest())


class Files(Protocol):
    """Where the files of a run lie; paths are relative to it, with slashes."""

    def put_if_absent(self, path: str, data: Data) -> bool:
        """Write a file durably unless it exists; of several processes, exactly one gets True."""

    def put(self, path: str, data: Data) -> None:
        """Write a file durably, whole or not at all.

        Raises:
            StorageError: it is not written, and what was there before is still there.
        """

    def read(self, path: str) -> bytes:
        """The content of a file.

        Raises:
            FileNotFoundError: there is none.
            OSError: it cannot be read.
        """

    def list(self, folder: str) -> list[str]:
        """The names of the files in a folder, sorted."""

    def rename(self, path: str, other: str) -> None:
        """Give a file another name in its folder, durably after `sync`; may be repeated."""

    def delete(self, path: str) -> None:
        """Delete a file, if there is one and it can be deleted."""

    def sync(self, folder: str) -> None:
        """See that what was renamed or deleted in a folder stays so."""


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Raise an operating system's error as a `StorageError` that names the path."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        failure = StorageError(f"{path}: cannot write: {error.strerror or error}{_room(path)}")
        failure.errno = error.errno
        raise failure from error


def _room(path: Path) -> str:
    try:
        stat = os.statvfs(path.parent)
    except OSError:
        return ""
    return f" ({stat.f_bavail * stat.f_frsize / 2**20:.1f} MiB free there)"


@contextmanager
def synced_file(path: Path) -> Iterator[BinaryIO]:
    """A new file whose content is on the disk when the block ends; removed if the block fails."""
    with storage_errors(path):
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            with os.fdopen(os.open(path, flags, 0o666), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            with suppress(OSError):
                os.unlink(path)
            raise


def open_inside(folder: Path, path: str) -> BinaryIO:
    """Open a file of a folder for reading, without following links below the folder.

    Raises:
        ValueError: the path leads out of the folder.
        FileNotFoundError: there is no such file.
        OSError: it cannot be read, or it is a link or no plain file.
    """
    descriptor = _descriptor(folder, path, os.O_RDONLY | os.O_NONBLOCK)  # A pipe does not block.
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a file", str(folder / path))
    return cast(BinaryIO, os.fdopen(descriptor, "rb"))


def names_inside(folder: Path, path: str) -> list[str]:
    """The names in a folder below another, sorted; none if it is missing. Follows no links.

    Raises:
        OSError: it cannot be read, or it is a link or no folder.
    """
    try:
        descriptor = _descriptor(folder, path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return []
    try:
        return sorted(os.listdir(descriptor))
    finally:
        os.close(descriptor)


def _descriptor(folder: Path, path: str, flags: int) -> int:
    parts = path.split("/")
    if not {"", ".", ".."}.isdisjoint(parts):
        raise ConfigError(f"{path}: leads out of the run folder {folder}")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for depth, part in enumerate(parts, 1):
        how = flags if depth == len(parts) else os.O_RDONLY | os.O_DIRECTORY
        above = descriptor
        try:
            descriptor = os.open(part, how | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
        except OSError as error:
            here = folder.joinpath(*parts[:depth])
            found = LINK if os.path.islink(here) else error.strerror
            raise OSError(error.errno, found, str(here)) from error
        finally:
            os.close(above)
    return descriptor


LINK = "it is a symbolic link, which a run folder does not contain; replace it by what it names"


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Raise StorageError if one of the names in a folder is a symbolic link."""
    for name in names:
        if os.path.islink(folder / name):
            raise StorageError(f"{folder / name}: {LINK}")


def sync_folder(folder: Path) -> None:
    """Names made, renamed or removed in `folder` before this call outlive a loss of power."""
    with storage_errors(folder):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents so that they outlive a loss of power."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with storage_errors(folder), suppress(FileExistsError):
        os.mkdir(folder)
    sync_folder(folder.parent)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Make `folder`, which must not exist, whole or not at all; yields where to write."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"_{folder.name}", dir=folder.parent)).absolute()
    try:
        yield temporary
        temporary.chmod(0o755)
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Write `path` whole or not at all: temporary name, fsync, rename, fsync of the folder."""
    temporary = _temporary(path)
    with synced_file(temporary) as file:
        yield file
    with storage_errors(path):
        os.rename(temporary, path)
    sync_folder(path.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f"_{path.name}.{os.getpid()}.tmp")


class LocalFiles:
    """Files of a folder of this machine, or of a file system that machines share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put_if_absent(self, path: str, data: Data) -> bool:
        """Link a temporary file to the name, which one process alone can do."""
        target = self.folder / path
        temporary = _temporary(target)
        with synced_file(temporary) as file:
            file.write(data)
        try:
            with storage_errors(target):
                os.link(temporary, target)
        except StorageError as error:
            # A network file system may do the link, lose its answer, and be asked again.
            if not (error.errno == errno.EEXIST and os.path.samefile(temporary, target)):
                os.unlink(temporary)
                if error.errno == errno.EEXIST:
                    return False
                raise
        try:
            sync_folder(target.parent)
        except BaseException:
            os.unlink(target)  # it may not be durable, so it must not be there
            raise
        finally:
            with suppress(OSError):
                os.unlink(temporary)
        return True

    def put(self, path: str, data: Data) -> None:
        """Write under a temporary name, and rename."""
        with atomic_file(self.folder / path) as file:
            file.write(data)

    def read(self, path: str) -> bytes:
        """The content of a file.

        Raises:
            ValueError: the path leads out of the folder.
            OSError: the file is a link, or cannot be read.
        """
        with open_inside(self.folder, path) as file:
            return file.read()

    def list(self, folder: str) -> list[str]:
        """The names of the files in a folder, sorted; none if it is missing."""
        return names_inside(self.folder, folder)

    def rename(self, path: str, other: str) -> None:
        """Rename, unless it is done already."""
        before, after = self.folder / path, self.folder / other
        with storage_errors(after):
            try:
                os.rename(before, after)
            except FileNotFoundError:
                if not after.exists():
                    raise

    def delete(self, path: str) -> None:
        """Unlink, if possible."""
        with suppress(OSError):
            os.unlink(self.folder / path)

    def sync(self, folder: str) -> None:
        """Sync the folder."""
        sync_folder(self.folder / folder)

    def __str__(self) -> str:
        """The folder, for messages."""
        return str(self.folder)


def save_arrays(
    files: Files, path: str, arrays: Arrays, metadata: Mapping[str, str] | None = None
) -> FileRecord:
    """Write arrays to a ``.safetensors`` (numbers only) or ``.npz`` file."""
    metadata = {"format": "dmrl.arrays.1", **(metadata or {})}
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise ValueError(f"{path}: array {name!r} holds Python objects, which are not stored")
    if path.endswith(".safetensors"):
        plain = {name: np.asarray(array, order="C") for name, array in arrays.items()}
        data: Data = safetensors.numpy.save(plain, metadata)
    else:
        assert path.endswith(".npz"), path
        data = _npz(arrays, metadata)
    record = FileRecord.of(path, data)
    files.put(path, data)
    return record


def is_numeric(arrays: Arrays) -> bool:
    """Whether safetensors can hold these arrays."""
    return all(array.dtype.kind in "biuf" and array.itemsize <= 8 for array in arrays.values())


def _npz(arrays: Arrays, metadata: Mapping[str, str]) -> Data:
    # np.savez cannot store an array named "file" and allows pickles.
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.comment = json.dumps(metadata).encode()
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
    return file.getbuffer()


def difference(run: Path, record: FileRecord) -> str | None:
    """The fault of a file of a commit, in a few words, or None."""
    path = run / record.path
    try:
        with open_inside(run, record.path) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes != record.size_bytes:
                return f"{path}: has {size_bytes} bytes instead of {record.size_bytes}"
            if sha256_of(file) != record.sha256:
                return f"{path}: its sha256 is not the committed one"
    except FileNotFoundError:
        return f"{path}: is missing"
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    return None


def sha256_of(file: BinaryIO) -> str:
    """Checksum of the content of a file."""
    digest = hashlib.sha256()
    while chunk := file.read(CHUNK_BYTES):
        digest.update(chunk)
    return digest.hexdigest()


def load_arrays(files: Files, record: FileRecord) -> Arrays:
    """Read arrays back.

    Raises:
        ConfigError: the file is missing or is not the one that was recorded.
    """
    try:
        data = files.read(record.path)
    except FileNotFoundError:
        raise ConfigError(f"{files}/{record.path}: is missing") from None
    except OSError as error:
        raise ConfigError(f"{files}/{record.path}: cannot be read: {error.strerror}") from error
    if len(data) != record.size_bytes:
        raise ConfigError(
            f"{files}/{record.path}: has {len(data)} bytes instead of {record.size_bytes}"
        )
    if FileRecord.of(record.path, data) != record:
        raise ConfigError(f"{files}/{record.path}: its sha256 is not the committed one")
    try:
        if record.path.endswith(".safetensors"):
            return dict(safetensors.numpy.load(data))
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, zipfile.BadZipFile, safetensors.SafetensorError) as error:
        raise ConfigError(f"{files}/{record.path}: holds no arrays: {error}") from error
