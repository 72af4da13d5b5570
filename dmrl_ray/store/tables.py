"""The results tables: their schemas, pinned and versioned, and rows on their way to Parquet."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dmrl_ray.errors import ConfigError
from dmrl_ray.store.files import open_inside
from dmrl_ray.store.parquet import has_extension_types, open_parquet

SCHEMA_VERSION = 2
"""Raised when a column is added or changes its meaning; readers fill missing columns with null."""

Cells: TypeAlias = np.ndarray | pa.Array | Sequence[object] | str | float | None
"""The cells of one column, or one value that stands in all rows."""

ROW_GROUP_BYTES = 1 << 20
"""Rows are read back in groups of about this size, where they hold vectors or images."""

_TEXT, _INT, _FLOAT, _BOOL = pa.string(), pa.int64(), pa.float64(), pa.bool_()
_VECTOR, _IMAGE = pa.list_(pa.float32()), pa.list_(pa.uint8())
_TIME = pa.timestamp("us", tz="UTC")

_COLUMNS: dict[str, dict[str, pa.DataType]] = {
    "tasks": {
        "run_id": _TEXT,
        "task_id": _TEXT,
        "family": _TEXT,
        "split": _TEXT,
        "params": _TEXT,  # JSON; single numbers stand in columns of their own too, see PARAM
    },
    "trained_on": {
        "run_id": _TEXT,
        "stage": _TEXT,
        "task_id": _TEXT,
        "split": _TEXT,
    },
    "episodes": {
        "run_id": _TEXT,
        "stage": _TEXT,
        "job": _TEXT,
        "algorithm": _TEXT,
        "task_id": _TEXT,
        "split": _TEXT,
        "seed": _INT,
        "trial": _INT,
        "episode": _INT,
        "change": _INT,  # tasks met before in a stream; null elsewhere
        "adaptation_step": _INT,
        "experience_steps": _INT,  # of the agent on this task before the episode, parallel copies
        "experience_episodes": _INT,  # ... included
        "policy_version": _INT,  # that acted when the episode ended
        "env_steps": _INT,
        "return": _FLOAT,
        "length": _INT,
        "success": _BOOL,  # at any step
        "score": _FLOAT,
        "greedy": _BOOL,  # the most probable actions, not sampled ones
        "time": _TIME,
    },
    "metrics": {
        "run_id": _TEXT,
        "stage": _TEXT,
        "job": _TEXT,
        "policy_version": _INT,
        "env_steps": _INT,
        "name": _TEXT,
        "value": _FLOAT,
        "time": _TIME,
    },
    "events": {
        "run_id": _TEXT,
        "stage": _TEXT,
        "job": _TEXT,
        "event": _TEXT,
        "detail": _TEXT,  # JSON
        "time": _TIME,
    },
    "transitions": {
        "run_id": _TEXT,
        "stage": _TEXT,
        "job": _TEXT,
        "task_id": _TEXT,
        "split": _TEXT,
        "trial": _INT,
        "environment": _INT,  # of the environment, over all shards; rows of one are a history
        "episode": _INT,
        "t": _INT,  # step within the episode
        "policy_version": _INT,
        "adaptation_step": _INT,
        "obs": _VECTOR,  # or _IMAGE; flat, in C order
        "action": _INT,  # or _VECTOR
        "reward": _FLOAT,
        "terminated": _BOOL,
        "truncated": _BOOL,
        "log_prob": _FLOAT,
        "next_obs": _VECTOR,  # or _IMAGE; null where it is the obs of the next row
    },
}
PARAM = "param."
"""Begins the names of further columns of tasks: numbers, null where a family has no such one."""

_NULLABLE = {
    *("success", "score", "change", "next_obs"),
    *("experience_steps", "experience_episodes"),
}
"""Not every family knows success, nor both ends of a score; nor every library experience."""

_HIGH_CARDINALITY = {"tasks": ("task_id", "params"), "trained_on": ("task_id",)}
"""Columns without a dictionary in Parquet, as their values are nearly unique."""

_OTHER_TYPE = {"obs": _IMAGE, "next_obs": _IMAGE, "action": _VECTOR}
"""Other types that a column may have, by the task family; the same in all rows of a run."""


_HASH = re.compile(r"_?part-\d{8}-\d{4}-([0-9a-f]{16})\.parquet(?:\.hidden)?")

HISTORY = ("run_id", "stage", "job", "environment")
"""Columns of transitions that say whose history a row belongs to ..."""

IN_HISTORY = ("trial", "episode", "t")
"""... and where in it, in the order in which it was collected."""


def fits(table: str, column: str, kind: pa.DataType) -> bool:
    """Whether a column of this type can stand in a table; columns it does not know must be plain.

    Nested and extension types of others are refused: reading an extension type may run code.
    """
    known = _COLUMNS[table].get(column)
    if known is None:
        return pa.types.is_primitive(kind) or pa.types.is_string(kind)
    return kind == known or kind == _OTHER_TYPE.get(column)


def check_columns(path: Path, file: pq.ParquetFile, table: str) -> None:
    """Raise ValueError if the columns of a file cannot stand in a table."""
    schema = schema_of(table)
    if has_extension_types(file):
        raise ConfigError(f"{path}: has columns of an extension type; a table has plain ones")
    for field in file.schema_arrow:
        if not fits(table, field.name, field.type):
            known = field.name in schema.names
            wanted = schema.field(field.name).type if known else "a plain type"
            raise ConfigError(f"{path}: column {field.name!r} is {field.type} instead of {wanted}")


def open_part(path: Path, table: str) -> pq.ParquetFile:
    """Open a part of a table, to read it piece by piece; its columns are checked before any data.

    Raises:
        ValueError: it is damaged, or its columns cannot stand in the table.
        FileNotFoundError: it is missing.
    """
    file = open_parquet(path, _open(path))
    check_columns(path, file, table)
    return file


def read_part(path: Path, table: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A part of a table, or some of its columns, which are checked before any data.

    Raises:
        ValueError: it is damaged, or its columns cannot stand in the table.
        FileNotFoundError: it is missing.
    """
    with _open(path) as opened:
        data = opened.read()
    match = _HASH.fullmatch(path.name)
    if match and not hashlib.sha256(data).hexdigest().startswith(match[1]):
        raise ConfigError(f"{path}: is damaged (its checksum does not match its name)")
    file = open_parquet(path, pa.BufferReader(data))
    check_columns(path, file, table)
    names = list(file.schema_arrow.names if columns is None else columns)
    if missing := [name for name in names if name not in file.schema_arrow.names]:
        raise ConfigError(f"{path}: lacks the columns {', '.join(missing)}")
    try:
        rows = file.read(names, use_threads=False).select(names).replace_schema_metadata()
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: is damaged: {error}") from error
    for name in _COLUMNS[table].keys() & set(names) - _NULLABLE:
        if rows[name].null_count:
            raise ConfigError(f"{path}: column {name!r} has cells without a value")
    return rows


