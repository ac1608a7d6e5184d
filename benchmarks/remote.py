"""Cells per second of the loader from an S3 server on the loopback, first epoch and second, beside the disk.

    python -m benchmarks.remote --data FOLDER [--cells 200000]

The server is moto's, in a process of its own on the same processors: it is written for tests, and serves a hundred or
two of megabytes in a second. So the first epoch tells that server's speed as much as ours; what can be learnt here is
that the second epoch is as fast as the disk's, and how much slower reading by ranges is than keeping shards.
Needs the extra ``dev`` (moto).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

import torch

from scarcade.dataloaders.loader import LoaderConfig, stream
from scarcade.dataloaders.store import Store, open_store
from scarcade.dataloaders.synthetic import simulate
from scarcade.engine.storage import Mirror

RESULTS = Path(__file__).parent / "results" / "remote.json"
SERVER = """
import logging, time
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(port=0, verbose=False)
server.start()
print(*server.get_host_and_port(), flush=True)
time.sleep(1e6)
"""


def epochs(store: Store, batch: int) -> list[dict[str, float]]:
    """Two epochs of dense batches, consumed as fast as they come."""
    loader = stream(store, "all", LoaderConfig(batch_size=batch, validation=0), seed=0)
    found = []
    for epoch in range(2):
        wall, cpu = time.perf_counter(), time.process_time()
        for one in loader.epoch(epoch):
            one.counts.dense(torch.device("cpu"))
        seconds, busy = time.perf_counter() - wall, time.process_time() - cpu
        found.append({"cells_per_s": round(store.n_cells / seconds), "cells_per_cpu_s": round(store.n_cells / busy)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder for the made store")
    parser.add_argument("--cells", type=int, default=200_000)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--batch", type=int, default=1024)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.data.mkdir(parents=True, exist_ok=True)
    local = given.data / f"remote-{given.cells}-{given.genes}.zarr"
    if not local.exists():
        simulate(local, cells=given.cells, genes=given.genes, seed=0)
    n_bytes = sum(path.stat().st_size for path in local.rglob("*") if path.is_file())
    os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        _, port = server.stdout.readline().split()
        address = f"http://127.0.0.1:{port}"
        query = f"?endpoint_override={quote(address, safe='')}&region=us-east-1"
        Mirror(f"s3://bucket{query}&allow_bucket_creation=true").filesystem.create_dir("bucket")
        Mirror(f"s3://bucket/bench{query}").push(local, "a.zarr")
        url = f"s3://bucket/bench/a.zarr{query}"
        results: dict[str, list[dict[str, float]]] = {"disk": epochs(open_store(local), given.batch)}
        with tempfile.TemporaryDirectory() as cache:
            results["s3, shards kept"] = epochs(open_store(url, (cache, 10.0)), given.batch)
        results["s3, by ranges"] = epochs(open_store(url, (None, 0.0)), given.batch)
    finally:
        server.kill()
        server.wait()
    print(f"{given.cells:,} cells x {given.genes:,} genes, {n_bytes / 1e6:.0f} MB, batches of {given.batch}")
    print(f"{'':20}{'first epoch':>16}{'second epoch':>16}   thousand cells per second (per CPU-second)")
    for name, (first, second) in results.items():
        told = [f"{one['cells_per_s'] / 1e3:.0f} ({one['cells_per_cpu_s'] / 1e3:.0f})" for one in (first, second)]
        print(f"{name:20}{told[0]:>16}{told[1]:>16}")
    RESULTS.parent.mkdir(exist_ok=True)
    about = {"cells": given.cells, "genes": given.genes, "bytes": n_bytes, "batch": given.batch, "epochs": results}
    RESULTS.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
