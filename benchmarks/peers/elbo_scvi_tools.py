"""scvi-tools' SCVI trained on given cells; prints the negative ELBO of the held-out ones as one JSON line.

Called by ``benchmarks/elbo.py`` in scvi-tools' own environment; imports nothing of scarcade.
"""

import argparse
import json
import warnings


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("h5ad")
    parser.add_argument("rows", help=".npz: rows to train on and to validate on")
    parser.add_argument("--likelihood", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args()

    import anndata as ad
    import numpy as np
    import scvi
    import torch

    torch.set_num_threads(1)
    scvi.settings.seed = options.seed
    scvi.settings.verbosity = 40
    data, rows = ad.read_h5ad(options.h5ad), np.load(options.rows)
    scvi.model.SCVI.setup_anndata(data, batch_key="batch")
    model = scvi.model.SCVI(data, gene_likelihood=options.likelihood)
    model.train(
        max_epochs=options.epochs,
        batch_size=options.batch,
        datasplitter_kwargs={"external_indexing": [rows["train"], rows["validation"]]},
        accelerator="cpu",
        enable_progress_bar=False,
        logger=False,
        enable_checkpointing=False,
    )
    print("\n" + json.dumps({"elbo": abs(float(model.get_elbo(indices=rows["validation"])))}))


if __name__ == "__main__":
    main()
