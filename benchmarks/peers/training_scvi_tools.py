"""One training of scvi-tools, data in memory, in its own environment; prints one JSON object (`timing`)."""

import argparse
import warnings
from functools import partial
from typing import Any

from timing import Timer, answer


def train(name: str, options: argparse.Namespace) -> dict[str, float]:
    warnings.simplefilter("ignore")
    import anndata
    import scvi
    import torch
    from lightning.pytorch.callbacks import Callback

    torch.set_num_threads(options.threads)
    scvi.settings.seed = 0
    scvi.settings.verbosity = 40
    data = anndata.read_h5ad(options.data)
    kind = getattr(scvi.model, name.upper())
    setup: dict[str, Any] = {"batch_key": "batch"}
    if name == "scanvi":
        data.obs["label"] = data.obs["label"].cat.add_categories("unknown").fillna("unknown")
        setup |= {"labels_key": "label", "unlabeled_category": "unknown"}
    if name == "totalvi":
        setup["protein_expression_obsm_key"] = "protein_counts"
    kind.setup_anndata(data, **setup)
    model = kind(data, gene_likelihood=options.likelihood)
    timer = Timer()

    class Told(Callback):  # type: ignore[misc]
        def on_train_epoch_end(self, trainer: object, module: object) -> None:
            if options.gpu:
                torch.cuda.synchronize()
            timer.end()

    model.train(
        max_epochs=options.epochs,
        batch_size=options.batch,
        accelerator="gpu" if options.gpu else "cpu",
        enable_progress_bar=False,
        callbacks=[Told()],
        # either of them, both on by default, would have it validate after each epoch that is timed
        **({"early_stopping": False, "reduce_lr_on_plateau": False} if name == "totalvi" else {}),
    )
    return timer.result(len(model.train_indices))


if __name__ == "__main__":
    answer({name: partial(train, name) for name in ("scvi", "scanvi", "totalvi")})
