"""One run of scvi-tools' SCVI or SCANVI surgery on a split, in scvi-tools' own environment; prints one JSON line.

Called by ``benchmarks/quality.py``; imports nothing of scarcade. Settings: the scArches recipe of the baseline.
"""

import argparse
import json
import time
import warnings


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("h5ad")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--scanvi", action="store_true", help="go on from SCVI to SCANVI, as the baseline did")
    options = parser.parse_args()

    import anndata as ad
    import scvi
    import torch
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.neighbors import KNeighborsClassifier

    torch.set_num_threads(1)
    scvi.settings.seed = options.seed
    scvi.settings.verbosity = 40
    data = ad.read_h5ad(options.h5ad)
    query = data[data.obs["query"].to_numpy(bool)].copy()
    reference = data[~data.obs["query"].to_numpy(bool)].copy()
    for part in (reference, query):
        part.obs["batch"] = part.obs["batch"].astype(str).astype("category")

    quiet = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False}
    begin = time.process_time()
    scvi.model.SCVI.setup_anndata(reference, batch_key="batch")
    model = scvi.model.SCVI(
        reference, n_layers=2, use_layer_norm="both", use_batch_norm="none", encode_covariates=True, dropout_rate=0.2
    )
    model.train(max_epochs=options.epochs, batch_size=128, accelerator="cpu", **quiet)
    kind = scvi.model.SCVI
    if options.scanvi:
        kind = scvi.model.SCANVI
        model = kind.from_scvi_model(model, "unknown", labels_key="lab")
        model.train(max_epochs=20, n_samples_per_label=100, batch_size=128, accelerator="cpu", **quiet)
        query.obs["known"], query.obs["lab"] = query.obs["lab"].astype(str), "unknown"
    trained = time.process_time()
    latent = model.get_latent_representation(reference)
    mapped_from = time.process_time()
    surgery = kind.load_query_data(query, model)
    surgery.train(
        max_epochs=options.epochs, batch_size=128, plan_kwargs={"weight_decay": 0.0}, accelerator="cpu", **quiet
    )
    row = {
        "seed": options.seed,
        "query_elbo": float(surgery.get_elbo(query)),
        "query_reconstruction": float(surgery.get_reconstruction_error(query)["reconstruction_loss"]),
        "reference_cpu_s": trained - begin,
        "query_cpu_s": time.process_time() - mapped_from,
    }
    mapped = surgery.get_latent_representation(query)
    truth = query.obs["known" if options.scanvi else "lab"].astype(str).to_numpy()
    guesses = {"own": surgery.predict(query)} if options.scanvi else {}
    for k in (15, 50):
        knn = KNeighborsClassifier(n_neighbors=k, weights="distance")
        guesses[f"k{k}"] = knn.fit(latent, reference.obs["lab"].astype(str).to_numpy()).predict(mapped)
    for name, predicted in guesses.items():
        row[f"accuracy_{name}"] = float(accuracy_score(truth, predicted))
        # over the classes that the query has: one stray guess of another class must not count as a class missed
        row[f"macro_f1_{name}"] = float(f1_score(truth, predicted, average="macro", labels=sorted(set(truth))))
    print(json.dumps(row))


if __name__ == "__main__":
    main()
