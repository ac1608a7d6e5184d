"""A search by scvi.autotune in an environment of its own; writes one JSON object. Imports nothing of scarcade."""

import argparse
import json
import math
import warnings
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=8)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    import anndata
    import scvi
    from ray import tune
    from scvi.autotune import run_autotune

    data = anndata.read_h5ad(given.data)
    scvi.model.SCVI.setup_anndata(data, batch_key="batch")
    found = run_autotune(
        scvi.model.SCVI,
        data=data,
        metrics="elbo_validation",
        mode="min",
        search_space={
            "model_params": {
                "n_latent": tune.choice([5, 10, 20, 30]),
                "n_hidden": tune.choice([64, 128]),
                "n_layers": tune.choice([1, 2]),
            },
            "train_params": {
                "max_epochs": given.epochs,
                "plan_kwargs": {"lr": tune.loguniform(1e-4, 1e-2)},
                "accelerator": "cpu",
            },
        },
        num_samples=given.trials,
        scheduler="asha",
        scheduler_kwargs={"max_t": given.epochs, "grace_period": 1, "reduction_factor": 4},
        searcher="random",
        seed=0,
        resources={"cpu": 1},
        logging_dir=str(given.logs),
    )
    frames = [result.metrics_dataframe for result in found.result_grid]
    epochs = [0 if frame is None else len(frame) for frame in frames]
    values = [frame["elbo_validation"].min() for frame in frames if frame is not None]
    told = {
        "epochs": sum(epochs),
        "stopped": sum(n < given.epochs for n in epochs),
        "failed": sum(result.error is not None for result in found.result_grid),
        "best": round(float(min(value for value in values if math.isfinite(value))), 2),
    }
    given.out.write_text(json.dumps(told))


if __name__ == "__main__":
    main()