def _open(path: Path) -> BinaryIO:
    try:
        return open_inside(path.parents[1], f"{path.parent.name}/{path.name}")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def _schema(table: str) -> pa.Schema:
    fields = [pa.field(n, t, nullable=n in _NULLABLE) for n, t in _COLUMNS[table].items()]
    return pa.schema(fields, {"dmrl.schema_version": str(SCHEMA_VERSION), "dmrl.table": table})


SCHEMAS: dict[str, pa.Schema] = {table: _schema(table) for table in _COLUMNS}


def schema_of(table: str) -> pa.Schema:
    """The schema of a table; ValueError for an unknown one."""
    if table not in SCHEMAS:
        close = difflib.get_close_matches(table, SCHEMAS, 1, 0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(SCHEMAS)}"
        raise ConfigError(f"{table!r} is not a table; {hint}")
    return SCHEMAS[table]


def as_parquet(table: str, schema: pa.Schema, pieces: Iterable[pa.Table]) -> pa.Buffer:
    """Rows of a table, piece by piece, as a Parquet file."""
    unlike = _HIGH_CARDINALITY.get(table)
    out = pa.BufferOutputStream()
    with pq.ParquetWriter(
        out,
        schema,
        use_dictionary=unlike is None or [n for n in schema.names if n not in unlike],
        compression="zstd",
        write_page_checksum=True,
    ) as writer:
        for rows in pieces:
            group = None
            if "obs" in schema.names:
                group = max(1, ROW_GROUP_BYTES * rows.num_rows // max(1, rows.nbytes))
            writer.write_table(rows, row_group_size=group)
    return out.getvalue()


class TableBuffer:
    """Rows of one table since the last commit."""

    def __init__(self, table: str) -> None:
        self.schema = schema_of(table)
        self._types = _COLUMNS[table]
        self._optional = self._types.keys() & _NULLABLE
        self._further: dict[str, None] = {}  # names of the `PARAM` columns of these rows
        self._chunks: list[tuple[int, dict[str, object]]] = []
        self.num_rows = 0
        self.size_bytes = 0  # of the columns that came as Arrow arrays

    def add(self, columns: Mapping[str, Cells]) -> None:
        """Append rows, which are copied; one value stands in all rows.

        Raises:
            ValueError: a column is missing, unknown, of another length or of another type.
        """
        cells: dict[str, object] = dict.fromkeys(self._optional)
        rows: int | None = None
        for name, value in columns.items():
            if name not in self._types:
                if self._name != "tasks" or not name.startswith(PARAM):
                    raise ValueError(f"{self._name}: {name!r} is not a column of this table")
                self._further[name] = None
            if isinstance(value, pa.Array) and not fits(self._name, name, value.type):
                raise ValueError(f"{self._name}.{name}: {value.type} is not a type of this column")
            try:
                cell = cells[name] = _cells(value, self._types.get(name, _FLOAT))
            except (TypeError, ValueError, pa.ArrowException) as error:
                raise ValueError(f"{self._name}.{name}: {error}") from error
            if not isinstance(cell, (np.ndarray, pa.Array)):
                if cell is None and name not in self._optional:
                    raise ValueError(f"{self._name}.{name}: is None")
                continue
            if rows is not None and len(cell) != rows:
                raise ValueError(f"{self._name}.{name}: has {len(cell)} rows instead of {rows}")
            rows = len(cell)
        if missing := self._types.keys() - cells.keys():
            raise ValueError(f"{self._name}: lacks the columns {', '.join(missing)}")
        rows = 1 if rows is None else rows
        self._chunks.append((rows, cells))
        self.num_rows += rows
        self.size_bytes += sum(c.nbytes for c in cells.values() if isinstance(c, pa.Array))

    @property
    def _name(self) -> str:
        return str(self.schema.metadata[b"dmrl.table"].decode())

    def clear(self) -> None:
        """Forget the rows."""
        self._chunks.clear()
        self._further.clear()
        self.num_rows = self.size_bytes = 0

    def to_parquet(self, metadata: Mapping[str, str]) -> pa.Buffer:
        """The rows as a Parquet file."""
        fields = [*self.schema, *(pa.field(name, _FLOAT) for name in self._further)]
        columns = [self._column(field) for field in fields]
        schema = pa.schema(
            [f.with_type(column.type) for f, column in zip(fields, columns, strict=True)],
            {**self.schema.metadata, **metadata},
        )
        return as_parquet(self._name, schema, [pa.Table.from_arrays(columns, schema=schema)])

    def _column(self, field: pa.Field) -> pa.Array:
        chunks = [(rows, cells.get(field.name)) for rows, cells in self._chunks]
        arrays = [cell for _, cell in chunks if isinstance(cell, pa.Array)]
        unknown = field.type == _INT and any(cell is None for _, cell in chunks)
        if arrays or unknown or field.type not in (_INT, _FLOAT, _TIME):
            kind = arrays[0].type if arrays else field.type
            many = [pa.array(cell) if isinstance(cell, np.ndarray) else cell for _, cell in chunks]
            return pa.concat_arrays(
                [
                    cell if isinstance(cell, pa.Array) else pa.repeat(pa.scalar(cell, kind), n)
                    for (n, _), cell in zip(chunks, many, strict=True)
                ]
            )
        column = np.empty(self.num_rows, np.float64 if field.type == _FLOAT else np.int64)
        start = 0
        for rows, cell in chunks:
            column[start : start + rows] = np.nan if cell is None else cell  # type: ignore[assignment]
            start += rows
        if field.type == _TIME:
            return pa.array(column).cast(_TIME)
        return pa.array(column, from_pandas=field.nullable)


def _cells(value: Cells, kind: pa.DataType) -> object:
    """An array of this buffer's own, or one plain value."""
    if value is None:
        return None
    if isinstance(value, pa.Array):
        return value
    many = isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)
    if kind in (_TEXT, _BOOL):
        if many:
            return pa.array(value, kind, from_pandas=True)
        return pa.scalar(value.item() if isinstance(value, np.generic) else value, kind).as_py()
    array = np.array(value)
    if array.dtype == object and kind == _FLOAT:
        array = array.astype(np.float64)  # None becomes NaN
    if kind == _TIME:
        array = np.rint(array * 1e6).astype(np.int64)
    array = array.astype(
        np.float64 if kind == _FLOAT else np.int64, casting="same_kind", copy=False
    )
    return array if many else array.item()
