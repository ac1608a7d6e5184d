"""Windows in the memory of a GPU; without a GPU their kernel by Triton's interpreter, in the memory of a CPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

from scarcade.dataloaders import on_gpu
from scarcade.dataloaders.loader import LoaderConfig, stream
from scarcade.dataloaders.packed import DenseRing, PackedCounts
from scarcade.dataloaders.sources import Reading, StoreSource
from scarcade.dataloaders.store import Store
from scarcade.dataloaders.superbatch import Kept, Superbatch
from tests.every_model import made_store
from tests.gpu import DEVICE, needs_a_gpu, needs_triton

N_GENES = 70


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return made_store(Path(tmp_path_factory.mktemp("gpu")) / "a.zarr")


def window(kinds: tuple[str, str], *, in_order: bool, kept: Kept | None = None) -> tuple[Superbatch, np.ndarray]:
    """Twenty cells, one of them empty, one full, and the same as a matrix."""
    rng = np.random.default_rng(0)
    dense = rng.poisson(0.3, (20, N_GENES))
    dense[4] = 0
    dense[5] = 1 + np.arange(N_GENES)
    order = np.arange(20) if in_order else rng.permutation(20)
    rows, genes = np.nonzero(dense)
    lengths = np.bincount(rows, minlength=20)
    starts = np.cumsum(lengths) - lengths
    counts = genes.astype(kinds[0]), dense[rows, genes].astype(kinds[1])
    cells = {"starts": starts[order], "lengths": lengths[order].astype(np.int32), "rows": order}
    return Superbatch(*counts, **cells, in_order=in_order, kept=kept), dense[order]


@pytest.mark.parametrize("kinds", [("uint16", "uint8"), ("uint32", "uint16"), ("int32", "float32"), ("int64", "int64")])
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("way", ["_by_torch", pytest.param("_by_triton", marks=needs_triton)])
@pytest.mark.parametrize("kept", [True, False])
def test_cells_of_a_window_are_made_dense(way: str, kinds: tuple[str, str], in_order: bool, kept: bool) -> None:
    loaded, dense = window(kinds, in_order=in_order, kept=Kept() if kept else None)
    there = loaded.on(DEVICE)
    assert loaded.on(DEVICE) is there
    for start, stop in ((0, 20), (3, 7), (4, 5), (9, 9)):
        out = torch.zeros(stop - start, N_GENES, device=DEVICE)
        getattr(on_gpu, way)(there, start, out)
        assert np.array_equal(out.cpu().numpy(), dense[start:stop])
        assert torch.equal(there.dense(start, stop, N_GENES), out)


def test_what_is_kept_is_moved_once() -> None:
    kept = Kept()
    loaded, _ = window(("uint16", "uint8"), in_order=False, kept=kept)
    first = kept.on(loaded.indices, loaded.data, DEVICE)
    assert kept.on(loaded.indices, loaded.data, DEVICE) is first


@needs_a_gpu
@pytest.mark.parametrize("memory", [None, 0])
def test_batches_on_a_gpu_are_those_of_a_cpu(store: Store, memory: int | None) -> None:
    config = LoaderConfig(batch_size=64, window=256, gpu_memory=memory)
    here, there = (stream(store, "train", config, seed=0, device=device) for device in (torch.device("cpu"), DEVICE))
    for epoch in (0, 1, 2):
        for one, other in zip(here.epoch(epoch), there.epoch(epoch), strict=True):
            assert other.batch.device == DEVICE
            assert torch.equal(one.batch, other.batch.cpu())
            assert torch.equal(one.labels, other.labels.cpu())
            assert np.array_equal(one.rows, other.rows)
            for made in ("dense", "log1p"):
                expected = getattr(one.counts, made)(torch.device("cpu"))
                torch.testing.assert_close(getattr(other.counts, made)(DEVICE).cpu(), expected, rtol=1e-6, atol=0)


@needs_a_gpu
def test_a_window_that_a_batch_looks_into_is_not_written_over() -> None:
    """Memory of the stream that copies is used again: only when what was asked of it has been done."""
    for seed in range(20):
        loaded, dense = window(("uint16", "uint8"), in_order=seed % 2 == 0)
        counts = PackedCounts(loaded, 0, 20, N_GENES, DenseRing())
        found = counts.dense(DEVICE)
        torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]
        again = counts.dense(DEVICE)
        other = Superbatch(
            loaded.indices, loaded.data + 1, starts=loaded.starts, lengths=loaded.lengths, rows=loaded.rows
        )
        del loaded, counts
        there = other.on(DEVICE)  # while the GPU still sleeps
        assert np.array_equal(found.cpu().numpy(), dense)
        assert np.array_equal(again.cpu().numpy(), dense)
        assert np.array_equal(there.dense(0, 20, N_GENES).cpu().numpy(), dense + (dense > 0))


@pytest.mark.parametrize("threads", [2, 5])
def test_ranges_decoded_side_by_side_are_those_of_one_thread(store: Store, threads: int) -> None:
    alone, together = StoreSource(store), StoreSource(store, Reading(threads))
    rng = np.random.default_rng(0)
    for _ in range(5):
        cuts = np.sort(rng.choice(store.n_cells, 12, replace=False))
        runs = [(int(a), int(b)) for a, b in zip(cuts[::2], cuts[1::2], strict=True)]
        order = rng.permutation(sum(b - a for a, b in runs))
        one, other = alone.load(runs, order), together.load(runs, order)
        for mine, theirs in zip(one.csr(0, len(order)), other.csr(0, len(order)), strict=True):
            assert np.array_equal(mine, theirs)
