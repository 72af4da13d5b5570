"""Named arrays on disk: written whole or not at all, and never read back wrong.

Everything a run writes goes through `synced_file`, which is the only place that opens a file for
writing. Numbers are stored as safetensors, anything else (strings, too) as ``.npz``; nothing on
disk is a pickle.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import safetensors.numpy

from dmrl_ray.errors import StorageError
from dmrl_ray.types import Arrays

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file as a commit names it."""

    path: str  # relative to the run folder
    size_bytes: int
    sha256: str


class HashingFile(io.RawIOBase):
    """A file being written, and the size and checksum of what was written."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._sha256 = hashlib.sha256()
        self.size_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:  # type: ignore[no-untyped-def]
        view = memoryview(data).cast("B")
        self._raw.write(view)
        self._sha256.update(view)
        self.size_bytes += len(view)
        return len(view)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Tell an operating system's error as a `StorageError` that names the path."""
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
def synced_file(path: Path) -> Iterator[HashingFile]:
    """A new file whose content is on the disk when the block ends; removed if the block fails."""
    with storage_errors(path):
        try:
            with open(path, "wb") as raw:
                file = HashingFile(raw)
                yield file
                raw.flush()
                os.fsync(raw.fileno())
        except BaseException:
            with suppress(OSError):
                os.unlink(path)
            raise


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
def atomic_file(path: Path) -> Iterator[HashingFile]:
    """Write `path` whole or not at all: temporary name, fsync, rename, fsync of the folder."""
    temporary = _temporary(path)
    with synced_file(temporary) as file:
        yield file
    with storage_errors(path):
        os.rename(temporary, path)
    sync_folder(path.parent)


def put_if_absent(path: Path, data: bytes) -> bool:
    """Write `path` durably unless it exists; of several processes, exactly one gets True."""
    temporary = _temporary(path)
    with synced_file(temporary) as file:
        file.write(data)
    try:
        with storage_errors(path):
            os.link(temporary, path)
    except StorageError as error:
        # A network file system may do the link, lose its answer, and be asked again.
        if not (error.errno == errno.EEXIST and os.path.samefile(temporary, path)):
            os.unlink(temporary)
            if error.errno == errno.EEXIST:
                return False
            raise
    try:
        sync_folder(path.parent)
    except BaseException:
        os.unlink(path)  # it may not be durable, so it must not be there
        raise
    finally:
        with suppress(OSError):
            os.unlink(temporary)
    return True


def _temporary(path: Path) -> Path:
    return path.with_name(f"_{path.name}.{os.getpid()}.tmp")


def save_arrays(
    run: Path, path: str, arrays: Arrays, metadata: Mapping[str, str] | None = None
) -> FileRecord:
    """Write arrays to ``run / path``, a ``.safetensors`` (numbers only) or ``.npz`` file."""
    metadata = {"format": "dmrl.arrays.1", **(metadata or {})}
    for name, array in arrays.items():
        if array.dtype.hasobject:
            raise ValueError(f"{path}: array {name!r} holds Python objects, which are not stored")
    with atomic_file(run / path) as file:
        if path.endswith(".safetensors"):
            plain = {name: np.asarray(array, order="C") for name, array in arrays.items()}
            file.write(safetensors.numpy.save(plain, metadata))
        else:
            assert path.endswith(".npz"), path
            _write_npz(file, arrays, metadata)
    return FileRecord(path, file.size_bytes, file.sha256)


def is_numeric(arrays: Arrays) -> bool:
    """Whether safetensors can hold these arrays."""
    return all(array.dtype.kind in "biuf" and array.itemsize <= 8 for array in arrays.values())


def _write_npz(file: HashingFile, arrays: Arrays, metadata: Mapping[str, str]) -> None:
    # np.savez cannot store an array named "file" and allows pickles.
    with zipfile.ZipFile(file, "w") as archive:
        archive.comment = json.dumps(metadata).encode()
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)


def difference(run: Path, record: FileRecord) -> str | None:
    """What is wrong with a file of a commit, in a few words, or None."""
    path = run / record.path
    try:
        size_bytes = path.stat().st_size
        if size_bytes != record.size_bytes:
            return f"{path}: has {size_bytes} bytes instead of {record.size_bytes}"
        if sha256_of(path) != record.sha256:
            return f"{path}: its sha256 is not the committed one"
    except FileNotFoundError:
        return f"{path}: is missing"
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    return None


def sha256_of(path: Path) -> str:
    """Checksum of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def load_arrays(run: Path, record: FileRecord) -> Arrays:
    """Read arrays back.

    Raises:
        ValueError: the file is missing or is not the one that was recorded.
    """
    path = (run / record.path).resolve()
    if not path.is_relative_to(run.resolve()):
        raise ValueError(f"{record.path}: leads out of the run folder {run}")
    if problem := difference(run, record):
        raise ValueError(problem)
    if path.suffix == ".safetensors":
        return dict(safetensors.numpy.load_file(path))
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
