"""Label transfer by every model on the baseline's splits: a reference, a query mapped onto it, its labels guessed.

The same cells, genes, epochs and settings as the originals had, and one classifier for all: scikit-learn's
KNeighborsClassifier weighted by distance on the latent means; for scanvi its own classifier too. "edit" leaves out
reference cells that their neighbours contradict. "map" is what `scarcade map` itself predicts (50 neighbours, gaussian
weights), "map_edit" the same with `--transfer.edit`. Everything goes through the functions behind `scarcade ingest`,
`train` and `map`.
"""

import argparse
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import environment

Row = dict[str, Any]
TASK = "labels"
EPOCHS = {"mixology": 100, "pbmc": 80, "pbmc_clean": 80}
PEERS = PEER, PEER_SCANVI = "scvi-tools SCVI", "scvi-tools SCANVI"
CLASSIFIERS = ("k15", "k50", "k200", "edit15", "edit50", "map", "map_edit", "own")
COLUMNS = tuple(f"{score}_{name}" for name in ("k15", "k50", "own") for score in ("accuracy", "macro_f1"))
NUMBERS = ("query_reconstruction", "query_elbo", "reference_cpu_s", "query_cpu_s")
HARMONY = "Harmony"
"""It sees the query while it integrates, so it is nobody's original."""
TRANSFER_SCVI, TRANSFER_SCANVI = "scarcade scvi, --recipe transfer", "scarcade scanvi, --recipe transfer"
SCVI = {
    "n_layers": 2,
    "use_layer_norm": "both",
    "use_batch_norm": "none",
    "encode_covariates": True,
    "dropout_rate": 0.2,
    "gene_likelihood": "zinb",
}


@dataclass(frozen=True)
class Method:
    """A model, its settings as the original was run, and the original's name in the table."""

    model: str
    original: str | None
    train: Mapping[str, Any] = field(default_factory=dict)  # settings of `sca.train`
    query: Mapping[str, Any] = field(default_factory=dict)  # sections of `sca.map_queries`
    start: str | None = None  # the method whose model this one starts from
    epochs: Mapping[str, int] = field(default_factory=dict)  # of the reference on a split; default: the split's
    query_epochs: Mapping[str, int] = field(default_factory=dict)  # of the query; default: the split's
    programs: bool = False  # gene programs, and only the genes in one of them
    recipe: str | None = None


METHODS = {
    "scarcade scvi": Method("scvi", PEER, {"model": SCVI}),
    TRANSFER_SCVI: Method("scvi", None, recipe="transfer"),
    "scarcade scanvi": Method(
        "scanvi",
        PEER_SCANVI,
        {"data": {"samples_per_label": 100}},
        start="scarcade scvi",
        epochs=dict.fromkeys(EPOCHS, 20),
    ),
    TRANSFER_SCANVI: Method("scanvi", None, start=TRANSFER_SCVI, epochs=dict.fromkeys(EPOCHS, 20), recipe="transfer"),
    "scarcade trvae": Method(
        "trvae",
        "scArches trVAE",
        {"model": {"hidden_layer_sizes": (128, 128)}, "optim": {"kl_epochs": 200.0}},
        {"optim": {"kl_epochs": 200.0}},
        epochs={"pbmc_clean": 49},  # where the original's early stopping ended, as below
        query_epochs={"pbmc": 75},
    ),
    "scarcade expimap": Method(
        "expimap",
        "scArches expiMap",
        {
            "model": {"hidden_layer_sizes": (256, 256, 256), "min_program_genes": 12, "alpha": 0.7},
            "optim": {"kl_max": 0.5, "kl_epochs": 100.0},
        },
        {"optim": {"kl_max": 0.1, "kl_epochs": 100.0}},
        query_epochs={"pbmc": 48},
        programs=True,
    ),
    "scarcade scgen": Method(
        "scgen",
        "scArches scGen",
        {"model": {"hidden_layer_sizes": (256, 128)}, "optim": {"early_stopping": False}, "data": {"batch_size": 32}},
        epochs=dict.fromkeys(EPOCHS, 50),
    ),
}


@dataclass(frozen=True)
class Split:
    """A split's two files, and its stores and runs in the folder `work`."""

    name: str
    seed: int
    h5ad: Path
    work: Path
    gmt: Path | None

    def cells(self, *, query: bool, genes: list[str] | None = None) -> Any:
        import anndata as ad

        data = ad.read_h5ad(self.h5ad)
        chosen = data[data.obs["query"].to_numpy(bool) == query]
        return (chosen if genes is None else chosen[:, genes]).copy()

    def folder(self, method: str) -> Path:
        return self.work / f"{self.name}-{self.seed}-{re.sub('[^a-z0-9]+', '-', method.lower())}"

    def genes(self, method: Method) -> list[str] | None:
        """The genes that are in a program, of a method with programs; None: all."""
        from scarcade.dataloaders.programs import read_programs

        if not method.programs:
            return None
        if self.gmt is None:
            raise SystemExit(f"{method.model}: give --gmt FILE")
        known = list(self.cells(query=False).var_names)
        kept = read_programs([self.gmt], known, min_genes=method.train["model"]["min_program_genes"]).programs
        inside = {gene for program in kept.values() for gene in program}
        return [gene for gene in known if gene in inside]


