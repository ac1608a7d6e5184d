"""Real queries on a real reference, ours beside scvi-tools: labels carried over, and how far each query lies.

    python -m benchmarks.mapping_real --data FOLDER --work EMPTY [--peer-python PYTHON] [--seeds 0 1 2] [--epochs 40]

The reference: four of the six batches of pbmc_multistudy; the queries: another of its batches, pbmc_facs_zheng, and the
six donors of skin_ctcl_6donor, a file each. The sixth batch, zheng_facs, is made of the cells of pbmc_facs_zheng (the
same barcodes), so the two are one query and the reference never holds it. Only labels that are no classifier's guess
are used, in the reference and for scores: those of Kang's authors, FACS gates, protein gates (`LABELS` maps the names).
A cell whose true label no cell of the reference has (CD34 in FACS) is left out of the accuracy, in all methods.

Ours: ``scarcade ingest``, ``train --recipe scarches``, and one ``map`` of the folder. Theirs: the same genes,
architecture, epochs and batch sizes (`peers/mapping_scvi_tools.py`). "same classifier": scikit-learn's k = 50 weighted
by distance, for both; "map": what ``scarcade map`` writes. Distances are those of ``reference_distance``, in the latent
of each. AUROC: how well a score of a cell tells what the reference does not hold (skin; CD34 in FACS).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import environment

RESULTS = Path(__file__).parent / "results" / "mapping_real.json"
PEER = Path(__file__).parent / "peers" / "mapping_scvi_tools.py"
KANG = ("kang_ctrl", "kang_stim")
ZHENG, SKIN = "pbmc_facs_zheng", "skin_ctcl_6donor"
TRUE_SOURCES = ("author (Seurat ifnb)", "FACS", "protein gating")
K = 50
LABELS = {  # of pbmc_facs_zheng -> of pbmc_multistudy
    "CD19+ B": "B",
    "CD14+ Monocyte": "CD14 Mono",
    "CD34+": "CD34 HSPC",
    "CD56+ NK": "NK",
    "CD4+ T Helper2": "CD4 T",
    "CD4+/CD25 T Reg": "CD4 T",
    "CD4+/CD45RA+/CD25- Naive T": "CD4 T",
    "CD4+/CD45RO+ Memory": "CD4 T",
    "CD8+ Cytotoxic T": "CD8 T",
    "CD8+/CD45RA+ Naive Cytotoxic": "CD8 T",
}


@dataclass(frozen=True)
class Split:
    """Which batches of pbmc_multistudy are the reference, and which one is a query."""

    reference: tuple[str, ...]
    query: str


SPLITS = {
    "pbmc10k": Split((*KANG, "tenx_pbmc5k", "tenx_donorA"), "tenx_pbmc10k"),  # both PBMC queries can be scored
    "donorA": Split((*KANG, "tenx_pbmc10k", "tenx_pbmc5k"), "tenx_donorA"),  # more labels in the reference
}


def prepare(data: Path, folder: Path, split: Split) -> None:
    """folder/reference/BATCH.h5ad and folder/queries/NAME.h5ad, with labels that are true or missing."""
    import anndata as ad

    if (folder / "queries").is_dir():
        return
    scratch = folder / f".tmp-{os.getpid()}"
    for name in ("reference", "queries"):
        (scratch / name).mkdir(parents=True)
    cells = ad.read_h5ad(data / "pbmc_multistudy.h5ad")
    true = cells.obs["label_source"].isin(TRUE_SOURCES) & (cells.obs["cell_type"] != "unlabelled")
    cells.obs = cells.obs[["batch"]].assign(
        cell_type=cells.obs["cell_type"].astype(object).where(true).astype("category")
    )
    for batch in split.reference:
        cells[cells.obs["batch"] == batch].copy().write_h5ad(scratch / "reference" / f"{batch}.h5ad")
    cells[cells.obs["batch"] == split.query].copy().write_h5ad(scratch / "queries" / f"{split.query}.h5ad")
    facs = ad.read_h5ad(data / f"{ZHENG}.h5ad")
    facs.obs["cell_type"] = facs.obs["cell_type"].astype(str).map(LABELS).astype("category")
    facs.write_h5ad(scratch / "queries" / f"{ZHENG}.h5ad")
    skin = ad.read_h5ad(data / f"{SKIN}.h5ad")
    del skin.obs["cell_type"]
    for donor in skin.obs["batch"].unique():
        skin[skin.obs["batch"] == donor].copy().write_h5ad(scratch / "queries" / f"skin_{donor}.h5ad")
    for name in ("reference", "queries"):
        os.replace(scratch / name, folder / name)
    scratch.rmdir()


def scarcade(*words: object) -> float:
    """Seconds of one command in a process of its own."""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "scarcade.jobs.cli", *map(str, words)],
        check=True,
        stdout=subprocess.DEVNULL,
        env=environment(),
    )
    return round(time.perf_counter() - began, 1)


def ours(folder: Path, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """folder/run-SEED and folder/mapped-SEED; seconds of each that was made now."""
    took: dict[str, float] = {}
    store, run, out = folder / "atlas.zarr", folder / f"run-{seed}", folder / f"mapped-{seed}"
    if not store.exists():
        files = sorted((folder / "reference").glob("*.h5ad"))
        keys = ("--batch-key", "batch", "--label-key", "cell_type", "--hvg", 2000)
        took["ingest_s"] = scarcade("ingest", *files, "--out", store, *keys)
    same = ("--epochs", options.epochs, "--seed", seed, "--threads", options.threads)
    if not (run / "model").exists():
        took["train_s"] = scarcade("train", "--data", store, "--recipe", "scarches", "--out", run, *same)
    if not (out / "report.html").exists():
        took["map_s"] = scarcade("map", run / "model", folder / "queries", "--out", out, *same)
    return took


def theirs(folder: Path, seed: int, options: argparse.Namespace) -> None:
    """folder/peer-SEED: the latents of scvi-tools, of the reference's cells in the order of reference.h5ad."""
    from scarcade.dataloaders.store import open_store

    cells, model, latents = folder / "reference.h5ad", folder / f"peer-model-{seed}", folder / f"peer-{seed}"
    if not cells.exists():
        open_store(folder / "atlas.zarr").to_anndata().write_h5ad(cells)
    same = ["--epochs", options.epochs, "--seed", seed, "--threads", options.threads]
    if not model.exists():
        peer(options.peer_python, "train", cells, "--out", model, *same)
    if not latents.exists():  # they get their name when all are there
        scratch = folder / f".tmp-peer-{seed}"
        peer(options.peer_python, "map", cells, folder / "queries", "--model", model, "--latents", scratch, *same)
        scratch.rename(latents)


