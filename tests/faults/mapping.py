"""A small mapping and ways to hurt it: queries that are bad in ten ways, and a process of its own to be killed.

Run as a program: one JSON object of arguments for `map_queries`.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import psutil
import scipy.sparse as sp
from safetensors.numpy import load_file

from scarcade.dataloaders.synthetic import simulate
from scarcade.jobs.results import RECORDS
from tests.jobs.conftest import train_on

ROOT = Path(__file__).parents[2]
CELLS = 50
BAD = ("cut", "normalised", "foreign", "nan", "nothing", "pickled", "greedy", "poison", "dangling", "long")
PICKLE = b"\x80\x04cos\nsystem\n(S'touch hacked'\ntR."


def made_reference(folder: Path) -> tuple[Path, ad.AnnData]:
    """The folder of a small model, and cells like those that it was trained on."""
    store = simulate(folder / "all.zarr", cells=600, genes=60, batches=3, labels=3, seed=1, label_effect=1.5)
    *known, new = store.schema.batch.values
    cells = store.to_anndata(known)
    cells.obs["batch"], cells.obs["label"] = cells.obs["batch"].astype(str), cells.obs["label"].astype(str)
    return train_on(cells, store, folder / "model", epochs=2), store.to_anndata([new])


def good_queries(cells: ad.AnnData, folder: Path, n: int, n_cells: int = CELLS) -> list[Path]:
    """`n` files of `n_cells` cells each."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(5)
    paths = []
    for i in range(n):
        some = cells[rng.choice(cells.n_obs, n_cells, replace=n_cells > cells.n_obs)].copy()
        some.obs = some.obs[["label"]].astype(str)
        some.obs_names = [f"q{i}_{j}" for j in range(n_cells)]
        some.write_h5ad(folder / f"good{i:02d}.h5ad")
        paths.append(folder / f"good{i:02d}.h5ad")
    return paths


def bad_queries(good: Path, folder: Path, *, greedy_cells: int) -> None:
    """One of each of `BAD` in `folder`; "greedy" trains on more cells at once than its worker has memory for."""
    cells = ad.read_h5ad(good)
    (folder / "cut.h5ad").write_bytes(good.read_bytes()[:20_000])
    (folder / "nothing.h5ad").write_bytes(b"")
    (folder / "pickled.h5ad").write_bytes(PICKLE)
    (folder / "dangling.h5ad").symlink_to(folder / "nowhere.h5ad")
    changed = cells.copy()
    counts = cells.X.toarray()
    changed.X = sp.csr_matrix(np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4).astype(np.float32))
    changed.write_h5ad(folder / "normalised.h5ad")
    changed = cells.copy()
    changed.var_names = [f"other{i}" for i in range(cells.n_vars)]
    changed.write_h5ad(folder / "foreign.h5ad")
    changed = cells.copy()
    changed.X = changed.X.astype(np.float32)
    changed.X.data[5] = np.nan
    changed.write_h5ad(folder / "nan.h5ad")
    changed = cells.copy()
    changed.obs["label"] = ["x" * 1_000_000] + ["b"] * (cells.n_obs - 1)
    changed.write_h5ad(folder / "long.h5ad")
    many = cells[np.zeros(greedy_cells, int)]
    few = ad.AnnData(sp.csr_matrix(np.eye(1, cells.n_vars, dtype=np.float32)[np.zeros(greedy_cells, int)]))
    few.var_names = many.var_names
    few.write_h5ad(folder / "greedy.h5ad")
    long_to_read(cells, folder / "poison.h5ad")


def long_to_read(cells: ad.AnnData, path: Path) -> Path:
    """Write a file of few cells that whoever reads it has open for a while."""
    cells.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        padding = file["uns"].create_dataset("padding", shape=(100_000_000,), dtype="u1", fillvalue=0)
        padding.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        padding[-1] = 1
    return path


@contextmanager
def killing_readers_of(path: Path, number: int = signal.SIGKILL, at_most: int = 100) -> Iterator[list[int]]:
    """Within the block signal `number` meets every Ray worker that has `path` open; their process ids."""
    killed: list[int] = []
    stop = threading.Event()

    def hunt() -> None:
        while not stop.wait(0.001):
            for pid in mappers():
                if len(killed) < at_most and pid not in killed and _reads(pid, path):
                    os.kill(pid, number)
                    killed.append(pid)

    thread = threading.Thread(target=hunt)
    thread.start()
    try:
        yield killed
    finally:
        stop.set()
        thread.join()


