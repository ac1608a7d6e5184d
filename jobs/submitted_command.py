"""The command line that a job is to run: understood here, before anything is sent, and fit to run somewhere else.

Wrong options end here, not minutes later in a log. A path must mean the same on the cluster as it does to the user: a
URL, or an absolute path on storage that every node sees. Small files that steer a command (--config, --programs, a list
of genes) are read on the user's machine and travel with the job.
"""

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scarcade.engine.errors import UsageError
from scarcade.engine.storage import is_url, shown

PATHS = frozenset(
    {
        *("data", "out", "files", "queries", "model", "init_from", "update"),
        *("latent", "delta", "against", "path", "merge", "url"),
    }
)
"""Arguments of commands that say where something lies (but for `_NAMES`)."""
SENT = frozenset({"config", "programs", "genes"})
"""Arguments that name small files of the user's machine."""
_NAMES = {("train", "model"), ("tune", "model"), ("ingest", "union"), ("ingest", "intersection")}
_NOT_THERE = ("submit", "jobs")
_FOLDER = "sent"


@dataclass(frozen=True)
class JobCommand:
    """A command line as the cluster runs it."""

    argv: tuple[str, ...]
    out: str | None  # what it writes
    places: tuple[str, ...] = ()  # paths that must lie on shared storage
    sent: Mapping[str, Path] = field(default_factory=dict)  # files of this machine, by their names on the cluster

    @property
    def text(self) -> str:
        """For people and records: without keys in URLs."""
        return shlex.join(shown(token) if is_url(token) else token for token in self.argv)

    @property
    def secrets(self) -> bool:
        """Whether a URL carries a key that whoever sees the cluster's jobs could read."""
        return any(is_url(token) and shown(token) != token for token in self.argv)

    @property
    def ident(self) -> str:
        """An id of the run that this command begins or continues: of its kind and of what it writes."""
        target = (self.out or shlex.join(self.argv)).rstrip("/")
        name = re.sub(r"[^A-Za-z0-9]+", "-", shown(target).partition("?")[0].rsplit("/", 1)[-1]) if self.out else ""
        digest = hashlib.sha256(f"{self.argv[0]}\n{target}".encode()).hexdigest()[:8]
        return "-".join(part for part in (self.argv[0], name.strip("-")[:40], digest) if part)


def understood(argv: Sequence[str]) -> JobCommand:
    """Check `argv` as the command line itself would, and make it one for the cluster.

    Raises:
        UsageError, CycloptsError: it cannot be meant, or names what only this machine has.
    """
    from scarcade.jobs.cli import parsed

    if not argv:
        raise UsageError("submit: wants a command after --, as in `scarcade submit --address URL -- train --data ...`")
    name = argv[0]
    if name in _NOT_THERE:
        raise UsageError(f"submit -- {name}: runs here, not in a job")
    if {"--help", "-h", "--version"} & set(argv):
        raise UsageError(f"submit -- {name}: leave --help out; `scarcade {name} --help` shows it here")
    _, bound, config = parsed(list(argv))
    arguments = dict(bound.arguments)
    _refuse_address(arguments.get("sections"))
    places = []
    for key, value in arguments.items():
        if key in PATHS and (name, key) not in _NAMES:
            places += [_place(name, key, one) for one in _values(value)]
    sent: dict[str, Path] = {}
    tokens = list(argv)
    small = [
        one for key in sorted(SENT & arguments.keys()) for one in _values(arguments[key]) if not isinstance(one, int)
    ]
    for one in [*small, *_values(config)]:
        if (name, str(one)) not in _NAMES:
            _send(tokens, Path(one), sent)
    out = arguments.get("out")
    return JobCommand(tuple(tokens), None if out is None else str(out), tuple(p for p in places if not is_url(p)), sent)


def _values(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _place(command: str, key: str, value: Any) -> str:
    """A path as it is meant on the cluster.

    Raises:
        UsageError: it is relative to a folder that the cluster does not know.
    """
    text = str(value)
    if is_url(text) or Path(text).is_absolute():
        return text
    name = key.replace("_", "-")
    if re.match(r"[a-z0-9]+:/[^/]", text):  # a Path was made of a URL
        raise UsageError(
            f"submit -- {command}: {name} takes no URL; give an absolute path on storage that every node sees"
        )
    raise UsageError(
        f"submit -- {command}: {name} {text!r} would be looked for in a folder of the cluster's node; "
        "give a URL (s3://bucket/...) or an absolute path on storage that every node sees"
    )


def _refuse_address(sections: Any) -> None:
    tree = getattr(sections, "tree", {})
    if "address" in tree.get("scale", {}):
        raise UsageError("--scale.address: a job runs on the cluster that it is submitted to; leave it out")


def _send(tokens: list[str], path: Path, sent: dict[str, Path]) -> None:
    """Put a file of this machine among those that are sent; under another name if it lies outside of this folder.

    Raises:
        UsageError: its name stands in the TOML file, where it cannot be put right.
    """
    if path.is_absolute() and not path.exists():
        return  # on the cluster, perhaps; the command itself will say
    if not path.is_absolute() and ".." not in path.parts:
        sent[path.as_posix()] = path  # a job begins in a folder that holds what was sent with it
        return
    name, before = f"{_FOLDER}/{len(sent)}-{path.name}", list(tokens)
    for i, token in enumerate(before):
        option, mark, given = token.partition("=")
        if token == str(path):
            tokens[i] = name
        elif mark and given == str(path) and option.startswith("--"):
            tokens[i] = f"{option}={name}"
    if tokens == before:
        raise UsageError(f"{path}: is sent with the job; name it on the command line, or by a path below this folder")
    sent[name] = path