def peer(python: Path, *words: object) -> None:
    subprocess.run([str(python), str(PEER), *map(str, words)], check=True, stdout=sys.stderr, env=environment())


@dataclass(frozen=True)
class Space:
    """The latent of one method: the reference's cells with their labels, and each query's."""

    reference: np.ndarray
    labels: np.ndarray  # text, None where there is none
    queries: dict[str, np.ndarray]


def our_space(folder: Path, seed: int) -> Space:
    import anndata as ad

    from scarcade.jobs.latent import read_latent

    latent = read_latent(folder / f"run-{seed}" / "model" / "latent.zarr")
    column = latent.column("cell_type")
    assert column is not None
    values, codes = np.array([*column[0].values, None], object), column[1]
    mapped = {
        path.stem: ad.read_h5ad(path).obsm["X_scVI"] for path in sorted((folder / f"mapped-{seed}").glob("*.h5ad"))
    }
    return Space(latent.mean, values[codes], mapped)


def their_space(folder: Path, seed: int) -> Space:
    import anndata as ad

    from scarcade.dataloaders.schema import text_of

    obs = ad.read_h5ad(folder / "reference.h5ad", backed="r").obs
    found = {path.stem: np.load(path) for path in sorted((folder / f"peer-{seed}").glob("*.npy"))}
    return Space(found.pop("reference"), text_of(obs["cell_type"]), found)


def truths(folder: Path) -> dict[str, np.ndarray]:
    """The true labels of the queries that have any."""
    import anndata as ad

    from scarcade.dataloaders.schema import text_of

    found = {path.stem: ad.read_h5ad(path, backed="r").obs for path in sorted((folder / "queries").glob("*.h5ad"))}
    found = {name: text_of(obs["cell_type"]) for name, obs in found.items() if "cell_type" in obs}
    return {name: labels for name, labels in found.items() if any(label is not None for label in labels)}


def accuracies(space: Space, truth: dict[str, np.ndarray]) -> dict[str, float]:
    """By the same classifier for all methods."""
    from sklearn.neighbors import KNeighborsClassifier

    known = space.labels != None  # noqa: E711  (element by element)
    classifier = KNeighborsClassifier(n_neighbors=K, weights="distance")
    classifier.fit(space.reference[known], space.labels[known].astype(str))
    return {name: accuracy(classifier.predict(space.queries[name]), labels, space) for name, labels in truth.items()}


def accuracy(predicted: np.ndarray, truth: np.ndarray, space: Space) -> float:
    scored = np.isin(truth.astype(str), space.labels[space.labels != None].astype(str))  # noqa: E711
    return float((predicted.astype(str)[scored] == truth.astype(str)[scored]).mean())