def trained(split: Split, name: str) -> tuple[Path, float]:
    """Folder of the reference's model by a method, and CPU seconds of its training with that of what it starts from."""
    import scarcade as sca

    method = METHODS[name]
    start, before_s = (None, 0.0) if method.start is None else trained(split, method.start)
    folder = split.folder(name)
    took = folder / "cpu_s"
    if took.exists():
        return folder / "model", before_s + float(took.read_text())
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run took is not known
    genes = split.genes(method)
    store = split.work / f"{split.name}-{split.seed}{'-programs' if method.programs else ''}.zarr"
    if not store.exists():
        file = store.with_suffix(".h5ad")
        split.cells(query=False, genes=genes).write_h5ad(file)
        sca.ingest([file], store, batch_key="batch", label_keys=["lab"], seed=split.seed, report=lambda line: None)
    began = time.process_time()
    sca.train(
        store,
        model=method.model,
        out=folder,
        recipe=method.recipe,
        init_from=start,
        programs=[split.gmt] if method.programs and split.gmt else None,
        epochs=method.epochs.get(split.name, EPOCHS[split.name]),
        seed=split.seed,
        workers=0,
        threads=1,
        settings=method.train,
        progress=lambda line: None,
    )
    took.write_text(str(time.process_time() - began))
    return folder / "model", before_s + float(took.read_text())


def measured(split: Split, name: str) -> dict[str, Any]:
    """Train, map, score: a row of the table."""
    import anndata as ad

    import scarcade as sca

    method = METHODS[name]
    model, reference_s = trained(split, name)
    query = split.cells(query=True, genes=split.genes(method))
    out = split.folder(name) / "mapped"
    began = time.process_time()
    settings = {
        "optim": {"epochs": method.query_epochs.get(split.name, EPOCHS[split.name]), **method.query.get("optim", {})}
    }
    sca.map_queries(
        model,
        {"query": query},
        out,
        batch_key="batch",
        label_key=["lab"],
        seed=split.seed,
        workers=0,
        threads=1,
        report={"picture": "pca"},
        **{**method.query, **settings},
    ).raise_if_failed()
    query_s = time.process_time() - began

    result = ad.read_h5ad(out / "query.h5ad")
    reference = sca.load(model)
    known, latent = known_latent(split, method, reference)
    mapped = result.obsm[reference.model.obsm_key]
    if method.programs:
        active = reference.model.active_terms().numpy()
        latent, mapped = latent[:, active], mapped[:, active]
    row: dict[str, Any] = {"reference_cpu_s": reference_s, "query_cpu_s": query_s}
    row["reference_epochs"] = json.loads((model / "model.json").read_text())["training"]["epochs"]
    if method.model in ("scvi", "scanvi"):
        surgery = sca.load(model, delta=out / "query.delta")
        row["query_elbo"] = float(surgery.get_elbo(query))
        row["query_reconstruction"] = float(surgery.get_reconstruction_error(query)["reconstruction_loss"])
    truth = result.obs["lab"].astype(str).to_numpy()
    for classifier, predicted in guesses(latent, known, mapped, split.seed).items():
        row |= scores(classifier, truth, predicted)
    row |= scores("map", truth, result.obs["lab_pred"].astype(str).to_numpy())
    if method.model != "scgen":
        row |= scores("map_edit", truth, edited(model, result.obsm[reference.model.obsm_key], split.seed))
    if method.model == "scanvi":
        row |= scores("own", truth, result.obs["lab_scanvi"].astype(str).to_numpy())
    return row


def edited(model: Path, mapped: np.ndarray, seed: int) -> np.ndarray:
    """What `scarcade map` predicts with `--transfer.edit` for query cells whose latent is `mapped`."""
    from scarcade.jobs.reference import TransferConfig, load_reference

    transfer = load_reference(model, TransferConfig(edit=True), seed=seed).transfer
    assert transfer is not None
    (prediction,) = transfer.predict(mapped)
    return np.array(prediction.column.values)[prediction.codes]


def known_latent(split: Split, method: Method, reference: Any) -> tuple[np.ndarray, np.ndarray]:
    """Labels and latent means of the reference's cells; of scgen after its batches were taken out, as the baseline."""
    from scarcade.jobs.correction import CORRECTED, remove_batches

    cells = split.cells(query=False, genes=split.genes(method))
    known = cells.obs["lab"].astype(str).to_numpy()
    if method.model == "scgen":
        return known, remove_batches(reference, cells, batch_key="batch", label_key="lab").obsm[CORRECTED]
    return known, reference.get_latent_representation(cells)


