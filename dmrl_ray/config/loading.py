"""Loads configs from YAML, with errors that name the place and what was probably meant.

The schema of the run is validated first, then each `Component` by the ``Config`` of its class. All
errors of a config are shown at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, to_jsonable_python

from dmrl_ray.config.components import SHORT_NAMES, Component, did_you_mean, import_class
from dmrl_ray.config.messages import NAME_PATTERN, NAME_RULE, message_of
from dmrl_ray.config.schema import RLLIB, RunConfig
from dmrl_ray.config.yaml_text import MAX_BYTES, Document, Path, dump, parse
from dmrl_ray.errors import ConfigError, IncompatibleSettings

AnySettings = TypeVar("AnySettings", bound=BaseModel)

Overrides = Sequence[str]


def load_config(path: FilePath | str, overrides: Overrides = ()) -> RunConfig:
    """Loads a YAML file and applies ``key.path=value`` overrides.

    Raises:
        ConfigError: every problem of the file and of the overrides, each with its location.
    """
    return parse_config(_read(path), str(path), overrides)


@contextmanager
def locate_errors(path: FilePath | str, overrides: Overrides = ()) -> Iterator[None]:
    """Adds locations in this file to `IncompatibleSettings` raised within the context.

    Raises:
        ConfigError: every problem of the caught error, each with its location.
    """
    try:
        yield
    except IncompatibleSettings as incompatible:
        document = _document(_read(path), str(path), overrides)
        for stage, text in incompatible.problems:
            _report_incompatible(document, stage, text)
        try:
            _raise_problems(document)
        except ConfigError as located:
            raise located from incompatible


def _read(path: FilePath | str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(MAX_BYTES + 1).decode()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text") from error


def parse_config(text: str, name: str, overrides: Overrides = ()) -> RunConfig:
    """Returns the settings of a YAML text; `name` is the file name for messages.

    Components are returned with all their settings, defaults included.

    Raises:
        ConfigError: every problem of the text and of the overrides, each with its location.
    """
    document = _document(text, name, overrides)
    _check(document, RunConfig, document.data, ())
    _check_stages(document)
    _raise_problems(document)
    return expanded(RunConfig.model_validate(document.data))


def _document(text: str, name: str, overrides: Overrides) -> Document:
    """Parses the text and applies the overrides, without validation."""
    document = parse(name, text)
    _raise_problems(document)
    if not isinstance(document.data, dict):
        found = "is empty" if document.data is None else "holds no settings"
        raise ConfigError(f"{name}:1:1: the file {found}; a run needs at least tasks and stages")
    for override in overrides:
        document.override(override)
    _raise_problems(document)
    return document


def resolved(config: RunConfig) -> str:
    """Returns a config as YAML with every default; loading it gives an equal config."""
    return dump(plain(expanded(config)))


def expanded(settings: AnySettings) -> AnySettings:
    """Returns the same settings, every component with all its settings, defaults included."""
    return type(settings).model_validate(plain(settings))


def plain(value: object) -> Any:
    """Returns settings as plain mappings, lists, strings and numbers."""
    if isinstance(value, Component):
        return {"type": value.type} | plain(value.settings)
    if isinstance(value, BaseModel):
        names = sorted(type(value).model_fields, key=lambda name: name != "type")
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return to_jsonable_python(value)


def choices_of(settings: object, prefix: str = "") -> dict[str, list[str]]:
    """Returns the dotted names of all settings, each with its allowed values if they are few."""
    if isinstance(settings, Component):
        return {f"{prefix}type": [settings.type]} | choices_of(settings.settings, prefix)
    if isinstance(settings, dict):
        items = [choices_of(item, f"{prefix}{key}.") for key, item in settings.items()]
    elif isinstance(settings, BaseModel):
        items = [_choices_of_field(settings, name, prefix) for name in type(settings).model_fields]
    else:
        return {}
    return {name: choices for part in items for name, choices in part.items()}


def _choices_of_field(settings: BaseModel, name: str, prefix: str) -> dict[str, list[str]]:
    value, annotation = getattr(settings, name), type(settings).model_fields[name].annotation
    if isinstance(value, Component) and name in SHORT_NAMES:
        inside = choices_of(value, f"{prefix}{name}.")
        return inside | {f"{prefix}{name}.type": list(SHORT_NAMES[name])}
    if isinstance(value, Component | BaseModel | dict):
        return choices_of(value, f"{prefix}{name}.")
    words = ["false", "true"] if annotation is bool else []
    return {f"{prefix}{name}": words or [str(x) for x in get_args(annotation) if type(x) is str]}


def _raise_problems(document: Document) -> None:
    if document.problems:
        raise ConfigError("\n".join(problem.text for problem in sorted(document.problems)))


def _check(document: Document, model: type[BaseModel], data: dict[str, Any], path: Path) -> None:
    """Reports the errors of `data` and of the components in it."""
    components = list(_components(model, data, path))
    try:
        model.model_validate(data)
    except ValidationError as invalid:
        errors = invalid.errors(include_url=False)
        wrong = {error["loc"][:-1] for error in errors}
        for error in errors:
            # Pydantic also reports a list whose items are all invalid as too short.
            if error["type"] != "too_short" or error["loc"] not in wrong:
                _report(document, model, error, data, path)
    for owner, section, place in _sections(model, data, path):
        _check_booleans(document, owner, section, place)
    for kind, below, component in components:
        _check_component(document, kind, component, below)


def _sections(
    model: type[BaseModel], data: dict[str, Any], path: Path
) -> Iterator[tuple[type[BaseModel], dict[str, Any], Path]]:
    """Yields (model, data, path) of `data` and of every section in it, except components."""
    yield model, data, path
    for name, field in model.model_fields.items():
        value, models = data.get(name), _models(field.annotation)
        if not isinstance(value, dict) or Component in models:
            continue
        if len(models) == 1:
            yield from _sections(models[0], value, (*path, name))
        for key, item in value.items() if len(models) > 1 else ():
            for chosen in _tagged(models, item.get("type") if isinstance(item, dict) else None):
                yield from _sections(chosen, item, (*path, name, key))


def _components(
    model: type[BaseModel], data: dict[str, Any], path: Path
) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Yields (field, path, value) of each component in `data`, with default types filled in."""
    for owner, section, place in _sections(model, data, path):
        for name, field in owner.model_fields.items():
            if Component not in _models(field.annotation):
                continue
            if isinstance(section.get(name), str):
                section[name] = {"type": section[name]}
            value = section.get(name)
            if isinstance(value, dict) and isinstance(field.default, Component):
                value.setdefault("type", field.default.type)
            if isinstance(value, dict) and isinstance(value.get("type"), str):
                yield name, (*place, name), value


