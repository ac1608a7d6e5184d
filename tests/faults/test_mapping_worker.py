"""Workers of a mapping that crash, that have too little, or that are not where the driver is; memory of the driver."""

import re
from collections.abc import Iterator
from pathlib import Path
from signal import SIGSEGV
from typing import Any

import anndata as ad
import numpy as np
import pytest

from scarcade.engine.cluster import cluster
from scarcade.engine.errors import ClusterError, SurroundingsError
from scarcade.jobs.mapping import map_queries
from tests.faults.mapping import (
    MappingProcess,
    good_queries,
    killing_readers_of,
    long_to_read,
    made_reference,
    outcome,
    same,
)

SETTINGS: dict[str, Any] = {"epochs": 2, "optim": {"lr": 0.01}, "threads": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ad.AnnData]:
    return made_reference(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    with cluster(cpus=2):
        yield


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("times", [1, 2])
def test_a_crash_is_tried_again_alone_and_then_told_by_its_signal(
    times: int, made: tuple[Path, ad.AnnData], session: None, tmp_path: Path
) -> None:
    reference, cells = made
    one, other = good_queries(cells, tmp_path / "in", 2)
    long_to_read(ad.read_h5ad(other), other)
    with killing_readers_of(other, SIGSEGV, at_most=times) as killed:
        first, second = map_queries(reference, [one, other], tmp_path / "out", workers=1, **SETTINGS).queries
    assert len(killed) == times
    assert first["state"] == "done"
    if times == 1:
        assert second["state"] == "done"
        map_queries(reference, other, tmp_path / "here", **SETTINGS).raise_if_failed()
        assert same(outcome(tmp_path / "here", other.stem), outcome(tmp_path / "out", other.stem))
    else:
        assert (second["state"], second["exit_code"]) == ("failed", 5)
        # Beside other work the process is now and then found killed without last words (why is not known). That they
        # name the signal is tests/jobs/test_last_words.py.
        how = (
            r"failed twice, the second time alone in its worker: its process (died of SIGSEGV|was killed from outside)"
        )
        assert re.search(how, second["reason"])
        assert second["seconds"] > 0


def test_what_no_node_can_give_is_told_and_nothing_is_set_aside(
    made: tuple[Path, ad.AnnData], session: None, tmp_path: Path
) -> None:
    reference, cells = made
    queries = good_queries(cells, tmp_path / "in", 2)
    scale = {"workers": 1, "memory_per_worker": "900TB", "start_seconds": 1}
    with pytest.raises(ClusterError, match=r"no node .*1 CPU, 9e\+14 memory.*--scale\.memory-per-worker"):
        map_queries(reference, queries, tmp_path / "out", scale=scale, **SETTINGS)
    assert '"skipped"' in (tmp_path / "out" / "summary.json").read_text()


def test_a_query_too_large_for_a_worker_is_refused_by_its_sizes_also_without_ray(
    made: tuple[Path, ad.AnnData], tmp_path: Path
) -> None:
    import h5py

    reference, cells = made
    (query,) = good_queries(cells, tmp_path / "in", 1)
    with h5py.File(query, "r+") as file:
        for name in ("data", "indices"):
            del file[f"X/{name}"]
            file["X"].create_dataset(name, shape=(60_000_000,), dtype="i4", chunks=(1 << 20,))
    result = map_queries(reference, query, tmp_path / "out", scale={"memory_per_worker": "800MB"}, **SETTINGS)
    (record,) = result.queries
    assert record["error"] == "E_MEMORY"
    wanted = "needs about 1.0 GB of memory, and a worker may have 800MB; raise --scale.memory-per-worker"
    assert wanted in record["reason"]  # streamed from 256 MiB of counts on
    with pytest.raises(SurroundingsError):
        result.raise_if_failed()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_of_the_driver_does_not_grow_with_the_number_of_queries(
    made: tuple[Path, ad.AnnData], tmp_path: Path
) -> None:
    reference, cells = made
    queries = good_queries(cells, tmp_path / "in", 100, n_cells=20)
    peaks = []
    for n in (10, 100):
        mapping = MappingProcess(reference, queries[:n], tmp_path / f"out{n}", **SETTINGS, workers=1)
        mapping.start()
        assert mapping.wait(500) == 0, mapping.errors.read_text()[-3000:]
        peaks.append(int(mapping.peak.read_text()))
    print(f"peak resident memory of the driver: {np.array(peaks) / 1e6} MB")
    assert peaks[1] < 1.15 * peaks[0]
