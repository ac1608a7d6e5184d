"""What is in a store, model, run, delta, .h5ad or .zarr, whether it is intact, and whether a query can be mapped.

Everything is looked at: every byte of what has a manifest, every value of what has none. Torch is not needed for
files of cells, so that looking at an .h5ad is quick.
"""

import json
import tomllib
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scarcade.engine.errors import CountsError, InputError, OpenError
from scarcade.engine.folder import MANIFEST, problems, read_manifest
from scarcade.engine.storage import is_url, shown

if TYPE_CHECKING:
    from scarcade.dataloaders.store import Store

_SHOWN = 20  # values of a column
_JSON_LIMIT = 256 << 20


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
    look = {"store": _store, "model": _record, "delta": _record, "run": _run, "h5ad": _cells, "zarr": _cells}[kind]
    try:
        out |= look(place, kind, layer, found)
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
            out |= _of_store(store)
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
    raise OpenError(f"{path}: is no store, model, run, delta, .h5ad or .zarr")


def _store(path: Path, kind: str, layer: str | None, found: list[str]) -> dict[str, Any]:
    from scarcade.dataloaders.store import open_store

    found += problems(path)
    if found:
        return {}
    return _of_store(open_store(path))


def _of_store(store: "Store") -> dict[str, Any]:
    schema = store.schema
    return {
        "n_cells": store.n_cells,
        "n_genes": store.n_genes,
        "stored_values": store.nnz,
        "seed": store.seed,
        "fingerprint": store.fingerprint,
        "genes": list(schema.genes[:5]),
        "batch_key": schema.batch.name,
        "batches": list(schema.batch.values),
        "labels": {one.name: list(one.values) for one in schema.labels},
        "categorical": {one.name: list(one.values) for one in schema.categorical},
        "continuous": list(schema.continuous),
        "proteins": list(schema.proteins),
        "sources": store.sources,
    }


def _record(path: Path, kind: str, layer: str | None, found: list[str]) -> dict[str, Any]:
    """A model or a delta, from its JSON: no weights are read but to compare their hashes."""
    from scarcade.jobs.latent import LATENT

    found += problems(path)
    raw = _json(path / f"{kind}.json")
    manifest = read_manifest(path)
    schema = raw.get("schema") or {}
    batch = (schema or raw).get("batch") or {}
    whole = {  # a delta has those of its reference
        "n_genes": len(schema.get("genes", ())),
        "labels": {str(one["name"]): list(one["values"]) for one in schema.get("labels", ())},
        "proteins": list(schema.get("proteins", ())),
        "latent": (path / LATENT).is_dir(),
    }
    out = {
        "model": raw.get("model"),
        "config": raw.get("config"),
        "batch_key": batch.get("name"),
        "batches": list(batch.get("values", ())),
        **(whole if kind == "model" else {}),
        "fingerprint": manifest.get("fingerprint"),
        "parent": raw.get("parent"),
        "lineage": raw.get("lineage") or None,
        "data_fingerprint": raw.get("data_fingerprint"),
        "training": raw.get("training"),
        "scarcade_version": raw.get("scarcade_version"),
        "bytes": sum(int(one["bytes"]) for one in manifest["files"].values()),
    }
    return {key: value for key, value in out.items() if value is not None}