def _check_booleans(
    document: Document, model: type[BaseModel], section: dict[str, Any], path: Path
) -> None:
    """Reports booleans given for numbers, which pydantic would accept as 0 and 1."""
    for name, field in model.model_fields.items():
        kinds = _plain_types(field.annotation)
        if isinstance(section.get(name), bool) and bool not in kinds and kinds & {int, float}:
            found = str(section[name]).lower()
            document.report((*path, name), f"must be a number, found '{found}'")


def _plain_types(annotation: object) -> set[object]:
    if arguments := get_args(annotation):
        return set().union(*map(_plain_types, arguments))
    return {annotation} if isinstance(annotation, type) else set()


def _check_component(document: Document, kind: str, data: dict[str, Any], path: Path) -> None:
    try:
        config = import_class(data["type"], kind).Config
    except ValueError as error:
        document.report((*path, "type"), str(error))
        return
    settings = {key: value for key, value in data.items() if key != "type"}
    _check(document, config, settings, path)


def _models(annotation: object) -> list[type[BaseModel]]:
    """Returns the models in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _tagged(models: list[type[BaseModel]], tag: object) -> list[type[BaseModel]]:
    return [m for m in models if "type" in m.model_fields and m.model_fields["type"].default == tag]


def _place(
    model: type[BaseModel], error: ErrorDetails, data: Any
) -> tuple[Path, type[BaseModel] | None]:
    """Returns the path of an error in the data, and the model that its last key belongs to.

    The location that pydantic gives also holds the tag of a union's member, which is no key.
    """
    path: Path = ()
    models, owner = [model], None
    for index, key in enumerate(error["loc"]):
        last = index == len(error["loc"]) - 1
        there = (isinstance(data, dict) and key in data) or (
            isinstance(data, list) and isinstance(key, int) and key < len(data)
        )
        if not there and _tagged(models, key):
            models = _tagged(models, key)
        elif there or (last and error["type"] == "missing"):
            path = (*path, key)
            owner = models[0] if len(models) == 1 else None
            field = owner.model_fields.get(str(key)) if owner else None
            models = _models(field.annotation) if field else models
            data = data[key] if there else None
    return path, owner


def _report(
    document: Document, model: type[BaseModel], error: ErrorDetails, data: Any, parent: Path
) -> None:
    path, owner = _place(model, error, data)
    message = message_of(error, owner, str(error["loc"][-1]) if error["loc"] else "")
    if error["type"].startswith("union_tag_invalid"):
        path = (*path, "type")
    setting, _, rest = message.partition(": ")
    if error["type"] == "value_error" and setting in _section(data, path):
        path, message = (*path, setting), rest
    document.report(parent + path, message)


def _section(data: Any, path: Path) -> dict[str, Any]:
    """Returns the section at a path; empty if there is none."""
    for key in path:
        data = data[key] if isinstance(data, dict) and key in data else None
    return data if isinstance(data, dict) else {}


def _report_incompatible(document: Document, stage: str, text: str) -> None:
    """Reports a message that begins with a setting, at the place where the stage gets it from."""
    dotted, colon, message = text.partition(": ")
    parent = _owner(document.data, stage, dotted.split(".")[0]) if colon else None
    if parent is None:
        document.report(("stages", stage) if stage else (), text)
        return
    prefix = "".join(f"{key}." for key in parent)
    inside = parent[:1] == ("stages",) or not stage
    document.report(
        document.resolve(prefix + dotted), message if inside else f"{message} (stage {stage!r})"
    )


def _owner(data: dict[str, Any], stage: str, key: str) -> tuple[str, ...] | None:
    """Returns the section that a stage takes a setting from; None if there is no such setting."""
    section = data["stages"][stage] if stage else {}
    stages = _models(RunConfig.model_fields["stages"].annotation)
    own = any(key in model.model_fields for model in _tagged(stages, section.get("type")))
    if own and (key in section or key not in RunConfig.model_fields):
        return ("stages", stage)
    source = section.get("init_from")
    trains = section.get("type") in ("pretrain", "finetune")
    if (
        isinstance(source, str)
        and source in data["stages"]
        and (key == "network" or (key == "algorithm" and not trains))
    ):
        return _owner(data, source, key)
    return () if key in RunConfig.model_fields else None


def _check_stages(document: Document) -> None:
    """Checks the names of stages, and that they start from earlier stages."""
    stages = document.data.get("stages")
    earlier: dict[str, Any] = {}
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        if not NAME_PATTERN.match(name):
            document.report(("stages", name), f"a stage's name {NAME_RULE}")
        source = stage.get("init_from") if isinstance(stage, dict) else None
        if isinstance(source, str) and (wrong := _wrong_source(source, name, earlier, stages)):
            document.report(("stages", name, "init_from"), wrong)
        earlier[name] = stage


def _wrong_source(
    source: str, name: str, earlier: dict[str, Any], stages: dict[str, Any]
) -> str | None:
    """Returns why a stage cannot start from `source`; None if it can."""
    if source.startswith(RLLIB):
        return None
    if source in earlier:
        kind = earlier[source].get("type") if isinstance(earlier[source], dict) else None
        if kind not in ("finetune", "adapt", "evaluate"):
            return None
        trained = [key for key, s in earlier.items() if _is_pretrain(s)]
        known = f"; trained stages: {', '.join(trained) or 'none'}"
        return f"stage '{source}' is of type {kind}, which does not produce a single policy{known}"
    if source == name:
        return f"stage '{source}' is this stage itself"
    if source in stages:
        return f"stage '{source}' comes later; stages start from earlier ones"
    hint = did_you_mean(source, earlier) or f"; earlier stages: {', '.join(earlier) or 'none'}"
    return f"there is no earlier stage '{source}'{hint}"


def _is_pretrain(stage: object) -> bool:
    return isinstance(stage, dict) and stage.get("type") == "pretrain"
