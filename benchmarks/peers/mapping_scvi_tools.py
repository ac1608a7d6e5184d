"""Surgery of scvi-tools, one query after the other, in its own environment; prints one JSON object a line.

    PYTHON benchmarks/peers/mapping_scvi_tools.py train REFERENCE.h5ad --out FOLDER --epochs 20 [--labels label]
    PYTHON benchmarks/peers/mapping_scvi_tools.py map REFERENCE.h5ad QUERIES --model FOLDER --epochs 100

`train` makes a reference by the scArches recipe and saves it with scvi-tools' own `save`, whence ``scarcade import``
reads it. `map` does for each .h5ad in the folder QUERIES what the tutorials of scvi-tools do, labels included, and
prints a line for each, the sum last. The clock begins after the imports. Imports nothing of scarcade.
"""

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False, "enable_checkpointing": False}
K = 50


def train(given: argparse.Namespace) -> None:
    import anndata as ad
    import scvi

    reference = ad.read_h5ad(given.reference)
    scvi.model.SCVI.setup_anndata(reference, batch_key="batch", labels_key=given.labels)
    model = scvi.model.SCVI(
        reference,
        n_layers=2,
        dropout_rate=0.2,
        encode_covariates=True,
        use_layer_norm="both",
        use_batch_norm="none",
        gene_likelihood="nb",
    )
    began = time.perf_counter()
    model.train(max_epochs=given.epochs, batch_size=128, train_size=given.train_size, **QUIET)
    model.save(given.out, overwrite=True)
    print(json.dumps({"seconds": round(time.perf_counter() - began, 2), "cells": reference.n_obs}))


def map_(given: argparse.Namespace) -> None:
    import anndata as ad
    import numpy as np
    import scvi
    from sklearn.neighbors import KNeighborsClassifier

    cells = ad.read_h5ad(given.reference)
    began, used = time.perf_counter(), time.process_time()
    model = scvi.model.SCVI.load(given.model, adata=cells, accelerator="cpu")
    latent, classifier = model.get_latent_representation(), None
    if given.labels:
        classifier = KNeighborsClassifier(n_neighbors=K, weights="distance")
        classifier.fit(latent, cells.obs[given.labels].astype(str).to_numpy())
    if given.latents:
        given.latents.mkdir(parents=True, exist_ok=True)
        np.save(given.latents / "reference.npy", latent)
    saving, accuracies, n_cells = 0.0, [], 0
    for path in sorted(given.queries.glob("*.h5ad")):
        start = time.perf_counter()
        query = ad.read_h5ad(path)
        query.obs["batch"] = path.stem  # as `scarcade map` does without --batch-key
        scvi.model.SCVI.prepare_query_anndata(query, model)
        surgery = scvi.model.SCVI.load_query_data(query, model, accelerator="cpu")
        surgery.train(
            max_epochs=given.epochs,
            batch_size=128,
            train_size=1.0,
            plan_kwargs={"weight_decay": 0.0},
            **QUIET,
        )
        mapped = surgery.get_latent_representation()
        row: dict[str, Any] = {"name": path.stem, "cells": query.n_obs}
        if classifier is not None:
            predicted = classifier.predict(mapped)
            row["accuracy"] = round(float((predicted == query.obs[given.labels].astype(str).to_numpy()).mean()), 4)
            accuracies.append(row["accuracy"])
        row["seconds"] = round(time.perf_counter() - start, 3)
        n_cells += query.n_obs
        print(json.dumps(row), flush=True)
        if given.latents:
            start = time.perf_counter()
            np.save(given.latents / f"{path.stem}.npy", mapped)
            saving += time.perf_counter() - start
    print(
        json.dumps(
            {
                "seconds": round(time.perf_counter() - began - saving, 2),
                "cpu_s": round(time.process_time() - used, 2),
                "cells": n_cells,
                "accuracy": round(float(np.mean(accuracies)), 4) if accuracies else None,
            }
        )
    )


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "map"])
    parser.add_argument("reference", type=Path, help=".h5ad with obs batch")
    parser.add_argument("queries", type=Path, nargs="?", help="map: folder of .h5ad")
    parser.add_argument("--model", type=Path, help="map: folder that train has written")
    parser.add_argument("--out", type=Path, help="train: folder of the model")
    parser.add_argument("--labels", help="column of obs with labels")
    parser.add_argument("--latents", type=Path, help="map: write latents to this folder")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--train-size", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()

    import scvi
    import torch

    torch.set_num_threads(given.threads)
    scvi.settings.seed = given.seed
    scvi.settings.verbosity = 40
    {"train": train, "map": map_}[given.what](given)


if __name__ == "__main__":
    main()