def _run(path: Path, kind: str, layer: str | None, found: list[str]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    try:
        out["config"] = tomllib.loads((path / "config.toml").read_text())
    except (OSError, ValueError) as error:
        found.append(f"config.toml: {error}")
    if (path / "trials").is_dir():
        return out | _search(path, found)
    checkpoints = sorted((path / "checkpoints").glob("step-*")) if (path / "checkpoints").is_dir() else []
    valid = []
    for checkpoint in checkpoints:
        try:
            wrong = problems(checkpoint)
        except InputError as error:
            wrong = [str(error)]
        found += [f"{checkpoint.name}: {one}" for one in wrong]
        if not wrong:
            valid.append(checkpoint.name)
    out["checkpoints"] = valid
    last = _last_line(path / "metrics.jsonl")
    if last is not None:
        out["last_metrics"] = last
    out["finished"] = (path / "model" / MANIFEST).is_file()
    if out["finished"]:
        found += [f"model/{one}" for one in problems(path / "model")]
        out["model"] = str(path / "model")
    return out


def _search(path: Path, found: list[str]) -> dict[str, Any]:
    """The run of `scarcade tune`: how many trials are in which state, and the best configuration once there is one."""
    states: Counter[str] = Counter()
    for trial in sorted((path / "trials").iterdir()):
        try:
            states[str(_json(trial / "trial.json").get("state"))] += 1
        except OpenError as error:
            found.append(str(error))
    out: dict[str, Any] = {"trials": dict(states), "finished": (path / "best.toml").is_file()}
    if out["finished"]:
        out["best"] = str(path / "best.toml")
    return out


def _cells(path: Path, kind: str, layer: str | None, found: list[str]) -> dict[str, Any]:
    from scarcade.dataloaders.counts import Place
    from scarcade.dataloaders.gene_names import GeneNames, looks_like
    from scarcade.dataloaders.layers import choose_layer, looks
    from scarcade.dataloaders.matrix import blocks
    from scarcade.dataloaders.source import AnnDataFile

    if (path / MANIFEST).is_file():
        found += problems(path)
    with AnnDataFile(path) as file:
        obs = file.obs()
        out: dict[str, Any] = {"n_cells": len(obs)}
        if "uns/scarcade/mapping" in file.root:
            out["mapped"] = _provenance(file.element("uns/scarcade/mapping"))
        out["layers"] = looks(file)
        columns: dict[str, Any] = {}
        for name in obs.columns:
            column = obs[name]
            missing = int(column.isna().sum())
            text = f"{column.nunique()} values, such as {', '.join(map(str, column.dropna().unique()[:5]))}"
            columns[str(name)] = text + (f"; missing for {missing} cells" if missing else "")
        out["obs"] = columns
        out["obsm"] = sorted(map(str, file.root["obsm"])) if "obsm" in file.root else []
        try:
            chosen = choose_layer(file, layer)
        except CountsError as error:  # normalised values are no damage, but nothing can be done with them
            return out | {"counts_from": None, "note": str(error)}
        out["counts_from"] = chosen.name
        matrix = file.matrix(chosen.name)
        out["layout"] = matrix.layout
        genes = GeneNames.of(file.var(chosen.name), f"{file.where}: layer {chosen.name!r}")
        out["n_genes"] = len(genes.index)
        out["genes"] = list(genes.index[:5])
        out["genes_are"] = looks_like(genes.index)
        out["gene_columns"] = [name for name, _ in genes.columns]
        total, largest, stored = 0, 0, 0
        for _, block in blocks(matrix, Place(matrix.where, list(obs.index), genes.index)):
            stored += int((block.data > 0).sum())
            total += int(block.data.sum(dtype="uint64"))
            largest = max(largest, int(block.data.max(initial=0)))
        out |= {"stored_values": stored, "counts_per_cell": round(total / max(len(obs), 1), 1)}
        out["largest_count"] = largest
    return out


def _provenance(text: Any) -> dict[str, Any]:
    """What the result of a mapping says of itself."""
    raw = json.loads(str(text))
    return {name: raw.get(name) for name in ("reference", "model", "query", "batches", "genes_found", "genes_wanted")}


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
    record = _json(folder / "model.json")
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


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise OpenError(f"{path}: larger than {_JSON_LIMIT} bytes")
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise OpenError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(raw, dict):
        raise OpenError(f"{path}: is not a JSON object")
    return raw


def _last_line(path: Path) -> dict[str, Any] | None:
    """The last whole line of a file of JSON lines."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        for line in reversed(file.read().splitlines()):
            try:
                raw = json.loads(line)
            except ValueError:
                continue
            if isinstance(raw, dict):
                return raw
    return None
