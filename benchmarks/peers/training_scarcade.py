"""One training of ours, streamed from a store, in a process of its own; prints one JSON object (`timing`)."""

import argparse
import statistics
from collections.abc import Mapping
from functools import partial
from typing import Any

import scarcade  # noqa: F401 - before torch: it sets how OpenMP's threads wait, which torch reads once

# isort: split
import torch
from timing import Timer, answer, programs

from scarcade.dataloaders.labelled import with_labelled
from scarcade.dataloaders.loader import LoaderConfig, stream
from scarcade.dataloaders.store import open_store
from scarcade.dataloaders.stratified import stratified
from scarcade.engine.contracts import Loader
from scarcade.engine.loop import fit
from scarcade.engine.optim import OptimConfig
from scarcade.engine.world import World, use_threads
from scarcade.models import MODELS


def train(name: str, options: argparse.Namespace) -> dict[str, float]:
    use_threads(options.threads)
    kind, store = MODELS[name], open_store(options.data)
    settings: dict[str, Any] = {}
    if name in ("scvi", "scanvi", "totalvi"):
        settings["gene_likelihood"] = options.likelihood
    elif name in ("trvae", "expimap"):
        settings["recon_loss"] = options.likelihood
    if name == "expimap":
        settings["programs"] = programs(options.programs)
    config = LoaderConfig(batch_size=options.batch, gpu_memory=0 if options.streamed else None)
    defaults = kind.training_defaults(store.n_cells)
    device = torch.device("cuda", 0) if options.gpu else torch.device("cpu")
    cells = stream(store, "train", config, seed=0, device=device, proteins=kind.sees_proteins)
    if defaults.get("data", {}).get("stratify"):  # as the original draws them, too
        cells = stratified(cells, seed=0)
    loader: Loader = with_labelled(cells, config, seed=0) if kind.labelled_beside else cells
    timer, waits = Timer(), []

    def told(line: Mapping[str, Any]) -> None:  # its means were read: a GPU has done all of the epoch
        if line["of"] == "epoch":
            timer.end()
            waits.append(line["wait"])

    fit(
        kind(kind.Config(**settings), store.schema, seed=0),
        loader,
        None,
        OptimConfig(**{**defaults.get("optim", {}), "epochs": options.epochs, "products": options.products}),
        world=World(device=device),
        progress=told,
    )
    waited = {"wait": statistics.median(waits[1:])} if waits[1:] else {}
    return timer.result(loader.n_cells) | waited


if __name__ == "__main__":
    answer({name: partial(train, name) for name in MODELS})
