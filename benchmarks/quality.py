"""Quality of scVI surgery beside scvi-tools on the baseline's splits: label accuracy, reconstruction, ELBO.

    python -m benchmarks.quality --splits FOLDER [--peer-python PYTHON] [--only mixology] [--seeds 0 1 2]

Same cells, genes, epochs, recipe (zinb, two layers, layer norm, encoded covariates, dropout 0.2, batch 128) and
classifier (scikit-learn's KNeighborsClassifier weighted by distance) for both. Rows that
``benchmarks/results/quality.json`` already holds are kept, so the long table can be made in parts.
"""

import argparse
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "quality.json"
EPOCHS = {"mixology": 100, "pbmc": 80, "pbmc_clean": 80}
RECIPE = {
    "n_layers": 2,
    "use_layer_norm": "both",
    "use_batch_norm": "none",
    "encode_covariates": True,
    "dropout_rate": 0.2,
    "gene_likelihood": "zinb",
}


def ours(h5ad: Path, epochs: int, seed: int, work: Path) -> dict[str, float]:
    """One reference and one query, by the functions behind `scarcade ingest`, `train` and `map`."""
    import anndata as ad
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.neighbors import KNeighborsClassifier

    import scarcade as sca

    data = ad.read_h5ad(h5ad)
    is_query = data.obs["query"].to_numpy(bool)
    name = h5ad.stem
    reference_file, query_file = work / f"{name}_reference.h5ad", work / f"{name}_query.h5ad"
    data[~is_query].copy().write_h5ad(reference_file)
    data[is_query].copy().write_h5ad(query_file)

    store = work / f"{name}-{seed}.zarr"
    sca.ingest([reference_file], store, batch_key="batch", label_keys=["lab"], seed=seed)
    begin = time.process_time()
    sca.train(
        store,
        model="scvi",
        out=work / f"{name}-{seed}",
        epochs=epochs,
        batch_size=128,
        seed=seed,
        workers=0,
        threads=1,
        settings={"model": RECIPE, "data": {"validation": 0.1}},
        progress=lambda line: None,
    )
    trained = time.process_time()
    model_folder = work / f"{name}-{seed}" / "model"
    out = work / f"{name}-{seed}-mapped"
    sca.map_queries(
        model_folder,
        [query_file],
        out,
        batch_key="batch",
        label_key=["lab"],
        epochs=epochs,
        batch_size=128,
        seed=seed,
        workers=0,
        threads=1,
        report={"picture": "pca"},
    ).raise_if_failed()
    mapped = time.process_time()

    reference = sca.load(model_folder)
    latent = reference.get_latent_representation(reference_file)
    surgery = sca.load(model_folder, delta=out / f"{query_file.stem}.delta")
    result = ad.read_h5ad(out / f"{query_file.stem}.h5ad")
    row = {
        "seed": seed,
        "reference_elbo": float(reference.get_elbo(reference_file)),
        "query_elbo": float(surgery.get_elbo(query_file)),
        "query_reconstruction": float(surgery.get_reconstruction_error(query_file)["reconstruction_loss"]),
        "reference_cpu_s": trained - begin,
        "query_cpu_s": mapped - trained,
    }
    known = data.obs["lab"].astype(str).to_numpy()
    truth = result.obs["lab"].astype(str).to_numpy()
    for k in (15, 50):
        knn = KNeighborsClassifier(n_neighbors=k, weights="distance").fit(latent, known[~is_query])
        predicted = knn.predict(result.obsm["X_scVI"])
        row[f"accuracy_k{k}"] = float(accuracy_score(truth, predicted))
        row[f"macro_f1_k{k}"] = float(f1_score(truth, predicted, average="macro", labels=sorted(set(truth))))
    return row


def peer(python: Path, h5ad: Path, epochs: int, seed: int) -> dict[str, float]:
    """The same by scvi-tools, in its own interpreter."""
    script = Path(__file__).parent / "peers" / "scvi_quality.py"
    command = [str(python), str(script), str(h5ad), "--epochs", str(epochs), "--seed", str(seed)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(json.loads(printed.strip().splitlines()[-1]))


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds as a Markdown table, ours beside the peer's."""
    columns = ["accuracy_k15", "accuracy_k50", "macro_f1_k15", "macro_f1_k50"]
    numbers = ["query_reconstruction", "query_elbo", "reference_cpu_s", "query_cpu_s"]
    lines = [
        f"| split | method | seeds | {' | '.join(columns + numbers)} |",
        "|" + "---|" * (3 + len(columns + numbers)),
    ]
    for split in EPOCHS:
        for method in ("scvi-tools SCVI", "scarcade scvi"):
            chosen = [r for r in rows if r["split"] == split and r["method"] == method]
            if not chosen:
                continue
            cells = [f"{np.mean([r[c] for r in chosen]):.3f}" for c in columns]
            cells += [f"{np.mean([r[c] for r in chosen]):.1f}" for c in numbers]
            lines.append(f"| {split} | {method} | {len(chosen)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=Path, required=True, help="folder with NAME_hvg.h5ad (obs: batch, lab, query)")
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has scvi-tools 1.4.2")
    parser.add_argument("--only", nargs="+", choices=sorted(EPOCHS), default=list(EPOCHS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, required=True, help="an empty folder for stores, runs and results")
    options = parser.parse_args()

    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    have = {(r["split"], r["method"], r["seed"]) for r in rows}
    RESULTS.parent.mkdir(exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    for split in options.only:
        h5ad = options.splits / f"{split}_hvg.h5ad"
        for seed in options.seeds:
            for method in ("scvi-tools SCVI", "scarcade scvi"):
                if (split, method, seed) in have or (method == "scvi-tools SCVI" and options.peer_python is None):
                    continue
                if method == "scvi-tools SCVI":
                    row = peer(options.peer_python, h5ad, EPOCHS[split], seed)
                else:
                    row = ours(h5ad, EPOCHS[split], seed, options.work)
                rows.append({"split": split, "method": method, **row})
                RESULTS.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
                print(f"{split} seed {seed} {method}: {row}", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
