"""Mapping many queries: ours beside scvi-tools, one large query against many small ones, and peak memory.

    python -m benchmarks.mapping --data FOLDER --peer-python PYTHON [--queries 100] [--epochs 100] [--out FILE]
    python -m benchmarks.mapping --data FOLDER --parts scaling memory [--scaling-epochs 10]

**speed**: queries of 200 to 2,000 made cells x 2,000 genes, sizes spread evenly, each a batch that the reference does
not know. Both map onto the same weights: a reference of the scArches recipe (nb) that scvi-tools trained and ``scarcade
import`` read. Ours is one command in a fresh process, and everything counts: start, reading, labels, files, report.
Theirs is one process that reads, maps (`load_query_data`, `train`), embeds and labels one query after the other
(`peers/mapping_scvi_tools.py`); its imports do not count, and it writes nothing. Epochs, batch size (128), threads and
cells are the same, without validation. Accuracy: mean over queries; "same classifier" is scikit-learn's k = 50 weighted
by distance for both, "as mapped" what ``scarcade map`` writes by default.

**scaling**: 100 queries of 500 cells against one of their 50,000. **memory**: largest resident set of the process for
100 and for the first 10 of them, in the process itself and as the driver of two Ray workers.

The full size takes scvi-tools about half an hour; ``--queries 10 --epochs 10`` is a trial. Results are written to
``benchmarks/results/mapping.json`` at the full size alone, or to `--out`; parts not measured now are kept.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import environment

RESULTS = Path(__file__).parent / "results" / "mapping.json"
PEER = Path(__file__).parent / "peers" / "mapping_scvi_tools.py"
MANY = FULL = 100  # queries
GENES, LABELS = 2000, 8
REFERENCE_BATCHES, BATCH_CELLS = 10, 2_150  # a batch holds at least SIZES[1] cells by chance
SIZES, SMALL = (200, 2_000), 500  # cells of a query: of speed, from and to; of scaling and memory
K = 50
IMPORTS = "import scarcade.jobs.commands, scarcade.jobs.mapping, scarcade.jobs.report, anndata, h5py, sklearn.neighbors"
SCARCADE = (sys.executable, "-m", "scarcade.jobs.cli")


@dataclass(frozen=True)
class Made:
    """The made data: the reference's cells, and queries in folders."""

    folder: Path

    @property
    def reference(self) -> Path:
        return self.folder / "reference.h5ad"

    @property
    def small(self) -> list[Path]:
        return sorted((self.folder / "small").glob("*.h5ad"))

    @property
    def large(self) -> Path:
        return self.folder / "large" / "large.h5ad"

    @property
    def model(self) -> Path:
        """What `scarcade map` takes."""
        return self.folder / "model"

    @property
    def peer_model(self) -> Path:
        return self.folder / "peer-model"

    def queries(self, n: int) -> Path:
        return self.folder / f"queries-{n}"


def make(folder: Path, n_queries: int) -> Made:
    """Write what is not there yet. Query i is batch i behind the reference's, and always the same cells first."""
    from scarcade.dataloaders.store import open_store
    from scarcade.dataloaders.synthetic import simulate

    made, store = Made(folder), folder / "made.zarr"
    folder.mkdir(parents=True, exist_ok=True)
    n_batches = REFERENCE_BATCHES + max(MANY, n_queries)
    if not store.exists():
        simulate(store, cells=n_batches * BATCH_CELLS, genes=GENES, batches=n_batches, labels=LABELS, seed=0)
    if made.queries(n_queries).exists() and made.reference.exists() and made.large.exists():
        return made
    cells = open_store(store).to_anndata()
    cells.X = cells.X.astype(np.float32)
    places = [np.flatnonzero(cells.obs["batch"].cat.codes == batch) for batch in range(n_batches)]

    def write(path: Path, rows: np.ndarray) -> None:
        part = cells[np.sort(rows)].copy()
        part.obs = part.obs[["batch", "label"]].copy()
        part.uns.clear()
        part.write_h5ad(path)

    if not made.reference.exists():
        write(made.reference, np.concatenate(places[:REFERENCE_BATCHES]))
    queries = places[REFERENCE_BATCHES:]
    sizes = np.random.default_rng(0).permutation(np.linspace(*SIZES, n_queries).round().astype(int))
    with fresh(made.queries(n_queries)) as scratch:
        for number, size in enumerate(sizes):
            write(scratch / f"query{number:03d}.h5ad", queries[number][:size])
    with fresh(made.folder / "small") as scratch:
        for number in range(MANY):
            write(scratch / f"small{number:03d}.h5ad", queries[number][:SMALL])
    with fresh(made.large.parent) as scratch:
        write(scratch / made.large.name, np.concatenate([rows[:SMALL] for rows in queries[:MANY]]))
    return made


@contextlib.contextmanager
def fresh(folder: Path) -> Iterator[Path]:
    """A folder that gets its name when all is in it."""
    scratch = folder.with_name(f".tmp-{folder.name}")
    for old in (scratch, folder):
        shutil.rmtree(old, ignore_errors=True)
    scratch.mkdir()
    yield scratch
    scratch.rename(folder)


