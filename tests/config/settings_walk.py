"""How a field of a settings class is walked: other values of it, and what tiny runs make of it."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, TypeAdapter, ValidationError

from dmrl_ray.config.components import Component
from dmrl_ray.config.loading import parse_config
from dmrl_ray.control.checks import check
from dmrl_ray.control.run_state import Run
from dmrl_ray.control.stages import run_stage
from dmrl_ray.errors import ConfigError
from dmrl_ray.results.display import Display
from dmrl_ray.store.writer import RunWriter

Values = list[Any]


@dataclass(frozen=True)
class Section:
    """A settings class, where it stands in the config of a tiny run, and what is known of it.

    Attributes:
        values: other values of fields that none can be made up for, or where few would do.
        beside: what a field needs in the config to be read there, by dotted path.
        only: the fields that are walked here; all, if empty.
    """

    name: str
    model: type[BaseModel]
    path: str
    config: dict[str, Any]
    values: dict[str, Values] = field(default_factory=dict)
    beside: dict[str, dict[str, Any]] = field(default_factory=dict)
    only: tuple[str, ...] = ()

    def fields(self) -> list[str]:
        """Those that a config can change here; sections within have an entry of their own."""
        return [
            name
            for name, info in self.model.model_fields.items()
            if (name in self.only or not self.only)
            and name != "type"
            and not (_is_section(info.annotation) and name not in self.values)
        ]


def _is_section(annotation: Any) -> bool:
    return any(
        isinstance(kind, type) and issubclass(kind, BaseModel) and kind is not Component
        for kind in leaves(annotation)
    )


def leaves(annotation: Any) -> Iterator[Any]:
    """The plain types and literals in an annotation."""
    if get_origin(annotation) is Literal or not get_args(annotation):
        yield annotation
        return
    for part in get_args(annotation):
        yield from leaves(part)


class Differs(Exception):
    """A run does something else than the one it is compared with."""


class Log(RunWriter):
    """Stands where a run's writer does: what would be written, in order, as hashes.

    Args:
        folder: empty.
        expected: what another run wrote; the first thing that is not that ends this one.
    """

    state: Any = None
    number = 0
    run_id = "run"

    def __init__(self, folder: Path, expected: list[str] | None = None) -> None:
        self.folder, self.expected = folder, expected
        self.written: list[str] = []
        self.files: dict[str, Any] = {}
        self._arrays: dict[str, Any] = {}
        self._tasks = None

    def add(self, table: str, columns: Any) -> None:
        rows = dict(columns)
        if table == "metrics":
            timed = [n.startswith("time/") or n == "steps_per_s" for n in rows["name"]]
            rows["value"] = np.where(timed, 0.0, rows["value"])
        if table == "events":
            rows["detail"] = {k: v for k, v in json.loads(rows["detail"]).items() if k != "seconds"}
        self._write(table, rows)

    def save(self, name: str, arrays: Any) -> str:
        self._arrays[name] = {key: np.array(array) for key, array in arrays.items()}
        self._write(name, arrays)
        return name

    def load(self, name: str) -> Any:
        return self._arrays[name]

    def commit(self, state: Any, files: Any) -> None:
        pass

    def discard(self) -> None:
        pass

    def _write(self, name: str, columns: Any) -> None:
        digest = hashlib.sha1(name.encode())
        for key in sorted(columns):
            digest.update(key.encode())
            digest.update(_bytes(columns[key]))
        at = len(self.written)
        self.written.append(digest.hexdigest())
        if self.expected is not None and self.expected[at : at + 1] != self.written[at:]:
            raise Differs


def _bytes(cells: Any) -> bytes:
    if isinstance(cells, pa.Array):
        cells = cells.to_pylist()
    if isinstance(cells, np.ndarray) and cells.dtype != object:
        return repr(cells.shape).encode() + cells.tobytes()
    return repr(cells).encode()


def play(config: Any, expected: list[str] | None = None) -> list[str]:
    """What a run writes but for its config.

    Raises:
        Differs: from what was expected.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Log(Path(folder), expected)
        run = Run(config, log, Display(quiet=True), None)  # type: ignore[arg-type]
        for name in config.stages:
            run_stage(run, name)
    if expected is not None and len(log.written) != len(expected):
        raise Differs
    return log.written


@cache
def written(text: str) -> list[str]:
    """What the run of a config writes."""
    return play(parse_config(text, "base.yaml"))


