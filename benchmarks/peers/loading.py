"""One loader over one data set, in a process of its own, in whichever environment has it: prints one JSON line.

    PYTHON benchmarks/peers/loading.py CONTENDER DATA --batch 1024 [--csr] [--cells N]

Imports nothing of ours unless the contender is ours, so that it runs in the environments of the others.
What is counted is the processor time of this process (all its threads) over whole epochs after a warm-up, or,
for the slow ones, over the first N cells.
"""

import argparse
import json
import os
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

Batches = Callable[[int], Iterator[Any]]  # epoch -> batches


def scarcade(data: str, batch: int, csr: bool) -> tuple[Batches, Callable[[Any], int]]:
    import torch

    from scarcade.dataloaders.loader import LoaderConfig, stream
    from scarcade.dataloaders.store import open_store

    loader = stream(open_store(data), "all", LoaderConfig(batch_size=batch), seed=0)
    cpu = torch.device("cpu")
    if csr:
        return loader.epoch, lambda one: len(one.counts.csr()[0]) - 1
    return loader.epoch, lambda one: len(one.counts.dense(cpu))


def scarcade_memory(data: str, batch: int, csr: bool) -> tuple[Batches, Callable[[Any], int]]:
    import anndata as ad
    import torch

    from scarcade.dataloaders.loader import Columns, LoaderConfig, in_memory
    from scarcade.engine.schema import Categories, Schema

    adata = ad.read_h5ad(data)
    batches = adata.obs["batch"].cat
    schema = Schema(tuple(adata.var_names), Categories("batch", tuple(batches.categories)))
    loader = in_memory(adata.X, Columns(batches.codes.to_numpy()), schema, LoaderConfig(batch_size=batch), seed=0)
    cpu = torch.device("cpu")
    if csr:
        return loader.epoch, lambda one: len(one.counts.csr()[0]) - 1
    return loader.epoch, lambda one: len(one.counts.dense(cpu))


def annbatch(data: str, batch: int, csr: bool, **options: Any) -> tuple[Batches, Callable[[Any], int]]:
    import anndata as ad
    import zarr
    import zarrs  # noqa: F401 - its pipeline
    from annbatch import Loader

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    group = zarr.open_group(data, mode="r")
    obs = ad.io.read_elem(group["obs"])[["batch", "label"]]
    loader = Loader(shuffle=True, batch_size=batch, preload_to_gpu=False, **options)
    loader.add_dataset(ad.io.sparse_dataset(group["X"]), obs)
    return lambda epoch: iter(loader), _densified(csr, lambda one: one["X"])


def annbatch_tuned(data: str, batch: int, csr: bool) -> tuple[Batches, Callable[[Any], int]]:
    return annbatch(data, batch, csr, chunk_size=1024, preload_nchunks=32)


