"""Opens Parquet files of others so that no type in them runs code.

Arrow stores its own schema in the footer and rebuilds extension types from it when it opens a file.
Types that a library has registered may unpickle what the file says, before any value is read. Here
that schema is left out, so that columns have Parquet's own types.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from dmrl_ray.errors import ConfigError

_MAGIC = b"PAR1"
_SCHEMA, _LEFT_OUT = b"ARROW:schema", b"arrow-schema"


def open_parquet(path: Path, source: BinaryIO | pa.BufferReader) -> pq.ParquetFile:
    """Open a Parquet file.

    Args:
        path: for messages.
        source: the content.

    Raises:
        ConfigError: it is damaged, or no Parquet file.
    """
    try:
        footer = _footer(source).replace(_SCHEMA, _LEFT_OUT)
        alone = _MAGIC + footer + len(footer).to_bytes(4, "little") + _MAGIC
        metadata = pq.read_metadata(pa.BufferReader(alone))
        return pq.ParquetFile(source, metadata=metadata, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"{path}: is damaged: {error}") from error


def has_extension_types(file: pq.ParquetFile) -> bool:
    """Returns whether a file stores columns of extension types, which are read as plain ones."""
    schema = (file.metadata.metadata or {}).get(_LEFT_OUT, b"")
    return b"ARROW:extension:name" in base64.b64decode(schema)


def _footer(source: BinaryIO | pa.BufferReader) -> bytes:
    size = source.seek(0, 2)
    source.seek(max(0, size - 8))
    tail = source.read(8)
    length = int.from_bytes(tail[:4], "little")
    if len(tail) < 8 or tail[4:] != _MAGIC or length > size - 12:
        raise ValueError("it is no Parquet file")
    source.seek(size - 8 - length)
    return bytes(source.read(length))
