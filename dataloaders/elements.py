"""The small elements of an AnnData folder (var, uns) and its consolidated metadata, written without anndata.

Anndata writes them just as well, and brings zarr and dask with it: more than a second of CPU time that every command
would pay which makes a folder. Each array is one chunk, compressed by zstd, as anndata has it; `anndata.read_zarr` and
zarr find the same values and the same metadata (tests/dataloaders/test_elements.py). What is large is written by
`array_writer`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numcodecs.vlen
import numpy as np
import pandas as pd
from numcodecs import zstd

from scarcade.dataloaders.array_layout import metadata

_ZSTD = {"name": "zstd", "configuration": {"level": 0, "checksum": False}}
_NUMBERS = "biuf"


def write_element(folder: Path, value: Any) -> None:
    """Write `value` as the element `folder`.

    Args:
        value: a number, a text, an array of either, a dict of elements by their names, or a table whose columns are
            arrays of such kinds (its index: text).

    Raises:
        TypeError: something else.
    """
    if isinstance(value, pd.DataFrame):
        _write_table(folder, value)
    elif isinstance(value, Mapping):
        write_group(folder, "dict", "0.1.0")
        for name, one in value.items():
            write_element(folder / name, one)
    elif isinstance(value, str):
        _write_array(folder, np.array(value, object), "string")
    elif isinstance(value, np.ndarray) and value.ndim:
        _write_array(folder, value, "array" if value.dtype.kind in _NUMBERS else "string-array")
    elif isinstance(value, bool | int | float | np.generic):
        _write_array(folder, np.asarray(value), "numeric-scalar")
    else:
        raise TypeError(f"{folder}: {value!r} is neither a number nor a text")


def write_group(folder: Path, kind: str, version: str, **attributes: Any) -> None:
    """``zarr.json`` of a group of AnnData's; the folder is made if it is not there."""
    folder.mkdir(exist_ok=True)
    meta = {
        "attributes": {"encoding-type": kind, "encoding-version": version, **attributes},
        "zarr_format": 3,
        "node_type": "group",
    }
    (folder / "zarr.json").write_text(json.dumps(meta, indent=1))


def consolidate(root: Path) -> None:
    """Put the metadata of all that lies in `root` into its own, so that readers need not list, nor open each."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("zarr.json")):
        if path.parent != root:
            meta = json.loads(path.read_bytes())
            if meta["node_type"] == "group":
                meta["consolidated_metadata"] = _inline({})
            found[path.parent.relative_to(root).as_posix()] = meta
    own = json.loads((root / "zarr.json").read_bytes())
    (root / "zarr.json").write_text(json.dumps({**own, "consolidated_metadata": _inline(found)}, indent=1))


def _inline(found: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "inline", "must_understand": False, "metadata": found}


def _write_table(folder: Path, table: pd.DataFrame) -> None:
    columns = [str(name) for name in table.columns]
    write_group(folder, "dataframe", "0.2.0", _index="_index", **{"column-order": columns})
    for name, values in (("_index", table.index), *zip(columns, (table[name] for name in table), strict=True)):
        write_element(folder / name, values.to_numpy())


def _write_array(folder: Path, values: np.ndarray, kind: str) -> None:
    """One chunk, also where all of it is what fills a chunk that is missing: a lost one is then told."""
    if values.dtype.kind in _NUMBERS:
        values = np.ascontiguousarray(values, values.dtype.newbyteorder("<")).reshape(values.shape)
        name, content = values.dtype.name, values.tobytes()
        codec: dict[str, Any] = {"name": "bytes"}
        if values.dtype.itemsize > 1:
            codec["configuration"] = {"endian": "little"}
    else:
        texts = values.astype(object).reshape(-1)
        wrong = [one for one in texts if not isinstance(one, str)]
        if wrong:
            raise TypeError(f"{folder}: {wrong[0]!r} is neither a number nor a text")
        name, content, codec = "string", numcodecs.vlen.VLenUTF8().encode(texts), {"name": "vlen-utf8"}
        codec["configuration"] = {}
    place = folder.joinpath("c", *("0" for _ in values.shape))
    place.parent.mkdir(parents=True)
    if values.size:
        place.write_bytes(zstd.compress(content, 0))
    attributes = {"encoding-type": kind, "encoding-version": "0.2.0"}
    chunk = tuple(max(1, n) for n in values.shape)
    (folder / "zarr.json").write_bytes(metadata(values.shape, name, chunk, [codec, _ZSTD], attributes))
