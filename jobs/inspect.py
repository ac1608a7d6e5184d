"""What is in a store, model, run, delta, .h5ad or .zarr, whether it is intact, and whether a query can be mapped.

Everything is looked at: every byte of what has a manifest, every value of what has none. Torch is not needed for
files of cells, so that looking at an .h5ad is quick.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scarcade.engine.errors import InputError, OpenError
from scarcade.engine.folder import MANIFEST, read_manifest
from scarcade.engine.storage import is_url, shown
from scarcade.jobs.contents import LOOKERS, of_store, read_json

_SHOWN = 20  # values of a column


def inspect(
    path: str | Path,
    against: str | Path | None = None,
    *,
    batch_key: str | None = None,
    label_keys: Sequence[str] | None = None,
    layer: str | None = None,
) -> dict[str, Any]:
    """What is at `path` as a dict of JSON values, with "kind" (store, run, model, delta, h5ad, zarr) and "intact".

    With `against` (the folder of a model or a run) also "mappable" and "reasons" why it is not. "problems" says what
    is not intact.

    Raises:
        OpenError: there is nothing at `path`, or none of the kinds. UsageError, InputError: `against` is no model.
    """
    if is_url(path):
        return _at_url(str(path), against, batch_key, label_keys, layer)
    place = Path(path)
    kind = _kind(place)
    out: dict[str, Any] = {"path": str(path), "kind": kind}
    found: list[str] = []
    try:
        out |= LOOKERS[kind](place, kind, layer, found)
    except InputError as error:
        found.append(f"{error.code}: {error}")
    out |= {"intact": not found, "problems": found}
    if not found and kind in ("h5ad", "zarr"):
        _check_columns(place, batch_key, label_keys)
    if against is not None:
        out |= _against(place, Path(against), batch_key, label_keys, layer)
    return out


def _check_columns(place: Path, batch_key: str | None, label_keys: Sequence[str] | None) -> None:
    """Refuse columns that a file of cells does not have.

    Raises:
        CategoryError: naming the option.
    """
    asked = [("--batch-key", one) for one in (batch_key,) if one] + [("--label-key", one) for one in label_keys or ()]
    if asked:
        from scarcade.dataloaders.schema import column_of
        from scarcade.dataloaders.source import opened

        with opened(place) as file:
            obs = file.obs()
        for option, name in asked:
            column_of(obs, name, str(place), option)


def _at_url(
    url: str,
    against: str | Path | None,
    batch_key: str | None,
    label_keys: Sequence[str] | None,
    layer: str | None,
) -> dict[str, Any]:
    """A store is read where it lies; anything else is copied here for a while."""
    from scarcade.dataloaders.store import is_store, open_store
    from scarcade.jobs.fetched import near

    if against is None and is_store(url):
        out: dict[str, Any] = {"path": shown(url), "kind": "store"}
        found: list[str] = []
        try:
            store = open_store(url)
            found += store.verify()
            out |= of_store(store)
        except InputError as error:
            found.append(f"{error.code}: {error}")
        return out | {"intact": not found, "problems": found}
    with near(url) as here:
        told = inspect(here, against, batch_key=batch_key, label_keys=label_keys, layer=layer)
    return {**told, "path": shown(url)}


def render(info: dict[str, Any]) -> str:
    """The same for people: one line for each thing that is known."""
    lines = [f"{info['path']}: {info['kind']}, {'intact' if info['intact'] else 'NOT INTACT'}"]
    lines += [f"  problem: {problem}" for problem in info["problems"]]
    for key, value in info.items():
        if key in {"path", "kind", "intact", "problems", "reasons", "mappable", "warnings"}:
            continue
        if key == "training" and isinstance(value, dict):
            value = {name: one for name, one in value.items() if name != "config"}  # the model's stands above
        lines += _lines(key.replace("_", " "), value, "  ")
    if "mappable" in info:
        lines.append(f"  can be mapped: {'yes' if info['mappable'] else 'no'}")
        lines += [f"    because: {reason}" for reason in info["reasons"]]
        lines += [f"    note: {note}" for note in info["warnings"]]
    return "\n".join(lines)


def _lines(name: str, value: Any, indent: str) -> list[str]:
    if isinstance(value, dict) and len(value) > 5 and all(isinstance(one, str) for one in value.values()):
        value = list(value)  # names are enough: a program's genes fill a screen
    if isinstance(value, dict):
        return [f"{indent}{name}:", *(line for k, v in value.items() for line in _lines(str(k), v, indent + "  "))]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        rows = [", ".join(f"{k} {v}" for k, v in one.items() if not isinstance(v, dict | list)) for one in value]
        return [f"{indent}{name}:", *(f"{indent}  {row}" for row in rows)]
    if isinstance(value, list):
        more = f", ... ({len(value)} in all)" if len(value) > _SHOWN else ""
        return [f"{indent}{name}: {', '.join(map(str, value[:_SHOWN]))}{more}"]
    if isinstance(value, int) and not isinstance(value, bool):
        return [f"{indent}{name}: {value:,}"]
    return [f"{indent}{name}: {value}"]


def _kind(path: Path) -> str:
    if path.is_file():
        return "h5ad"
    if not path.is_dir():
        raise OpenError(f"{path}: there is no such file or folder")
    if (path / "uns" / "scarcade").is_dir():
        return "zarr" if (path / "uns" / "scarcade" / "mapping").exists() else "store"  # or the result of a mapping
    for name, kind in (
        *(("model.json", "model"), ("delta.json", "delta"), ("config.toml", "run"), ("checkpoints", "run")),
        *(("zarr.json", "zarr"), (".zgroup", "zarr")),
    ):
        if (path / name).exists():
            return kind
    if (path / MANIFEST).is_file():
        declared = str(read_manifest(path).get("kind"))
        if declared in {"store", "model", "delta"}:
            return declared
        if declared == "export":
            raise OpenError(f"{path}: is a model in the files of another tool; `scarcade import` reads it")
    raise OpenError(f"{path}: is no store, model, run, delta, .h5ad or .zarr")


def _against(
    path: Path, model: Path, batch_key: str | None, label_keys: Sequence[str] | None, layer: str | None
) -> dict[str, Any]:
    """Whether the cells at `path` can be mapped onto the model, read as `map` would read them."""
    from scarcade.dataloaders.query_counts import seen
    from scarcade.dataloaders.schema import read_query
    from scarcade.engine.schema import Schema
    from scarcade.models import MODELS

    folder = model if (model / "model.json").is_file() else model / "model"
    if not (folder / "model.json").is_file():
        raise OpenError(f"--against {model}: is no model (it has no model.json)")
    record = read_json(folder / "model.json")
    schema = Schema.from_dict(record.get("schema") or {})
    if record.get("model") in MODELS and not MODELS[record["model"]].sees_proteins:
        schema = replace(schema, proteins=())
    out: dict[str, Any] = {"against": str(model), "genes_wanted": schema.n_genes, "reasons": [], "warnings": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are in the query, too
        try:
            query = read_query(path, schema, batch_key=batch_key, label_keys=label_keys, layer=layer, keep=seen)
        except InputError as error:
            return out | {"mappable": False, "reasons": [f"{error.code}: {error}"]}
    known = set(schema.batch.values)
    batches = sorted(set(map(str, query.batch)))
    return out | {
        "mappable": True,
        "genes_found": query.alignment.found,
        "matched": query.alignment.how,
        "query_batches": batches,
        "new_batches": [one for one in batches if one not in known],
        "warnings": list(query.warnings),
    }