def guesses(latent: np.ndarray, known: np.ndarray, mapped: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Labels of the query by each classifier: that of the baseline, more neighbours, fewer reference cells."""
    from sklearn.neighbors import KNeighborsClassifier

    from scarcade.jobs.mislabelled import contradicted

    kept = ~contradicted(latent, np.unique(known, return_inverse=True)[1], seed=seed)
    found = {}
    for name, voters in (("k", np.ones(len(known), bool)), ("edit", kept)):
        for k in (15, 50, 200):
            classifier = KNeighborsClassifier(n_neighbors=k, weights="distance")
            found[f"{name}{k}"] = classifier.fit(latent[voters], known[voters]).predict(mapped)
    return found


def scores(name: str, truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Accuracy, and F1 averaged over the classes that the query has."""
    from sklearn.metrics import accuracy_score, f1_score

    classes = sorted(set(truth))
    return {
        f"accuracy_{name}": float(accuracy_score(truth, predicted)),
        f"macro_f1_{name}": float(f1_score(truth, predicted, average="macro", labels=classes)),
    }


def peer(python: Path, split: Split, name: str) -> dict[str, Any]:
    """scvi-tools on a split, in its own interpreter."""
    script = Path(__file__).parent / "peers" / "scvi_quality.py"
    command = [str(python), str(script), str(split.h5ad), "--epochs", str(EPOCHS[split.name])]
    command += ["--seed", str(split.seed), *(["--scanvi"] if name == PEER_SCANVI else [])]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment()).stdout
    return dict(json.loads(printed.strip().splitlines()[-1]))


def rows(
    options: argparse.Namespace, have: set[tuple[str, str, str, int]], keep: Callable[[dict[str, Any]], None]
) -> None:
    """Measure what `have` lacks, seed by seed, and `keep` each row as it is done."""
    methods = [PEER, PEER_SCANVI, *METHODS] if options.peer_python else list(METHODS)
    for seed in options.seeds:
        for name in options.only or EPOCHS:
            if name not in EPOCHS:
                continue
            split = Split(name, seed, options.splits / f"{name}_hvg.h5ad", options.work, options.gmt)
            for method in options.methods or methods:
                if (TASK, name, method, seed) in have:
                    continue
                row = peer(options.peer_python, split, method) if method in PEERS else measured(split, method)
                keep({"task": TASK, "split": name, "method": method, **row, "seed": seed})


def table(rows: list[Row]) -> str:
    """Means over seeds, each of ours below its original; then the differences, and ours by classifier."""
    lines = [
        f"| split | method | seeds | {' | '.join(c.replace('macro_f1', 'F1') for c in COLUMNS + NUMBERS)} |",
        "|" + "---|" * (3 + len(COLUMNS + NUMBERS)),
    ]
    methods = [name for ours, method in METHODS.items() for name in (method.original, ours) if name]
    for split in EPOCHS:
        for name in (HARMONY, *methods):
            found = of(rows, split, name)
            if found:
                cells = [mean(found, c, ".3f") for c in COLUMNS] + [mean(found, c, ".1f") for c in NUMBERS]
                lines.append(f"| {split} | {name} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *differences(rows), "", *by_classifier(rows)])


def of(rows: list[Row], split: str, method: str | None) -> list[Row]:
    return [row for row in rows if (row["split"], row["method"]) == (split, method)]


def mean(found: list[Row], column: str, form: str) -> str:
    values = [row[column] for row in found if column in row]
    return format(float(np.mean(values)), form) if values else ""


def differences(rows: list[Row]) -> list[str]:
    """Ours minus the original in points: means over seeds of each split, averaged over the splits that both have."""
    lines = ["| ours - original, points | " + " | ".join(COLUMNS) + " | splits |", "|" + "---|" * (2 + len(COLUMNS))]
    for name, method in METHODS.items():
        both = [(of(rows, split, method.original), of(rows, split, name)) for split in EPOCHS]
        both = [(theirs, ours) for theirs, ours in both if theirs and ours]
        if not both:
            continue
        cells = []
        for column in COLUMNS:
            gaps = [
                np.mean([r[column] for r in ours]) - np.mean([r[column] for r in theirs])
                for theirs, ours in both
                if all(column in r for r in theirs + ours)
            ]
            cells.append(f"{100 * np.mean(gaps):+.1f}" if gaps else "")
        lines.append(f"| {name} | {' | '.join(cells)} | {len(both)} |")
    return lines


def by_classifier(rows: list[Row]) -> list[str]:
    """Accuracy / F1 of each method of ours with each classifier: means over seeds, averaged over the splits."""
    lines = [
        "| accuracy / F1 | " + " | ".join(CLASSIFIERS) + " | splits, seeds |",
        "|" + "---|" * (2 + len(CLASSIFIERS)),
    ]
    for name in METHODS:
        found = [of_split for split in EPOCHS if (of_split := of(rows, split, name))]
        cells = []
        for classifier in CLASSIFIERS:
            both = [
                [mean(of_split, f"{score}_{classifier}", "") for of_split in found]
                for score in ("accuracy", "macro_f1")
            ]
            there = found and all(all(one) for one in both)
            cells.append(" / ".join(f"{np.mean([float(value) for value in one]):.3f}" for one in both) if there else "")
        if found:
            lines.append(f"| {name} | {' | '.join(cells)} | {len(found)}, {min(map(len, found))} |")
    return lines