def mappers() -> list[int]:
    """Ray workers of this machine that are mapping now."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                title = Path("/proc", name, "cmdline").read_bytes()
            except OSError:
                continue
            if title.startswith(b"ray::map:"):
                found.append(int(name))
    return found


def _reads(pid: int, path: Path) -> bool:
    folder = f"/proc/{pid}/fd"
    try:
        return any(os.readlink(f"{folder}/{fd}") == str(path) for fd in os.listdir(folder))
    except OSError:
        return False


def outcome(out: Path, name: str) -> dict[str, np.ndarray]:
    """All numbers and labels of a result."""
    cells = ad.read_h5ad(out / f"{name}.h5ad")
    found = {f"obsm/{key}": np.asarray(value) for key, value in cells.obsm.items()}
    found |= {f"obs/{key}": cells.obs[key].astype(str).to_numpy() for key in cells.obs}
    return found | {
        f"delta/{key}": value for key, value in load_file(out / f"{name}.delta" / "delta.safetensors").items()
    }


def same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and one[key].tobytes() == other[key].tobytes()
        if one[key].dtype != object
        else list(one[key]) == list(other[key])
        for key in one
    )


def done(out: Path) -> dict[str, int]:
    """Name -> the time at which it was committed, of queries that are done."""
    found = {}
    for path in sorted((out / RECORDS).glob("[!.]*.json")):
        try:
            record = json.loads(path.read_text())
            if record["state"] == "done":
                found[path.stem] = (out / f"{path.stem}.h5ad").stat().st_mtime_ns
        except (OSError, ValueError):
            continue
    return found


class MappingProcess:
    """The process, its folder of results, and ways to hurt it."""

    def __init__(self, reference: Path, queries: Sequence[Path], out: Path, **settings: Any) -> None:
        self.out = out
        arguments = {"reference": str(reference), "queries": list(map(str, queries)), "out": str(out), **settings}
        self._command = [sys.executable, "-m", "tests.faults.mapping", json.dumps(arguments)]
        self.process: subprocess.Popen[bytes] | None = None
        self.errors = out.with_suffix(".stderr")
        self.peak = out.with_suffix(".peak")  # resident bytes of the driver at their most, once it has ended well

    def start(self, **environment: str) -> None:
        here = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
        with open(self.errors, "ab") as errors:
            self.process = subprocess.Popen(self._command, cwd=ROOT, env=here, stderr=errors)

    def reach(self, n: int, timeout: float = 240) -> dict[str, int]:
        """Wait until `n` queries are done; what is done."""
        assert self.process is not None
        deadline = time.monotonic() + timeout
        while len(found := done(self.out)) < n:
            assert time.monotonic() < deadline, f"{n} were not reached: {self.errors.read_text()[-2000:]}"
            assert self.process.poll() is None, self.errors.read_text()[-2000:]
            time.sleep(0.005)
        return found

    def kill(self) -> list[psutil.Process]:
        """kill -9 for the driver; returns what it had started."""
        assert self.process is not None
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.send(signal.SIGKILL)
        return family

    def send(self, number: int, timeout: float = 60) -> int:
        """Send a signal and wait for the end; the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(timeout)

    def wait(self, timeout: float = 280) -> int:
        """Wait for the end; the exit code."""
        assert self.process is not None
        return self.process.wait(timeout)


def main(arguments: dict[str, Any]) -> int:
    from scarcade.jobs.exits import explained, stop_tidily_on_sigterm
    from scarcade.jobs.mapping import map_queries

    stop_tidily_on_sigterm()
    try:
        map_queries(**arguments).raise_if_failed()
        # (not ru_maxrss, which a child begins with its parent's)
        (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        Path(arguments["out"]).with_suffix(".peak").write_text(str(int(peak.split()[1]) << 10))
    except BaseException as error:  # noqa: BLE001  (as the command does)
        code, message = explained(error)
        print(message, file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
