"""Configuration: one TOML file and ``--section.field value`` overrides -> frozen, checked values, and back.

A configuration is a tree of `Section`s. Each section stands beside the code that reads it; a job's
configuration is the sum of its parts. Nothing is changed after it is resolved.
"""

from collections.abc import Mapping
from typing import Any, TypeVar, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from scarcade.engine.errors import UsageError
from scarcade.engine.tables import merged, nested, read_toml

__all__ = ["HIDDEN", "Section", "checked", "merged", "nested", "read_toml", "to_toml"]

HIDDEN: dict[str, Any] = {"hidden": True}
"""As ``json_schema_extra`` of a field: --help does not show it, because its command can do nothing with it."""


class Section(BaseModel):
    """A frozen group of settings; an unknown field is an error, not a silent nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


S = TypeVar("S", bound=Section)


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
            where = prefix.replace("_", "-") + _named(kind, problem["loc"])
            if problem["type"] == "extra_forbidden":
                lines.append(f"--{where}: there is no such setting")
            else:
                lines.append(f"--{where}: {problem['msg']} (given: {problem['input']!r})")
        raise UsageError("; ".join(lines)) from error


def _named(kind: Any, place: tuple[int | str, ...]) -> str:
    """A field as it is written on the command line; of a list, which is one option, the value tells the place."""
    parts: list[str] = []
    for part in place:
        if not isinstance(part, str):
            continue
        fields = getattr(kind, "model_fields", None)
        parts.append(part if fields is None else part.replace("_", "-"))  # else it is a key of the user's own
        inside = fields[part].annotation if fields and part in fields else None
        kind = next((one for one in (inside, *get_args(inside)) if hasattr(one, "model_fields")), None)
    return ".".join(parts)


def to_toml(config: BaseModel) -> str:
    """The resolved configuration as TOML (fields that are None are left out: TOML has no null)."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))
