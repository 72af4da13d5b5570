"""Validation errors of pydantic as one sentence each, for the author of a config."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dmrl_ray.config.components import MOVED, OLD_NAMES, did_you_mean

NAME_PATTERN = re.compile(r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$")

BY = "by: {type: continued, optimizer, lr, trainable, episodes}"
"""The setting that replaces the former settings of continued training."""

NAME_RULE = "must be letters, digits, '.', '_' or '-', at most 64, the first a letter or digit"


def message_of(error: ErrorDetails, owner: type[BaseModel] | None, key: str) -> str:
    """Returns one sentence: what was found, and what is allowed or was probably meant."""
    kind, context, found = error["type"], error.get("ctx", {}), _shown(error["input"])
    fields = owner.model_fields if owner else {}
    if kind == "extra_forbidden":
        if (name := OLD_NAMES.get(key)) in fields:
            return f"this setting was renamed to {BY if name == 'by' else name}"
        if "." in (name or ""):
            return (
                f"this setting is gone: a worker or learner is lost when its process is dead, "
                f"stopped or blocked, however long a call takes; {name} ends the calls of "
                "environments that take longer"
            )
        if key in MOVED:
            return f"this setting belongs to another type: {MOVED[key]}"
        hint = did_you_mean(key, fields)
        return f"unknown setting{hint or '; allowed here: ' + (', '.join(fields) or 'none')}"
    if kind == "missing":
        about = " ".join((fields[key].description or "").split()) if key in fields else ""
        return f"this setting is required{': ' + about if about else ''}"
    if kind == "union_tag_invalid":
        tags = re.findall(r"'([^']+)'", context["expected_tags"])
        hint = did_you_mean(context["tag"], tags) or f"; choose one of {', '.join(tags)}"
        return f"unknown type '{context['tag']}'{hint}"
    if kind == "union_tag_not_found":
        return "'type' is required: one of pretrain, finetune, adapt, evaluate"
    if kind == "literal_error":
        allowed = re.findall(r"'([^']+)'", context["expected"])
        hint = did_you_mean(str(error["input"]), allowed) or f"; allowed: {', '.join(allowed)}"
        return f"found {found}{hint}"
    if kind == "value_error":
        cause = context["error"]
        if isinstance(cause, ValidationError):
            return "; ".join(e["msg"] for e in cause.errors())
        return str(cause)
    if kind == "string_pattern_mismatch" and context["pattern"] == NAME_PATTERN.pattern:
        return f"{NAME_RULE}, found {found}"
    return f"{_expected(kind, error['msg'], context)}, found {found}"


def _expected(kind: str, message: str, context: dict[str, Any]) -> str:
    bounds = {
        "greater_than_equal": ("at least", "ge"),
        "greater_than": ("above", "gt"),
        "less_than_equal": ("at most", "le"),
        "less_than": ("below", "lt"),
    }
    types = {
        "int": "must be a whole number",
        "float": "must be a number",
        "bool": "must be true or false",
        "string": "must be a text (put it in quotes)",
        "tuple": "must be a list",
        "list": "must be a list",
        "dict": "must be a section of settings",
        "model": "must be a section of settings",
    }
    if kind in bounds:
        words, key = bounds[kind]
        return f"must be {words} {context[key]}"
    if kind == "finite_number":
        return "must be a finite number"
    if kind.endswith(("_type", "_parsing", "_from_float")) and kind.split("_")[0] in types:
        return types[kind.split("_")[0]]
    return message[0].lower() + message[1:]


def _shown(value: object) -> str:
    text = {True: "'true'", False: "'false'"}.get(value) if isinstance(value, bool) else None
    if value is None:
        return "nothing"
    text = text or ("a section" if isinstance(value, dict) else repr(value))
    return text if len(text) <= 60 else text[:57] + "..."
