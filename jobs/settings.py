"""The fields of a job's sections on the command line and in a TOML file: ``--optim.lr 1e-3``, ``[optim] lr = 1e-3``.

A job's configuration is a tree of `Section`s. Here it is unrolled into dotted names with their types, defaults and
descriptions, so that --help lists every field, and a field that does not exist is told with the nearest that does.
"""

import difflib
import re
import textwrap
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from scarcade.engine.config import HIDDEN, Section
from scarcade.engine.errors import UsageError

_DOTTED = re.compile(r"--([A-Za-z][\w-]*(?:\.[\w-]+)+)(?:=(.*))?", re.DOTALL)
_BARE = {"true", "false"}


@dataclass(frozen=True)
class Setting:
    """One field: ``name`` is dotted, with dashes; ``kind`` is its annotation."""

    name: str
    kind: Any
    default: Any
    description: str
    hidden: bool = False  # nothing to be asked for in this command: it says why when it is

    @property
    def is_flag(self) -> bool:
        return bool in _alternatives(self.kind)

    def told(self) -> str:
        """Its values as --help shows them: ``float``, ``nb|zinb``."""
        return "|".join(_told(one) for one in _alternatives(self.kind) if one is not type(None))


Settings = Mapping[str, Setting]


def settings_of(sections: Mapping[str, type[Section]]) -> dict[str, Setting]:
    """Every field below ``{"optim": OptimConfig, ...}`` by its dotted name."""
    found: dict[str, Setting] = {}
    for prefix, section in sections.items():
        for field, info in section.model_fields.items():
            name = f"{prefix}.{field}".replace("_", "-")
            below = next((k for k in _alternatives(info.annotation) if _is_section(k)), None)
            if below is not None:
                found.update(settings_of({name: below}))
            else:
                hidden = info.json_schema_extra == HIDDEN
                found[name] = Setting(name, info.annotation, _default(info), info.description or "", hidden)
    return found


def split(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str | None]]]:
    """`argv` without its ``--a.b value`` pairs, and those pairs; the value of a bare ``--a.b`` is None."""
    rest: list[str] = []
    pairs: list[tuple[str, str | None]] = []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if token == "--":
            return [*rest, token, *tokens], pairs
        match = _DOTTED.fullmatch(token)
        if match is None:
            rest.append(token)
            continue
        value = match[2]
        if value is None and tokens and not tokens[0].startswith("--"):
            value = tokens.pop(0)
        pairs.append((match[1].replace("_", "-"), value))
    return rest, pairs


def overrides(pairs: Sequence[tuple[str, str | None]], known: Settings, command: str) -> dict[str, Any]:
    """``{"optim.lr": "1e-3"}`` with values that the section can check, from what `split` found.

    Raises:
        UsageError: a field that does not exist (with the nearest that does), twice the same, or without a value.
    """
    found: dict[str, Any] = {}
    for name, text in pairs:
        check_known(name, known, command)
        if name in found:
            raise UsageError(f"--{name}: given twice")
        if _table_of(name, known) is not None:
            found[name] = _guessed("true" if text is None else text)
            continue
        setting = known[name]
        if text is None:
            if not setting.is_flag:
                raise UsageError(f"--{name}: wants a value ({setting.told()})")
            text = "true"
        found[name] = _parsed(text, setting)
    return found


def check_known(name: str, known: Settings, command: str, source: str = "") -> None:
    """Refuse a dotted name that is no field.

    Raises:
        UsageError: with the nearest name there is, and what there is in that section.
    """
    if name in known or _table_of(name, known) is not None:
        return
    where = f"{source}: " if source else ""
    section, _, leaf = name.partition(".")
    fields = [other.partition(".")[2] for other in known if other.partition(".")[0] == section]
    if fields:
        near = [f"{section}.{field}" for field in difflib.get_close_matches(leaf, fields, n=1, cutoff=0.5)]
    else:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    hint = f"did you mean --{near[0]}?" if near else ""
    if not hint and fields:
        hint = f"[{section}] has {', '.join(fields)}"
    if not hint:
        sections = sorted({other.partition(".")[0] for other in known})
        hint = f"its sections are {', '.join(sections)}" if sections else f"`{command}` takes no sections"
    raise UsageError(f"{where}--{name}: `scarcade {command}` has no such setting; {hint}")


def _table_of(name: str, known: Settings) -> Setting | None:
    """The table of any fields (``dict[str, Any]``) in which `name` is one: what a model adds in surgery."""
    setting = known.get(name.rpartition(".")[0])
    return setting if setting is not None and get_args(setting.kind) == (str, Any) else None


def check_tables(tables: Mapping[str, Any], known: Settings, command: str, source: str) -> None:
    """As `check_known`, for every entry of the tables of a TOML file."""
    for name in _dotted(tables):
        check_known(name.replace("_", "-"), known, command, source)


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for key, value in tree.items():
        names.extend(_dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [f"{prefix}{key}"])
    return names


def help_text(known: Settings, width: int = 100) -> str:
    """Every field with its values, meaning and default; plain text, by sections."""
    lines: list[str] = []
    section = ""
    for setting in known.values():
        if setting.hidden:
            continue
        head = setting.name.rpartition(".")[0]
        if head != section:
            section = head
            lines += ["", f"[{section}]"]
        default = "" if setting.default is None else f" (default: {setting.default})"
        lines.append(f"  --{setting.name} {setting.told()}")
        indent = " " * 6
        text = f"{setting.description}{default}"
        lines += textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines)


def _parsed(text: str, setting: Setting) -> Any:
    """What pydantic cannot make of a string (lists, tables, none) is read as TOML; the rest it is given as text."""
    kinds = [get_origin(kind) or kind for kind in _alternatives(setting.kind)]
    if text.lower() == "none" and type(None) in kinds:
        return None
    if any(isinstance(kind, type) and issubclass(kind, list | tuple | dict | set) for kind in kinds):
        try:
            return tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            if str in kinds:
                return text
            return [part.strip() for part in text.split(",")]
    return text.lower() if text.lower() in _BARE and setting.is_flag else text


def _guessed(text: str) -> Any:
    """A value whose kind is not known: a number, a list or true as in TOML, else the text itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type; what stands inside of Annotated."""
    if get_origin(kind) in (Union, types.UnionType):
        return tuple(one for member in get_args(kind) for one in _alternatives(member))
    if hasattr(kind, "__metadata__"):
        return _alternatives(get_args(kind)[0])
    return (kind,)


def _told(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(str(value) for value in get_args(kind))
    return getattr(kind, "__name__", None) or str(kind) if get_origin(kind) is None else str(kind)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def _default(info: FieldInfo) -> Any:
    default = info.get_default(call_default_factory=True, validated_data={})
    return None if default is PydanticUndefined else default
