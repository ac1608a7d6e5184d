"""A table of queries (.csv or .tsv): a row for each, with options of its own where they differ from the command's.

Columns are path (which must be there), name, batch_key, label_key (several with ; between) and layer, in any order.
"Batch Key" and "batch-key" are batch_key. An empty cell means the option of the command; a relative path starts at
the table's folder. A row whose file is not there is not an error of the table: that query fails, and says why.
"""

import csv
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scarcade.engine.errors import OpenError, UsageError
from scarcade.engine.storage import is_url

ENDINGS = {".csv": ",", ".tsv": "\t"}
COLUMNS = ("path", "name", "batch_key", "label_key", "layer")
_LIMIT = 64 << 20  # bytes


@dataclass(frozen=True)
class Row:
    """One line; None where its cell is empty."""

    line: int
    path: str  # absolute, or a URL
    name: str | None
    batch_key: str | None
    label_keys: tuple[str, ...] | None
    layer: str | None


def is_manifest(given: object) -> bool:
    """Whether `given` is the path of a table, by its ending."""
    return isinstance(given, str | Path) and not is_url(given) and Path(given).suffix.lower() in ENDINGS


def rows_of(path: str | Path) -> list[Row]:
    """The rows of the table at `path`, in its order; empty lines are left out.

    Raises:
        OpenError: it is not there or is not text. UsageError: a column or row that cannot be meant.
    """
    path = Path(path)
    lines = csv.reader(_text(path).splitlines(), delimiter=ENDINGS[path.suffix.lower()], strict=True)
    try:
        head, *rest = [(lines.line_num, [cell.strip() for cell in line]) for line in lines if any(map(str.strip, line))]
    except csv.Error as error:
        raise UsageError(f"{path}, line {lines.line_num}: is not CSV ({error})") from error
    except ValueError:
        raise UsageError(f"{path}: is empty; wanted a line with {', '.join(COLUMNS)}, and one for each query") from None
    columns = _columns(path, head[1])
    rows = [_row(path, line, columns, cells) for line, cells in rest]
    _distinct(path, rows)
    return rows


def _text(path: Path) -> str:
    try:
        if not path.is_file():
            raise OpenError(f"{path}: there is no such file")
        if path.stat().st_size > _LIMIT:
            raise OpenError(f"{path}: larger than {_LIMIT} bytes; a table of queries has a line for each")
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise OpenError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise OpenError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _columns(path: Path, head: Sequence[str]) -> list[str]:
    columns = ["_".join(name.lower().replace("-", " ").replace("_", " ").split()) for name in head]
    for given, name in zip(head, columns, strict=True):
        if name not in COLUMNS:
            near = difflib.get_close_matches(name, COLUMNS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            if len(head) == 1:
                hint = f"; the cells of a {path.suffix} stand between {ENDINGS[path.suffix.lower()]!r}"
            raise UsageError(f"{path}: has a column {given!r}; wanted are {', '.join(COLUMNS)}{hint}")
        if columns.count(name) > 1:
            raise UsageError(f"{path}: has the column {name} twice")
    if "path" not in columns:
        raise UsageError(f"{path}: has no column path; its first line names {', '.join(head)}")
    return columns


def _row(path: Path, line: int, columns: Sequence[str], cells: Sequence[str]) -> Row:
    if len(cells) > len(columns):
        raise UsageError(f"{path}, line {line}: has {len(cells)} cells, the first line {len(columns)}")
    given = dict(zip(columns, cells, strict=False))
    if not given.get("path"):
        raise UsageError(f"{path}, line {line}: has no path")
    place = given["path"] if is_url(given["path"]) else str(path.parent / Path(given["path"]).expanduser())
    labels = tuple(label for part in given.get("label_key", "").split(";") if (label := part.strip()))
    name, batch_key, layer = (given.get(column) or None for column in ("name", "batch_key", "layer"))
    return Row(line, place, name, batch_key, labels or None, layer)


def _distinct(path: Path, rows: Sequence[Row]) -> None:
    """Names become files, on some file systems without regard to case."""
    seen: dict[str, int] = {}
    for row in rows:
        if row.name is not None:
            other = seen.setdefault(row.name.casefold(), row.line)
            if other != row.line:
                raise UsageError(f"{path}: lines {other} and {row.line} have the same name {row.name!r}")
