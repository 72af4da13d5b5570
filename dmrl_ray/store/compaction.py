"""Compaction: many small parts of a table become a larger one, inside a commit.

The parts of a table are of tiers by their size, each tier `TIER` times as large as the one before.
Where `TIER` parts of a tier have come together among the newest, they become one part, which then
is of the next tier. So a row is written again once a tier, and the number of parts grows with the
logarithm of the number of commits. A commit merges parts of one table at most, so that the work is
spread over commits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dmrl_ray.errors import ConfigError
from dmrl_ray.store.files import FileRecord, LocalFiles
from dmrl_ray.store.parquet import open_parquet
from dmrl_ray.store.tables import SCHEMAS, as_parquet, check_columns

TIER = 8
"""Parts of one size that become one of the next size."""

SMALL_BYTES = 64 << 10
"""Parts up to this size are of the first tier."""

LARGE_BYTES = 16 << 20
"""Parts from this size on are left as they are."""

PIECE_BYTES = 64 << 20
"""Rows that are in memory at once while parts are merged, beside the files."""


def mergeable(parts: Sequence[FileRecord]) -> list[FileRecord]:
    """Parts of one table, of those given in order, that are to become one; none if too few are."""
    run: list[FileRecord] = []
    tier_bytes, in_tier = SMALL_BYTES, 0
    for part in reversed(parts):
        if part.size_bytes >= LARGE_BYTES:
            break
        while part.size_bytes >= tier_bytes:
            if in_tier >= TIER:
                return run[::-1]
            tier_bytes, in_tier = tier_bytes * TIER, 0
        run.append(part)
        in_tier += part.size_bytes >= tier_bytes // TIER or tier_bytes == SMALL_BYTES
    return run[::-1] if in_tier >= TIER else []


def most_mergeable(parts: Iterable[FileRecord], except_of: Collection[str]) -> list[FileRecord]:
    """The `mergeable` parts of that table which has most of them."""
    tables: dict[str, list[FileRecord]] = {}
    for part in parts:
        tables.setdefault(part.path.split("/")[0], []).append(part)
    runs = [mergeable(found) for table, found in tables.items() if table not in except_of]
    return max(runs, key=len, default=[])


def merged(run: Path, parts: Sequence[FileRecord], metadata: Mapping[str, str]) -> pa.Buffer:
    """The rows of parts of a table, in order, as one Parquet file.

    Raises:
        ValueError: a part is damaged, or the parts differ in the types of their columns.
        OSError: a part cannot be read.
    """
    table = parts[0].path.split("/")[0]
    files = [_opened(run, table, part) for part in parts]
    metadata = {**SCHEMAS[table].metadata, **metadata}
    try:
        schema = pa.unify_schemas([file.schema_arrow.remove_metadata() for file in files])
        schema = schema.with_metadata(metadata)
        return as_parquet(table, schema, _pieces(files, schema))
    except pa.ArrowException as error:
        raise ConfigError(f"{run / table}: its parts cannot be joined: {error}") from error


def _opened(run: Path, table: str, part: FileRecord) -> pq.ParquetFile:
    data = LocalFiles(run).read(part.path)
    if FileRecord.of(part.path, data) != part:
        raise ConfigError(f"{run / part.path}: is not as it was committed")
    file = open_parquet(run / part.path, pa.BufferReader(data))
    check_columns(run / part.path, file, table)
    return file


def _pieces(files: Sequence[pq.ParquetFile], schema: pa.Schema) -> Iterator[pa.Table]:
    empty, pending, size_bytes = schema.empty_table(), list[pa.Table](), 0
    for file in files:
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, use_threads=False).replace_schema_metadata()
            pending.append(rows)
            size_bytes += rows.nbytes
            if size_bytes >= PIECE_BYTES:
                yield pa.concat_tables([empty, *pending], promote_options="default")
                pending, size_bytes = [], 0
    if pending:
        yield pa.concat_tables([empty, *pending], promote_options="default")
