"""Configuration: one TOML file and ``--section.field value`` overrides -> frozen, checked values, and back.

A configuration is a tree of `Section`s. Each section stands beside the code that reads it; a job's
configuration is the sum of its parts. Nothing is changed after it is resolved.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from scarcade.engine.errors import UsageError


class Section(BaseModel):
    """A frozen group of settings; an unknown field is an error, not a silent nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


S = TypeVar("S", bound=Section)


def nested(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``{"optim.lr": 1e-3}`` -> ``{"optim": {"lr": 1e-3}}``; dashes in names count as underscores."""
    tree: dict[str, Any] = {}
    for dotted, value in overrides.items():
        *parents, leaf = dotted.replace("-", "_").split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UsageError(f"--{dotted}: '{parent}' is a value and has no fields of its own")
        node[leaf] = value
    return tree


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on it, table by table."""
    out = dict(base)
    for key, value in over.items():
        below = out.get(key)
        out[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return out


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        UsageError: the file is not there, or is not TOML (with the line).
    """
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not valid TOML: {error}") from error


def checked(kind: type[S], raw: Mapping[str, Any], *, prefix: str = "") -> S:
    """`raw` as a configuration of type `kind`; `prefix` ("model.") goes before the names of fields in messages.

    Raises:
        UsageError: one line for each field that is unknown or has a value that it cannot have.
    """
    try:
        return kind.model_validate(dict(raw))
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False):
            where = prefix + ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                lines.append(f"--{where}: there is no such setting")
            else:
                lines.append(f"--{where}: {problem['msg']} (given: {problem['input']!r})")
        raise UsageError("; ".join(lines)) from error


def to_toml(config: BaseModel) -> str:
    """The resolved configuration as TOML (fields that are None are left out: TOML has no null)."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