@dataclass(frozen=True)
class Usage:
    """What a process took, from its start to its end, with the children that it waited for."""

    wall_s: float
    cpu_s: float
    peak_mb: float  # of the process alone
    lines: tuple[str, ...]


def run(command: Sequence[object], threads: int, told: Callable[[str], None] = lambda line: None) -> Usage:
    """Run a command to its end, which must be a good one; `told` gets each line of its stdout as it comes."""
    peak, ended = [0.0], threading.Event()
    began = time.perf_counter()
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(OMP_NUM_THREADS=threads),
    )

    def watch() -> None:
        while not ended.wait(0.1):
            with contextlib.suppress(OSError, StopIteration):  # the process may be over
                status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                peak[0] = int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) / 1024

    errors: list[str] = []
    others = [threading.Thread(target=watch), threading.Thread(target=lambda: errors.extend(process.stderr or ()))]
    for one in others:
        one.start()
    lines = []
    for line in process.stdout or ():
        lines.append(line.rstrip())
        told(lines[-1])
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    ended.set()
    for one in others:
        one.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit code {process.returncode}\n{''.join(errors[-30:])}")
    return Usage(round(wall, 2), round(used.ru_utime + used.ru_stime, 2), round(peak[0]), tuple(lines))


def reference(made: Made, options: argparse.Namespace) -> None:
    """One reference for both, if there is a peer; else one of ours, which takes the same time to map onto."""
    same = ("--epochs", options.reference_epochs, "--threads", options.threads)
    if made.model.exists() and (made.peer_model.exists() or not options.peer_python):
        return
    made.model.unlink(missing_ok=True)  # a link to one of ours, from a run without the peer
    if not options.peer_python:
        store, folder = made.folder / "reference.zarr", made.folder / "run"
        keys = ("--batch-key", "batch", "--label-key", "label", "--force")
        run([*SCARCADE, "ingest", made.reference, "--out", store, *keys], options.threads)
        run([*SCARCADE, "train", "--data", store, "--recipe", "scarches", "--out", folder, *same], options.threads)
        made.model.symlink_to(folder / "model")
        return
    train = [options.peer_python, PEER, "train", made.reference, "--out", made.peer_model, "--labels", "label", *same]
    run(train, options.threads)
    scratch = made.folder / "model.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    run([*SCARCADE, "import", made.peer_model, "--out", scratch], options.threads)
    run([*SCARCADE, "embed", scratch, made.reference, "--out", scratch / "latent.zarr"], options.threads)
    scratch.rename(made.model)


def map_command(made: Made, queries: Sequence[Path], out: Path, epochs: int, *more: object) -> list[object]:
    shutil.rmtree(out, ignore_errors=True)
    return [*SCARCADE, "map", made.model, *queries, "--out", out, "--epochs", epochs, "--batch-size", 128, *more]


def speed(made: Made, options: argparse.Namespace) -> dict[str, Any]:
    """Ours and theirs on the same queries."""
    folder, out = made.queries(options.queries), made.folder / "mapped"
    threads = options.threads
    start = [run([sys.executable, "-c", IMPORTS], threads).wall_s for _ in range(3)]
    used = run(map_command(made, [folder], out, options.epochs, "--threads", threads), threads)
    records = json.loads((out / "summary.json").read_text())["queries"]
    n_cells = sum(record["n_cells"] for record in records)
    work = n_cells * options.epochs
    ours = {
        "wall_s": used.wall_s,
        "start_s": statistics.median(start),
        "cpu_s": used.cpu_s,
        "cells_epochs_per_s": round(work / used.wall_s),
        "peak_mb": used.peak_mb,
        "accuracy": round(statistics.mean(record["label_accuracy"] for record in records), 4),
        "accuracy_same_classifier": round(statistics.mean(same_classifier(made, out)), 4),
        "seconds_of_queries": round(sum(record["seconds"] for record in records), 2),
        "seconds_of_training": round(sum(record["seconds_training"] for record in records), 2),
    }
    row: dict[str, Any] = {
        "queries": options.queries,
        "cells": n_cells,
        "epochs": options.epochs,
        "threads": threads,
        "genes": GENES,
        "ours": ours,
    }
    print(f"ours: {json.dumps(ours)}", flush=True)
    if not options.peer_python:
        return row
    command = [options.peer_python, PEER, "map", made.reference, folder, "--model", made.peer_model]
    command += ["--labels", "label", "--epochs", options.epochs, "--threads", threads]
    used = run(command, threads, told=lambda line: print(f"theirs: {line}", flush=True))
    found = json.loads(used.lines[-1])
    row["theirs"] = {
        "wall_s": found["seconds"],
        "start_s": round(used.wall_s - found["seconds"], 2),
        "cpu_s": found["cpu_s"],
        "cells_epochs_per_s": round(work / found["seconds"]),
        "peak_mb": used.peak_mb,
        "accuracy_same_classifier": found["accuracy"],
    }
    row["times"] = round(found["seconds"] / ours["wall_s"], 2)
    row["times_without_start"] = round(found["seconds"] / (ours["wall_s"] - ours["start_s"]), 2)
    row["times_cpu"] = round(found["cpu_s"] / ours["cpu_s"], 2)
    return row


