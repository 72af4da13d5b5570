"""Parses YAML text to plain values, with the line and column of every key.

A strict subset of YAML: no anchors, aliases, tags or duplicate keys, bounded size and depth. Only
``true`` and ``false`` are booleans, ``1e-3`` is a number, keys are strings.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import yaml

from dmrl_ray.config.components import did_you_mean

Path: TypeAlias = tuple[str | int, ...]
"""Keys and indices that lead to a value."""

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_VALUES = 20_000


@dataclass(frozen=True, order=True)
class Problem:
    """An error in a config, with its location."""

    line: int  # From 0; overrides of the command line come after the lines of the file.
    column: int
    text: str  # As shown: location, key, message, and the offending line with a caret.


@dataclass
class Document:
    """Values of a config, with the location of each.

    Args:
        name: the file, as shown in messages.
    """

    name: str
    lines: list[str]
    data: Any = None
    marks: dict[Path, tuple[int, int]] = field(default_factory=dict)
    overrides: dict[Path, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def report(self, path: Path, message: str) -> None:
        """Adds a problem at a key or, if the key is not in the file, at its nearest parent."""
        key = ".".join(map(str, path))
        subject = f"{key}: {message}" if key else message
        for length in range(len(path), -1, -1):
            start = path[:length]
            text = self.overrides.get(start)
            if text is None and start in self.marks:
                self.report_at(*self.marks[start], subject)
                return
            if text is None and start:
                text = next((t for p, t in self.overrides.items() if p[:length] == start), None)
            if text is not None:
                shown = f"command line: {subject}\n    {text}"
                self.problems.append(Problem(len(self.lines), len(self.problems), shown))
                return
        self.report_at(0, 0, subject)

    def report_at(self, line: int, column: int, message: str) -> None:
        """Adds a problem at a line and column, counted from 0."""
        text = f"{self.name}:{line + 1}:{column + 1}: {message}"
        if line < len(self.lines) and self.lines[line].strip() and column < 110:
            text += f"\n    {self.lines[line][:110]}\n    {' ' * column}^"
        self.problems.append(Problem(line, column, text))

    def override(self, text: str) -> None:
        """Applies an override ``key.path=value`` of the command line."""
        dotted, equals, value_text = text.partition("=")
        path = self.resolve(dotted.strip())
        if not equals or not dotted.strip():
            self.overrides[path] = text
            self.report(path, "an override has the form 'key.path=value'")
            return
        value = parse("command line", value_text)
        self.overrides[path] = text
        for problem in value.problems:
            self.report(path, problem.text.splitlines()[0].split(": ", 1)[-1])
        section = self._section(path)
        if section is not None and not value.problems:
            section[path[-1]] = value.data
            self.marks = {p: m for p, m in self.marks.items() if p[: len(path)] != path}

    def resolve(self, dotted: str) -> Path:
        """Returns the path of a dotted key; existing keys may contain dots themselves."""
        words, path, here = dotted.split("."), [], self.data
        while words:
            lengths = range(len(words), 0, -1) if isinstance(here, dict) else ()
            length = next((n for n in lengths if ".".join(words[:n]) in here), 1)
            path.append(".".join(words[:length]))
            here = here.get(path[-1]) if isinstance(here, dict) else None
            words = words[length:]
        return tuple(path)

    def _section(self, path: Path) -> dict[str | int, Any] | None:
        """Returns the mapping that contains `path`, and creates it if it is missing."""
        here: dict[str | int, Any] = self.data
        for depth, key in enumerate(path[:-1]):
            if path[:depth] == ("stages",) and key not in here:
                self.report(
                    path, f"there is no stage '{key}'{did_you_mean(str(key), map(str, here))}"
                )
                return None
            below = here.get(key)
            if below is None or isinstance(below, str):
                below = {} if below is None else {"type": below}
                here[key] = below
                self.marks.pop(path[: depth + 1], None)
            if not isinstance(below, dict):
                self.report(path, f"'{key}' is not a section, so it has no settings")
                return None
            here = below
        return here


def parse(name: str, text: str) -> Document:
    """Parses a text; errors are in the ``problems`` of the result."""
    document = Document(name, text.splitlines())
    if len(text.encode(errors="replace")) > MAX_BYTES:
        document.report_at(0, 0, "the file is larger than 1 MB, too large for a config")
        return document
    try:
        loader = _Loader(text)
        loader.document = document
        node = loader.get_single_node()
        document.data = None if node is None else _value(document, loader, node, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        assert mark is not None
        document.report_at(mark.line, mark.column, f"not valid YAML: {error.problem}")
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position)
        document.report_at(line, 0, f"not valid YAML: {error.reason}")
    return document


def dump(data: object) -> str:
    """Returns values as YAML text, which `parse` reads back unchanged."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012
    document: Document
    depth = 0
    values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        mark = event.start_mark
        self.depth, self.values = self.depth + 1, self.values + 1
        if self.depth > MAX_DEPTH or self.values > MAX_VALUES:
            much = "nested too deeply" if self.depth > MAX_DEPTH else "too long for a config"
            raise yaml.MarkedYAMLError(problem=much, problem_mark=mark)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(
                problem="anchors (&) and aliases (*) are not allowed; write the value out",
                problem_mark=mark,
            )
        if getattr(event, "tag", None):
            problem = f"tags such as '{event.tag}' are not allowed"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_list(self, data: Any) -> yaml.SequenceNode:
        flat = not any(isinstance(item, dict | list) for item in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flat)


_Dumper.add_representer(list, _Dumper.represent_list)


_DIGITS = list("-+0123456789.")
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|false)$", list("tf")),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", _DIGITS),
    (
        "float",
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.[0-9]+(?:[eE][-+]?[0-9]+)?|\.(?:inf|nan))$",
        _DIGITS,
    ),
    ("null", r"^(?:~|null|)$", ["~", "n", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _value(document: Document, loader: _Loader, node: yaml.Node, path: Path) -> Any:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            document.marks[(*path, index)] = (item.start_mark.line, item.start_mark.column)
        return [_value(document, loader, item, (*path, i)) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        return _mapping(document, loader, node, path)
    try:
        return loader.construct_object(node)
    except ValueError as error:  # A number with thousands of digits.
        raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from error


def _mapping(
    document: Document, loader: _Loader, node: yaml.MappingNode, path: Path
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key_node, value_node in node.value:
        mark = key_node.start_mark
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key must be a plain scalar", problem_mark=mark)
        key = str(key_node.value)
        below = (*path, key)
        if key in found:
            first = document.marks[below][0] + 1
            message = f"{'.'.join(map(str, below))}: set twice, first in line {first}"
            document.report_at(mark.line, mark.column, message)
            continue
        document.marks[below] = (mark.line, mark.column)
        found[key] = _value(document, loader, value_node, below)
    return found
