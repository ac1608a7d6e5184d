"""Peak memory and time of mapping few and many cells x 2,000 genes onto a reference, and of label transfer.

    python -m benchmarks.large_query --data FOLDER [--cells 20000 400000] [--ways default store] [--neighbours 1000000]

Each query is made out of core, written as .h5ad by blocks, and mapped in a process of its own; what is printed is that
process's largest resident set. The bar: many cells take no more than few, within 15 %, but for their obs. With
--neighbours the search for 50 neighbours of 2,000 cells among so many is timed, beside scikit-learn's brute force,
and how long a reference of so many cells takes to read.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from benchmarks import environment
from scarcade.dataloaders.store import Store, open_store
from scarcade.jobs.query_settings import QueryData

RESULTS = Path(__file__).parent / "results" / "large_query.json"
GENES, LATENT, K = 2000, 10, 50
WAYS = ("default", "streamed", "store")  # by the limit of the default; however few; from a store of ours
_ROWS = 1 << 14

REFERENCE = """
import sys
import scarcade as sca
sca.simulate(sys.argv[1] + ".zarr", cells=10_000, genes=2000, seed=0)
sca.train(sys.argv[1] + ".zarr", out=sys.argv[1] + ".run", recipe="scarches", epochs=3, threads=2)
"""
SIMULATE = """
import sys
import scarcade as sca
sca.simulate(sys.argv[1], cells=int(sys.argv[2]), genes=2000, seed=1)
"""
MAP = """
import json, resource, sys, time
import scarcade as sca
began = time.monotonic()
result = sca.map_queries(
    sys.argv[1], {"query": sys.argv[2]}, sys.argv[3], epochs=int(sys.argv[4]), threads=2,
    data={"batch_size": 1024, "stream_above": int(sys.argv[5])},
)
(record,) = result.queries
assert record["state"] == "done", record["reason"]
assert record["history"], "it was not trained"
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"mb": round(peak), "seconds": round(time.monotonic() - began, 1)}))
"""


def run(program: str, *arguments: str) -> str:
    """The last line that a process which runs `program` prints."""
    command = [sys.executable, "-W", "ignore", "-c", program, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment(OMP_NUM_THREADS=2))
    return (done.stdout.strip().splitlines() or [""])[-1]


def write_h5ad(store: Store, path: Path) -> None:
    """The cells of a store as .h5ad with batches of their own, block by block."""
    import anndata as ad

    with h5py.File(path, "w") as file:
        file.attrs["encoding-type"], file.attrs["encoding-version"] = "anndata", "0.1.0"
        obs = store.obs()
        obs["batch"] = "new " + obs["batch"].astype(str)
        ad.io.write_elem(file, "obs", obs.astype({"batch": "category"}))
        ad.io.write_elem(file, "var", store.var())
        matrix = file.create_group("X")
        matrix.attrs["encoding-type"], matrix.attrs["encoding-version"] = "csr_matrix", "0.1.0"
        matrix.attrs["shape"] = (store.n_cells, store.n_genes)
        chunks = {"chunks": (1 << 16,), "compression": "lzf"}
        indices = matrix.create_dataset("indices", (store.nnz,), np.int32, **chunks)
        data = matrix.create_dataset("data", (store.nnz,), np.float32, **chunks)
        pointers = np.zeros(store.n_cells + 1, np.int64)
        for start in range(0, store.n_cells, _ROWS):
            stop = min(start + _ROWS, store.n_cells)
            indptr, columns, values = store.read(start, stop)
            at = pointers[start]
            pointers[start + 1 : stop + 1] = at + indptr[1:]
            indices[at : at + len(columns)], data[at : at + len(columns)] = columns, values
        matrix.create_dataset("indptr", data=pointers)


def mapped(folder: Path, cells: int, epochs: int, ways: Sequence[str]) -> dict[str, Any]:
    """Peak and time of mapping `cells` cells in some of `WAYS`."""
    store, query = folder / f"query-{cells}.zarr", folder / f"query-{cells}.h5ad"
    if not store.exists():
        run(SIMULATE, str(store), str(cells))
    opened = open_store(store)
    if not query.exists():
        write_h5ad(opened, query)
    row: dict[str, Any] = {"cells": cells, "counts_per_cell": round(opened.nnz / cells)}
    row["held_in_memory_would_take_mb"] = round(8 * opened.nnz / 2**20)
    row["obs_mb"] = round(opened.obs().memory_usage(deep=True).sum() / 2**20)
    reference = str(folder / "reference.run" / "model")
    known = {"default": (query, QueryData().stream_above), "streamed": (query, 0), "store": (store, 0)}
    for name in ways:
        path, limit = known[name]
        with tempfile.TemporaryDirectory(dir=folder) as out:
            found = json.loads(run(MAP, reference, str(path), out, str(epochs), str(limit)))
        row |= {f"{name}_{key}": value for key, value in found.items()}
    return row


def neighbours(n: int) -> dict[str, Any]:
    """Seconds of the search for neighbours among `n` made cells, ours and scikit-learn's; of a reference of them."""
    import torch
    from sklearn.neighbors import NearestNeighbors

    from scarcade.engine.neighbours import Neighbours
    from scarcade.engine.schema import Categories
    from scarcade.jobs.label_transfer import LabelTransfer
    from scarcade.jobs.latent import latent_arrays, latent_writer, read_latent

    torch.set_num_threads(2)
    rng = np.random.default_rng(0)
    centres = 3 * rng.normal(size=(30, LATENT))
    labels = rng.integers(0, 30, n)
    latent = (centres[labels] + rng.normal(size=(n, LATENT))).astype(np.float32)
    query = (centres[rng.integers(0, 30, 2000)] + rng.normal(size=(2000, LATENT))).astype(np.float32)
    column = Categories("label", tuple(f"type {i}" for i in range(30)))
    row: dict[str, Any] = {"reference_cells": n, "query_cells": len(query), "dimensions": LATENT, "k": K}
    Neighbours(latent[:1000]).of(query[:10], K)  # compiled
    with tempfile.TemporaryDirectory() as folder:
        with latent_writer(Path(folder) / "latent.zarr", obsm_key="X", columns=[column], about={}) as writer:
            writer.append(latent_arrays("X", latent, latent), [labels])
        row["read_latent_s"] = _timed(lambda: read_latent(Path(folder) / "latent.zarr"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row["label_transfer_ready_s"] = _timed(lambda: LabelTransfer(latent, [(column, labels)], K))
    transfer = LabelTransfer(latent, [(column, labels)], K)
    row["labels_and_distance_s"] = _timed(lambda: transfer.of(query))
    row["grew_mb"] = round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
    ours = Neighbours(latent)
    theirs = NearestNeighbors(algorithm="brute").fit(latent)
    row["search_s"] = _timed(lambda: ours.of(query, K))
    row["scikit_learn_s"] = _timed(lambda: theirs.kneighbors(query, K))
    return row


def _timed(work: Any) -> float:
    began = time.monotonic()
    work()
    return round(time.monotonic() - began, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder for the made data; kept for the next run")
    parser.add_argument("--cells", type=int, nargs="+", default=[20_000, 400_000])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["default"])
    parser.add_argument("--neighbours", type=int, help="cells of a reference to search; nothing else is measured")
    given = parser.parse_args()
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if given.neighbours:
        found["neighbours"] = neighbours(given.neighbours)
        print("   ".join(f"{name} {value:,}" for name, value in found["neighbours"].items()))
    else:
        if given.data is None:
            parser.error("--data FOLDER is needed")
        given.data.mkdir(parents=True, exist_ok=True)
        if not (given.data / "reference.run" / "model").is_dir():
            run(REFERENCE, str(given.data / "reference"))
        rows = []
        for cells in given.cells:
            rows.append(mapped(given.data, cells, given.epochs, given.ways))
            print("   ".join(f"{name} {value:,}" for name, value in rows[-1].items()), flush=True)
        way = f"{given.ways[0]}_mb"
        growth = rows[-1][way] / rows[0][way] - 1
        print(f"{growth:+.1%} from {rows[0]['cells']:,} to {rows[-1]['cells']:,} cells")
        found |= {"genes": GENES, "epochs": given.epochs, "batch_size": 1024, "rows": rows, "growth": round(growth, 3)}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
