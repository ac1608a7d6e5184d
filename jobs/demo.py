"""The whole way on made data: simulate, ingest, train on Ray, map queries of unseen batches, and look.

It calls the same functions as the commands, with files in between, so what works here works on real files. Every
step finds what an earlier run has done: a demonstration that was stopped continues.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from scarcade import __version__
from scarcade.dataloaders.ingest import ingest
from scarcade.dataloaders.store import open_store
from scarcade.dataloaders.synthetic import simulate
from scarcade.engine.errors import UsageError
from scarcade.engine.folder import write_json
from scarcade.jobs.console import Bar, mapping_table, mapping_told, note, seconds, training_told
from scarcade.jobs.mapping import MapResult, map_queries
from scarcade.jobs.train import train

GENES, BATCHES, HELD_OUT, LABELS = 1_000, 9, 3, 8
EPOCHS, QUERY_EPOCHS = 12, 30
MARK = "demo.json"  # stands in a folder that a demonstration made, and may therefore remove


def demo(out: str | Path = "demo", *, cells: int = 20_000, workers: int = 2, seed: int = 0, force: bool = False) -> str:
    """Run the demonstration in the folder `out`; returns what to print: accuracies, and where to look.

    Raises:
        UsageError: `out` holds something else, or a demonstration with other settings.
    """
    out = Path(out)
    began = time.monotonic()
    _claim(out, {"cells": cells, "seed": seed, "version": __version__}, force=force)
    files, queries = _made(out, cells, seed)
    with Bar("ingesting") as bar:
        store = ingest(
            files, out / "atlas.zarr", batch_key="batch", label_keys=["label"], progress=bar.ingesting, report=_silent
        )
    note(f"ingested {len(files)} files: {store.n_cells:,} cells x {store.n_genes:,} genes")
    with Bar("training") as bar:
        train(
            store,
            "scvi",
            out=out / "run",
            recipe="scarches",
            seed=seed,
            epochs=EPOCHS,
            workers=workers,
            settings={"optim": {"kl_epochs": EPOCHS - 1, "lr": 2e-3}, "checkpoint": {"every_seconds": 30}},
            progress=training_told(bar),
        )
    with Bar("mapping", unit="epochs") as bar:
        result = map_queries(
            out / "run" / "model",
            queries,
            out / "mapped",
            batch_key="batch",
            epochs=QUERY_EPOCHS,
            seed=seed,
            told=mapping_told(bar),
            optim={"kl_epochs": QUERY_EPOCHS - 1},
            report={"picture": "pca"},
        )
    result.raise_if_failed()
    return _told(result, out, time.monotonic() - began)


def _claim(out: Path, settings: dict[str, Any], *, force: bool) -> None:
    """Take the folder for a demonstration with these settings; never somebody's own folder."""
    mark = out / MARK
    if out.exists() and any(out.iterdir()) and not mark.is_file():
        raise UsageError(f"--out {out}: is there, and no demonstration made it; give another folder")
    if force and mark.is_file():
        shutil.rmtree(out)
    if mark.is_file():
        before = json.loads(mark.read_text())
        if before != settings:
            differ = ", ".join(f"{name} {before.get(name)}" for name in settings if before.get(name) != settings[name])
            raise UsageError(f"--out {out}: holds a demonstration with {differ}; --force starts over")
        return
    out.mkdir(parents=True, exist_ok=True)
    write_json(mark, settings)


def _made(out: Path, cells: int, seed: int) -> tuple[list[Path], list[Path]]:
    """.h5ad files, one for each batch: those of the reference, and those of the queries."""
    path = out / "made.zarr"
    if path.exists():
        store = open_store(path)
    else:
        with Bar("simulating") as bar:
            store = simulate(
                path,
                cells=cells,
                genes=GENES,
                batches=BATCHES,
                labels=LABELS,
                seed=seed,
                progress=lambda done: bar(done, cells),
            )
    batches = store.schema.batch.values
    files = [out / ("queries" if i >= BATCHES - HELD_OUT else "files") / f"{b}.h5ad" for i, b in enumerate(batches)]
    for batch, file in zip(batches, files, strict=True):
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            temporary = file.with_suffix(".tmp")
            store.to_anndata([batch]).write_h5ad(temporary)
            temporary.rename(file)
    note(f"made {store.n_cells:,} cells in {BATCHES} batches, {HELD_OUT} of which are held out as queries")
    return files[: BATCHES - HELD_OUT], files[BATCHES - HELD_OUT :]


def _told(result: MapResult, out: Path, took: float) -> str:
    found = [record["labels"]["label"] for record in result.queries]
    accuracy = sum(one["accuracy"] * one["n_cells"] for one in found) / sum(one["n_cells"] for one in found)
    return "\n".join(
        [
            mapping_table(result.queries),
            "",
            f"{accuracy:.1%} of the transferred labels are the true ones, in batches that the reference never saw.",
            f"{seconds(took)} in all. Look at {result.out}/report.html; the model is {out / 'run' / 'model'}.",
        ]
    )


def _silent(line: str) -> None:
    """Decisions of ingest about made files are no news."""