def put(config: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted path."""
    *parents, last = path.split(".")
    for key in parents:
        config = config.setdefault(key, {})
    config[last] = value


def get(config: dict[str, Any], path: str) -> Any:
    """What stands at a dotted path; None if nothing does."""
    found: Any = config
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def base_of(section: Section, name: str, data: str) -> dict[str, Any]:
    """The config that a field is changed in: with whatever it is read with.

    Args:
        data: the folder that DATA stands for.
    """
    config = json.loads(json.dumps(section.config).replace("DATA", data))
    if name in getattr(section.model, "conditions", dict)():
        other, values = section.model.conditions()[name]  # type: ignore[attr-defined]
        path = f"{section.path}.{other}"
        now = _current(section, config, other)
        if values and now not in values:
            put(config, path, values[0])
        elif not values and not now:
            put(config, path, next(v for v in other_values(section, other, config) if v))
        drop_what_is_unread(section, config)
    for path, value in section.beside.get(name, {}).items():
        put(config, path, json.loads(json.dumps(value).replace("DATA", data)))
    return config


def drop_what_is_unread(section: Section, config: dict[str, Any]) -> None:
    """Take out of a section what its other settings switch off."""
    there = get(config, section.path) or {}
    for name, (other, values) in section.model.conditions().items():  # type: ignore[attr-defined]
        now = _current(section, config, other)
        if name in there and not (now in values if values else now):
            del there[name]


def _current(section: Section, config: dict[str, Any], name: str) -> Any:
    there = get(config, section.path) if section.path else config
    if isinstance(there, dict) and name in there:
        return there[name]
    default = section.model.model_fields[name].get_default(call_default_factory=True)
    return default.model_dump() if isinstance(default, BaseModel) else default


def other_values(section: Section, name: str, config: dict[str, Any]) -> Values:
    """Values that the schema allows, other than that of the config; [] if none can be made up."""
    if name in section.values:
        return section.values[name]
    info, now = section.model.model_fields[name], _current(section, config, name)
    made_up = [*itertools.chain.from_iterable(_of_kind(k, now) for k in leaves(info.annotation))]
    if get_origin(info.annotation) is tuple or isinstance(now, tuple | list):
        made_up = [*_lists(made_up, list(now or ()), get_args(info.annotation))]
    adapter = TypeAdapter(
        info.annotation if not info.metadata else _annotated(info.annotation, info.metadata)
    )
    now = list(now) if isinstance(now, tuple) else now
    return [value for value in made_up if value != now and _fits(adapter, value)]


def _annotated(annotation: Any, metadata: list[Any]) -> Any:
    from typing import Annotated

    return Annotated[(annotation, *metadata)]


def _fits(adapter: TypeAdapter[Any], value: Any) -> bool:
    try:
        adapter.validate_python(value)
    except ValidationError:
        return False
    return True


def _of_kind(kind: Any, now: Any) -> Values:
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    number = now if isinstance(now, int | float) and not isinstance(now, bool) else None
    if kind is bool:
        return [not now] if isinstance(now, bool) else [True, False]
    if kind is int:
        return [1, 2, 3] if number is None else [number + 1, number - 1, 2 * number, 2]
    if kind is float:
        few = [0.5, 0.1, 2.0]
        return few if not number else [number / 2, 2 * number, number / 1000, 1000 * number, *few]
    return []


def _lists(items: Values, now: Values, kinds: tuple[Any, ...]) -> Iterator[Values]:
    """One item; another first item; all but the last."""
    if now and isinstance(now[0], int | float):
        yield [now[0] + 1, *now[1:]]
        yield [*now[:-1], 2 * now[-1]]
        yield [now[0] / 2, *now[1:]]
    yield from ([item] for item in items)
    if Ellipsis in kinds:
        yield now[:-1]


def fate(section: Section, name: str, data: str) -> str | None:
    """``read`` or ``refused``: what became of another value of a field; None if nothing did.

    Raises:
        LookupError: no value can be made up.
    """
    base = base_of(section, name, data)
    values = other_values(section, name, base)
    if not values:
        raise LookupError(f"{section.name}.{name}: no other value can be made up; give one")
    expected, failed = written(json.dumps(base)), None
    for value in json.loads(json.dumps(values).replace("DATA", data)):
        changed = copy.deepcopy(base)
        put(changed, f"{section.path}.{name}".strip("."), value)
        try:
            config = parse_config(json.dumps(changed), "changed.yaml")
        except ConfigError as error:
            if "leave it out" in str(error):
                return "refused"
            continue
        try:
            play(config, expected)
        except Differs:
            return "read"
        except Exception as error:  # The check must see it.
            failed = error
        try:
            check(config)
        except ConfigError as error:
            if f"{name}:" in str(error).replace("'", ":") and "\n" not in str(error):
                return "refused"
    if failed is not None:
        raise failed
    return None


def counts(model: type[BaseModel], name: str) -> list[dict[str, Any]]:
    """The schemas of whole numbers in a field, of those that are not any numbers."""
    return list(_integers(model.model_json_schema()["properties"][name]))


def _integers(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, list):
        for part in schema:
            yield from _integers(part)
    elif isinstance(schema, dict):
        if schema.get("type") == "integer":
            yield schema
        for key in ("anyOf", "oneOf", "items", "prefixItems"):
            parts = schema.get(key, [])
            kinds = [p.get("type") for p in parts] if isinstance(parts, list) else []
            if "number" not in kinds:
                yield from _integers(parts)
