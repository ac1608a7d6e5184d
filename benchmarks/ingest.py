"""From .h5ad files to a store, and its highly variable genes: cells per CPU-second and memory, beside scanpy.

    python -m benchmarks.ingest --data FOLDER [--cells 200000] [--genes 20000] [--files 4] [--rounds 3]

The files are made counts, gzipped as `write_h5ad(compression="gzip")` writes them. Ingesting is the whole command.
Highly variable genes (seurat_v3 by batch, 2,000 of them) are of the cells of the store, reading included: ours in one
pass, scanpy's `highly_variable_genes` on all of it in memory (its seurat_v3 refuses dask arrays in 1.11.5). Both must
choose the same genes, but for those at the edge. Every measurement is a process of its own, with all that it starts;
rounds are interleaved, and the median is taken. Bars: 12,000 cells per CPU-second at 20,000 genes in less than 1 GB.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scarcade.dataloaders.store import open_store
from scarcade.dataloaders.synthetic import simulate

RESULTS = Path(__file__).parent / "results" / "ingest.json"
KEPT = 2000

OURS = """
import sys, time, numpy as np
from scarcade.dataloaders.counts import Csr
from scarcade.dataloaders.genes import GeneHistograms, most_variable, normalised_variance
from scarcade.dataloaders.loader import LoaderConfig, stream
from scarcade.dataloaders.store import open_store
began = time.process_time()
store = open_store(sys.argv[1])
found = GeneHistograms(len(store.schema.batch), store.schema.n_genes)
loader = stream(store, "train", LoaderConfig(batch_size=4096, validation=0), seed=0, lanes=1, shuffle=False)
for batch in loader.epoch(0):
    found.add(Csr(*batch.counts.csr()), batch.batch.numpy())
variances = np.stack([normalised_variance([(found, k)]) for k in range(len(store.schema.batch))])
print("\\n".join(np.array(store.schema.genes)[most_variable(variances, int(sys.argv[2]))]))
print(time.process_time() - began)
"""
SCANPY = """
import sys, time, warnings
warnings.simplefilter("ignore")
import anndata as ad, scanpy as sc
began = time.process_time()
cells = ad.read_zarr(sys.argv[1])
cells.X = cells.X.astype("float32")
table = sc.pp.highly_variable_genes(
    cells, n_top_genes=int(sys.argv[2]), flavor="seurat_v3", batch_key="batch", inplace=False
)
table.index = cells.var_names
print("\\n".join(table.index[table["highly_variable"]]))
print(time.process_time() - began)
"""
WATCH = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"rc": done.returncode, "out": done.stdout, "wall_s": time.perf_counter() - began,
                  "cpu_s": used.ru_utime + used.ru_stime, "peak_mb": used.ru_maxrss / 1024}))
"""


def make(folder: Path, options: argparse.Namespace) -> tuple[Path, list[Path]]:
    """The store, and its cells in gzipped files."""
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / f"cells-{options.cells}-{options.genes}.zarr"
    if not store.exists():
        simulate(store, cells=options.cells, genes=options.genes, batches=options.files, library=2_200.0, seed=0)
    opened = open_store(store)
    files = [folder / f"{store.stem}-{name}.h5ad" for name in opened.schema.batch.values]
    for name, path in zip(opened.schema.batch.values, files, strict=True):
        if not path.exists():
            opened.to_anndata([name]).write_h5ad(path, compression="gzip")
    return store, files


def measured(command: list[str]) -> dict[str, Any]:
    """Seconds, CPU seconds and the largest process's memory of a command that must succeed, and what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", WATCH, *command], stdout=subprocess.PIPE, text=True, check=True, env=os.environ
    )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if found.pop("rc"):
        raise SystemExit(f"{command[:4]} failed")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder for the made cells")
    parser.add_argument("--cells", type=int, default=200_000)
    parser.add_argument("--genes", type=int, default=20_000)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    store, files = make(options.data, options)
    runs: dict[str, list[dict[str, Any]]] = {"ingest": [], "hvg_scarcade": [], "hvg_scanpy": []}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(dir=options.data) as work:
            given = [*map(str, files), "--out", f"{work}/atlas.zarr", "--batch-key", "batch", "--label-key", "label"]
            runs["ingest"].append(measured([sys.executable, "-m", "scarcade.jobs.cli", "ingest", *given]))
        for name, program in (("hvg_scarcade", OURS), ("hvg_scanpy", SCANPY)):
            runs[name].append(measured([sys.executable, "-c", program, str(store), str(KEPT)]))
    for name in [name for name in runs if name.startswith("hvg")]:
        for one in runs[name]:
            *genes, one["after_start_s"] = one.pop("out").split()
            one["genes"] = set(genes)
    row: dict[str, Any] = {"cells": options.cells, "genes": options.genes, "files": options.files}
    row |= {"rounds": options.rounds, "cores": os.cpu_count(), "same_genes": len(chosen[0] & chosen[1]) / KEPT}
    for name, many in runs.items():
        row[name] = {
            key: round(statistics.median(one[key] for one in many), 1) for key in ("wall_s", "cpu_s", "peak_mb")
        }
        row[name]["cells_per_cpu_s"] = round(options.cells / row[name]["cpu_s"])
    row["hvg_times"] = round(row["hvg_scanpy"]["cpu_s"] / row["hvg_scarcade"]["cpu_s"], 1)
    print("| | wall s | CPU s | cells per CPU-second | peak MB |\n|---|---|---|---|---|")
    for name in runs:
        one = row[name]
        print(f"| {name} | {one['wall_s']} | {one['cpu_s']} | {one['cells_per_cpu_s']:,} | {one['peak_mb']:,.0f} |")
    print(f"highly variable genes: {row['hvg_times']} times scanpy by CPU seconds, {row['same_genes']:.1%} the same")
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
