"""One training of scVI in a process of its own, ours or scvi-tools'; prints one JSON object.

    PYTHON training.py ours|scvi_tools DATA.h5ad|DATA.zarr --batch 128 --likelihood zinb --epochs 5 --threads 2

The first epoch (compilation, first touch of memory) is left out of the time.
"""

import argparse
import json
import os
import resource
import time
import warnings


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


class Timer:
    """Wall and CPU seconds at the end of each epoch."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def end(self) -> None:
        self.ends.append((time.perf_counter(), cpu()))

    def result(self, cells: int, last: float) -> dict[str, float]:
        wall, used = (self.ends[-1][i] - self.ends[0][i] for i in (0, 1))
        seen = cells * (len(self.ends) - 1)
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {"cells_per_s": seen / wall, "cells_per_cpu_s": seen / used, "peak_mb": rss, "last": last}


def ours(options: argparse.Namespace) -> dict[str, float]:
    from scarcade.dataloaders.loader import LoaderConfig, stream
    from scarcade.dataloaders.store import open_store
    from scarcade.engine.loop import fit
    from scarcade.engine.optim import OptimConfig
    from scarcade.engine.world import use_threads
    from scarcade.models import Scvi

    use_threads(options.threads)
    store = open_store(options.data)
    loader = stream(store, "train", LoaderConfig(batch_size=options.batch), seed=0)
    timer = Timer()
    result = fit(
        Scvi(Scvi.Config(gene_likelihood=options.likelihood), store.schema, seed=0),
        loader,
        None,
        OptimConfig(epochs=options.epochs),
        progress=lambda line: timer.end() if line["of"] == "epoch" else None,
    )
    return timer.result(loader.n_cells, result.history[-1]["train/elbo"])


def scvi_tools(options: argparse.Namespace) -> dict[str, float]:
    warnings.simplefilter("ignore")
    import anndata
    import scvi
    import torch
    from lightning.pytorch.callbacks import Callback

    torch.set_num_threads(options.threads)
    scvi.settings.seed = 0
    scvi.settings.verbosity = 40
    data = anndata.read_h5ad(options.data)
    scvi.model.SCVI.setup_anndata(data, batch_key="batch")
    model = scvi.model.SCVI(data, gene_likelihood=options.likelihood)
    timer = Timer()

    class Told(Callback):  # type: ignore[misc]
        def on_train_epoch_end(self, trainer: object, module: object) -> None:
            timer.end()

    model.train(
        max_epochs=options.epochs,
        batch_size=options.batch,
        accelerator="cpu",
        enable_progress_bar=False,
        callbacks=[Told()],
    )
    elbo = model.history["elbo_train"]
    return timer.result(len(model.train_indices), float(elbo.iloc[-1].iloc[0]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("contender", choices=["ours", "scvi_tools"])
    parser.add_argument("data")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--likelihood", default="zinb")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    print(json.dumps({"ours": ours, "scvi_tools": scvi_tools}[options.contender](options)))


if __name__ == "__main__":
    main()