def scdataset(data: str, batch: int, csr: bool) -> tuple[Batches, Callable[[Any], int]]:
    import anndata as ad
    from scdataset import BlockShuffling, scDataset

    loader = scDataset(
        ad.read_h5ad(data, backed="r"),
        BlockShuffling(block_size=512),
        batch_size=batch,
        fetch_factor=max(1, 16384 // batch),
        fetch_callback=lambda adata, rows: adata.X[rows],
    )
    return lambda epoch: iter(loader), _densified(csr, lambda one: one)


def scvi_tools(data: str, batch: int, csr: bool) -> tuple[Batches, Callable[[Any], int]]:
    import anndata as ad
    import scvi

    adata = ad.read_h5ad(data)
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch", labels_key="label")
    manager = scvi.model.SCVI(adata).adata_manager
    loader = scvi.dataloaders.AnnDataLoader(manager, batch_size=batch, shuffle=True)
    return lambda epoch: iter(loader), lambda one: len(one["X"])


def _densified(csr: bool, matrix: Callable[[Any], Any]) -> Callable[[Any], int]:
    """scipy's densifying into a reused buffer: the best that is open to their users on a CPU."""
    buffer: list[np.ndarray] = []

    def use(one: Any) -> int:
        x = matrix(one)
        if csr:
            return int(x.shape[0])
        x = x.astype(np.float32, copy=False)
        if not buffer or buffer[0].shape != x.shape:
            buffer[:] = [np.empty(x.shape, np.float32)]
        buffer[0][:] = 0
        x.toarray(out=buffer[0])
        return int(x.shape[0])

    return use


def ceiling(data: str, batch: int, csr: bool) -> dict[str, float]:
    """Cells per CPU-second of reading and decoding alone, of densifying alone, and of both in turn."""
    import torch
    from numba import njit

    from scarcade.dataloaders import unpacking
    from scarcade.dataloaders.array_layout import CHUNKS_PER_SHARD
    from scarcade.dataloaders.packed import DenseRing, PackedCounts
    from scarcade.dataloaders.sources import StoreSource
    from scarcade.dataloaders.store import open_store

    del csr
    store = open_store(data)
    n, step, per_run = store.n_cells, store.x_indices.chunk_rows, 8
    out = np.empty(step * per_run, store.x_indices.dtype), np.empty(step * per_run, store.x_data.dtype)
    functions = unpacking.functions()
    assert functions is not None
    code = unpacking.decode

    @njit(nogil=True)
    def unchecked(address, packed, lengths, buffer, size):  # type: ignore[no-untyped-def]
        at = 0
        for k in range(len(lengths)):
            to = buffer.ctypes.data + k * size * buffer.itemsize
            code(
                np.uintp(address),
                np.uintp(packed.ctypes.data + at),
                np.uintp(to),
                np.uintp(size * buffer.itemsize),
                np.int32(1),
            )
            at += lengths[k]

    room = np.empty(per_run * max(store.x_indices.largest, store.x_data.largest), np.uint8)

    def packed(array: Any, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        shard = first // CHUNKS_PER_SHARD  # a run lies in one: they begin at multiples of it
        at, lengths = array.table((shard,))[:, first:last]
        file = array.handle(shard)
        try:
            os.preadv(file, [memoryview(room)[: int(lengths.sum())]], int(at[0]))
        finally:
            os.close(file)
        return room, lengths

    def decode() -> None:
        for first in range(0, store.x_data.n_chunks, per_run):
            last = min(first + per_run, store.x_data.n_chunks)
            for array, buffer in zip((store.x_indices, store.x_data), out, strict=True):
                unchecked(functions.decode, *packed(array, first, last), buffer, step)

    cells = min(n, 32768)
    loaded = StoreSource(store).load([(0, cells)], np.arange(cells))
    ring, cpu = DenseRing(), torch.device("cpu")

    def densify() -> None:
        for start in range(0, cells - batch + 1, batch):
            PackedCounts(loaded, start, start + batch, store.n_genes, ring).dense(cpu)

    times = []
    for work, count in ((decode, n), (densify, cells // batch * batch)):
        work()
        began, rounds = time.process_time(), 0
        while time.process_time() - began < 1.5:
            work()
            rounds += 1
        times.append((time.process_time() - began) / rounds / count)
    return {"decode": 1 / times[0], "densify": 1 / times[1], "cells_per_cpu_s": 1 / sum(times)}


CONTENDERS = {
    "scarcade": scarcade,
    "scarcade_memory": scarcade_memory,
    "annbatch": annbatch,
    "annbatch_tuned": annbatch_tuned,
    "scdataset": scdataset,
    "scvi_tools": scvi_tools,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=[*CONTENDERS, "ceiling"])
    parser.add_argument("data")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--csr", action="store_true")
    parser.add_argument("--cells", type=int, default=0, help="stop after so many (0: whole epochs)")
    parser.add_argument("--seconds", type=float, default=3.0, help="whole epochs until so much processor time is spent")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.contender == "ceiling":
        print(json.dumps(ceiling(given.data, given.batch, given.csr)))
        return
    batches, use = CONTENDERS[given.contender](given.data, given.batch, given.csr)
    seen = 0
    for one in batches(0):  # warm-up: compile, fill caches, first superbatches
        seen += use(one)
        if seen >= 40_000 or (given.cells and seen >= given.cells // 4):
            break
    one = None
    epoch, seen, began, wall = 1, 0, time.process_time(), time.perf_counter()
    while seen == 0 or (not given.cells and time.process_time() - began < given.seconds):
        for one in batches(epoch):
            seen += use(one)
            if given.cells and seen >= given.cells:
                break
        epoch += 1
    used = time.process_time() - began
    print(
        json.dumps(
            {
                "cells_per_cpu_s": seen / used,
                "cells_per_s": seen / (time.perf_counter() - wall),
                "cells": seen,
                "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
