"""What stores, records, runs, searches and files of cells hold, as dicts of JSON values (`inspect`).

Each looker takes (path, kind, layer, found) and adds to `found` what is not intact.
"""

import json
import tomllib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scarcade.engine.errors import CountsError, InputError, OpenError
from scarcade.engine.folder import MANIFEST, problems, read_manifest

if TYPE_CHECKING:
    from scarcade.dataloaders.store import Store

_JSON_LIMIT = 256 << 20


def _store(path: Path, kind: str, layer: str | None, found: list[str]) -> dict[str, Any]:
    from scarcade.dataloaders.store import open_store

    found += problems(path)
    if found:
        return {}
    return of_store(open_store(path))


def of_store(store: "Store") -> dict[str, Any]:
    """Of a store that is open already."""
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
    raw = read_json(path / f"{kind}.json")
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
            states[str(read_json(trial / "trial.json").get("state"))] += 1
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        OpenError: it is none, or is too large to be one of ours.
    """
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


LOOKERS = {"store": _store, "model": _record, "delta": _record, "run": _run, "h5ad": _cells, "zarr": _cells}