def same_classifier(made: Made, out: Path) -> Iterator[float]:
    """Accuracy of each mapped query by the classifier that scvi-tools' latents are given."""
    import anndata as ad
    from sklearn.neighbors import KNeighborsClassifier

    from scarcade.jobs.latent import read_latent

    latent = read_latent(made.model / "latent.zarr")
    column = latent.column("label")
    assert column is not None
    classifier = KNeighborsClassifier(n_neighbors=K, weights="distance")
    classifier.fit(latent.mean, np.array(column[0].values)[column[1]])
    for path in sorted(out.glob("*.h5ad")):
        query = ad.read_h5ad(path)
        yield float((classifier.predict(query.obsm["X_scVI"]) == query.obs["label"].astype(str).to_numpy()).mean())


def scaling(made: Made, options: argparse.Namespace) -> dict[str, Any]:
    """Many small queries against one large of the same cells, in turns."""
    took: dict[str, list[float]] = {"many": [], "one": []}
    given = {"many": [made.folder / "small"], "one": [made.large]}
    for _ in range(options.rounds):
        for name, queries in given.items():
            command = map_command(made, queries, made.folder / f"mapped-{name}", options.scaling_epochs)
            took[name].append(run([*command, "--threads", options.threads], options.threads).wall_s)
            print(f"scaling, {name}: {took[name][-1]} s", flush=True)
    many, one = (statistics.median(took[name]) for name in ("many", "one"))
    return {
        "epochs": options.scaling_epochs,
        "rounds": options.rounds,
        f"{MANY}_of_{SMALL}_s": many,
        f"one_of_{MANY * SMALL}_s": one,
        "times": round(many / one, 2),
    }


def memory(made: Made, options: argparse.Namespace) -> dict[str, Any]:
    """Largest resident set for ten and for a hundred queries of one size; of the driver where there are workers."""
    row: dict[str, Any] = {"epochs": options.memory_epochs}
    for workers in options.workers:
        for n in (MANY // 10, MANY):
            out = made.folder / f"mapped-memory-{workers}"
            command = map_command(made, made.small[:n], out, options.memory_epochs, "--workers", workers)
            used = run([*command, "--threads", options.threads if not workers else 1], options.threads)
            row[f"workers_{workers}_queries_{n}_mb"] = used.peak_mb
            print(f"memory, {workers} workers, {n} queries: {used.peak_mb:,.0f} MB", flush=True)
        few, many = (row[f"workers_{workers}_queries_{n}_mb"] for n in (MANY // 10, MANY))
        row[f"workers_{workers}_growth"] = round(many / few - 1, 3)
    return row


def table(found: dict[str, Any]) -> str:
    lines = []
    if "speed" in found:
        row = found["speed"]
        columns = (
            "wall_s",
            "start_s",
            "cpu_s",
            "cells_epochs_per_s",
            "peak_mb",
            "accuracy_same_classifier",
            "accuracy",
        )
        lines.append(
            f"{row['queries']} queries, {row['cells']:,} cells, {row['epochs']} epochs, {row['threads']} threads"
        )
        lines.append("")
        lines.append(f"| | {' | '.join(columns)} |")
        lines.append("|" + "---|" * (len(columns) + 1))
        for who in ("ours", "theirs"):
            if who in row:
                lines.append(f"| {who} | {' | '.join(str(row[who].get(name, '')) for name in columns)} |")
        if "times" in row:
            lines.append(
                f"\nours is {row['times']} times as fast with its start (theirs without), {row['times_without_start']} "
                f"without, {row['times_cpu']} by CPU seconds"
            )
    for part in ("scaling", "memory"):
        if part in found:
            lines.append(f"\n{part}: " + ", ".join(f"{name} {value}" for name, value in found[part].items()))
    return "\n".join(lines)


PARTS = {"speed": speed, "scaling": scaling, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder for the made cells; kept for the next run")
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has scvi-tools 1.4.2")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--queries", type=int, default=FULL)
    parser.add_argument("--epochs", type=int, default=100, help="speed: of each query")
    parser.add_argument("--reference-epochs", type=int, default=20)
    parser.add_argument("--scaling-epochs", type=int, default=20)
    parser.add_argument("--memory-epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1, help="scaling: of which the median is taken")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="memory: Ray workers; 0: in the process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default at the full size: benchmarks/results/mapping.json")
    options = parser.parse_args()
    made = make(options.data, options.queries)
    reference(made, options)
    found: dict[str, Any] = {"cores": os.cpu_count()}
    for name in options.parts:
        found[name] = PARTS[name](made, options)
    print("\n" + table(found))
    full = "speed" not in options.parts or (options.queries == FULL and options.epochs == 100 and options.peer_python)
    out = options.out or (RESULTS if full else None)
    if out is not None:
        out.parent.mkdir(exist_ok=True)
        before = json.loads(out.read_text()) if out.exists() else {}
        out.write_text(json.dumps({**before, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