def distances(space: Space) -> dict[str, np.ndarray]:
    """`reference_distance` of each query's cells."""
    from scarcade.jobs.label_transfer import LabelTransfer

    transfer = LabelTransfer(space.reference, [], K)
    return {name: transfer.distance(latent) for name, latent in space.queries.items()}


def aurocs(scores: dict[str, np.ndarray], truth: dict[str, np.ndarray], space: Space) -> dict[str, float]:
    """How well a score of each cell tells what is not in the reference."""
    from sklearn.metrics import roc_auc_score

    known = {*space.labels, None}  # a cell without a true label counts as one of the reference's types
    skin = np.concatenate([np.full(len(values), name.startswith("skin_")) for name, values in scores.items()])
    foreign = {name: np.array([label not in known for label in labels]) for name, labels in truth.items()}
    lacking = np.concatenate([foreign.get(name, np.zeros(len(values), bool)) for name, values in scores.items()])
    pooled = np.concatenate(list(scores.values()))
    return {
        "skin against all PBMC": float(roc_auc_score(skin, pooled)),
        "skin against PBMC of the reference's types": float(roc_auc_score(skin[~lacking], pooled[~lacking])),
        f"CD34 against the rest of {ZHENG}": float(roc_auc_score(foreign[ZHENG], scores[ZHENG])),
    }


def measured(folder: Path, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each method."""
    import anndata as ad

    took = ours(folder, seed, options)
    truth = truths(folder)
    found = [("scarcade", our_space(folder, seed), took)]
    if options.peer_python:
        theirs(folder, seed, options)
        found.append(("scvi-tools", their_space(folder, seed), {}))
    rows = []
    for method, space, seconds in found:
        far = distances(space)
        row: dict[str, Any] = {"method": method, "seed": seed, **seconds, "accuracy": accuracies(space, truth)}
        row["beyond"] = {name: float((values > 1).mean()) for name, values in far.items()}
        row["distance"] = {name: float(np.median(values)) for name, values in far.items()}
        row["auroc"] = {"reference_distance": aurocs(far, truth, space)}
        if method == "scarcade":
            obs = {name: ad.read_h5ad(folder / f"mapped-{seed}" / f"{name}.h5ad", backed="r").obs for name in far}
            predicted = {name: obs[name]["cell_type_pred"].to_numpy() for name in truth}
            row["accuracy_map"] = {name: accuracy(predicted[name], labels, space) for name, labels in truth.items()}
            unsure = {name: one["cell_type_uncertainty"].to_numpy() for name, one in obs.items()}
            row["auroc"]["cell_type_uncertainty"] = aurocs(unsure, truth, space)
        rows.append(row)
    return rows


def table(name: str, rows: list[dict[str, Any]]) -> str:
    """Means over seeds (least to most): a line for each query, then one for each score of a cell."""
    methods = [m for m in ("scarcade", "scvi-tools") if any(row["method"] == m for row in rows)]
    head = [f"{name}: query"] + [f"{what}, {m}" for m in methods for what in ("accuracy", "beyond", "distance")]
    lines = ["| " + " | ".join([*head, "accuracy, map"]) + " |", "|" + "---|" * (len(head) + 1)]
    for query in rows[0]["beyond"]:
        cells = []
        for method in methods:
            of = [row for row in rows if row["method"] == method]
            cells += [
                spread([row[what][query] for row in of if query in row[what]])
                for what in ("accuracy", "beyond", "distance")
            ]
        cells.append(spread([row["accuracy_map"][query] for row in rows if query in row.get("accuracy_map", {})]))
        lines.append("| " + " | ".join([query, *cells]) + " |")
    for method in methods:
        of = [row["auroc"] for row in rows if row["method"] == method]
        lines += ["", f"| {name}, AUROC, {method} | {' | '.join(of[0]['reference_distance'])} |", "|---|---|---|---|"]
        for score in of[0]:
            cells = [spread([one[score][what] for one in of]) for what in of[0][score]]
            lines.append(f"| {score} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    if not values:
        return ""
    least = f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{least}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with pbmc_multistudy.h5ad and the others")
    parser.add_argument("--work", type=Path, required=True, help="folder for stores, runs and results; kept")
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has scvi-tools 1.4.2")
    parser.add_argument("--splits", nargs="+", choices=list(SPLITS), default=list(SPLITS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=40, help="of the reference and of each query")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    found: dict[str, Any] = {"epochs": options.epochs}
    for name in options.splits:
        folder = options.work / f"{name}-{options.epochs}"
        folder.mkdir(parents=True, exist_ok=True)
        prepare(options.data, folder, SPLITS[name])
        rows = [row for seed in options.seeds for row in measured(folder, seed, options)]
        found[name] = rows
        print(table(name, rows), end="\n\n", flush=True)
    if options.peer_python:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
