"""What each worker of a training does: read its part of the cells, train, and on rank 0 leave the model."""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from scarcade.dataloaders.aligned import AlignedStore
from scarcade.dataloaders.labelled import with_labelled
from scarcade.dataloaders.loader import LoaderConfig, stream
from scarcade.dataloaders.store import Store, open_store
from scarcade.dataloaders.stratified import stratified
from scarcade.engine.checkpoint import Checkpoints
from scarcade.engine.compiling import told_of_compiling
from scarcade.engine.config import checked
from scarcade.engine.contracts import Loader
from scarcade.engine.errors import DataChangedError
from scarcade.engine.launch import Worker
from scarcade.engine.loop import fit
from scarcade.engine.schema import Categories, Schema
from scarcade.engine.state import FitResult
from scarcade.engine.world import World
from scarcade.jobs.cells import distinct
from scarcade.jobs.embed import write_latent
from scarcade.jobs.latent import LATENT
from scarcade.jobs.mislabelled import contradicted_in
from scarcade.jobs.profiled import Profiled
from scarcade.jobs.run_curves import run_curves
from scarcade.jobs.run_folder import RunFolder
from scarcade.jobs.train_config import TrainConfig
from scarcade.jobs.update import Update, update_of
from scarcade.models import MODELS
from scarcade.models.model import AtlasModel
from scarcade.models.saved import read, save
from scarcade.models.surgery import trainable


def work(worker: Worker, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What each worker does: read its lanes, train, and on rank 0 write the model."""
    began = time.perf_counter()
    config = checked(TrainConfig, arguments["config"])
    store = open_store(arguments["data"], cache=(config.data.cache, config.data.cache_gb))
    if store.fingerprint != arguments["fingerprint"]:
        raise DataChangedError(f"{store.where}: is not the same store on every machine of the cluster")
    assert config.data.lanes is not None
    change = update_in(config, store)
    folder = RunFolder(arguments["out"])
    since = arguments.get("profile")
    profiled = None if since is None else Profiled(worker.world, folder, since)
    try:
        if worker.world.first:
            folder.fetch()
        model, loaders = prepared(worker, config, store, change)
        if change is not None and not trainable(model):
            result = FitResult(history=[], steps=0, epochs=0, cells=0, stopped="epochs")
        else:
            with (
                told_of_compiling(lambda sentence: worker.tell({"note": sentence}))
                if worker.world.first
                else nullcontext(),
                run_curves(config, folder, worker.tell, first=worker.world.first) as curves,
            ):
                result = fit(
                    model,
                    loaders[0],
                    loaders[1] if len(loaders) > 1 else None,
                    config.optim,
                    world=worker.world,
                    seed=config.seed,
                    checkpoints=checkpoints_in(worker, folder, config, store, change),
                    metrics=folder.metrics,
                    progress=curves.progress,
                    stop=worker.stop,
                    watch=None if profiled is None else profiled.watch,
                )
                curves.ended = "interrupted" if result.stopped == "interrupted" else "finished"
        if profiled is not None:
            profiled.trained(loaders[0])
        record = _record(result, config, began)
        if worker.world.first:
            if result.stopped != "interrupted":
                _save(model, store, folder, record, worker, change)
            folder.publish_metrics()
        if profiled is not None:
            record |= {"profile": profiled.written(saved=result.stopped != "interrupted")}
        return record
    finally:
        folder.close()


def prepared(
    worker: Worker, config: TrainConfig, store: Store, change: Update | None
) -> tuple[AtlasModel, list[Loader]]:
    """The model with its first weights, and this worker's cells: of training, and of validation where there are any."""
    cells = store if change is None else change.view
    left_out = _left_out(worker, config, store)
    splits: tuple[Literal["train", "validation"], ...] = ("train",)
    if store.n_before(config.data.validation):
        splits = ("train", "validation")
    loaders = [_stream(cells, split, config, worker.world, left_out) for split in splits]
    return _first(config, store.schema, change), loaders


def built(config: TrainConfig, schema: Schema) -> AtlasModel:
    """A new model with first weights of its own."""
    kind = MODELS[config.name]
    return kind(kind.Config.model_validate(config.model), schema, seed=config.seed)


def update_in(config: TrainConfig, store: Store, reference: AtlasModel | None = None) -> Update | None:
    """The reference that is updated (read, if it is not given), and the store as it sees it; None: nothing is."""
    if config.update is None:
        return None
    return update_of(config.update, store, weights=config.update_weights, min_genes=config.min_genes, model=reference)


def _first(config: TrainConfig, schema: Schema, change: Update | None) -> AtlasModel:
    """The model with its first weights."""
    if change is not None:
        return change.grown(config.surgery, config.seed)
    model = built(config, schema)
    if config.init_from is not None:
        model.start_from(read(config.init_from))
    return model


def label_columns(store: Store) -> list[tuple[Categories, np.ndarray]]:
    """Each label column of the store with the codes of all cells."""
    return [(one, store.codes(one.name)) for one in store.schema.labels]


def _left_out(worker: Worker, config: TrainConfig, store: Store) -> np.ndarray | None:
    """Cells whose label is not to be learnt (``data.edit_labels``), as bool (n cells of the store); None: no such."""
    if not config.data.edit_labels or config.init_from is None:
        return None
    world = worker.world
    own = contradicted_in(config.init_from, store, seed=config.seed, shard=world.shard)
    # each worker sought its part; the sum is the same for all of them, whatever their machines make of a near tie
    found: np.ndarray = world.sum(torch.from_numpy(own.astype(np.uint8)).to(world.device)).cpu().numpy() > 0
    if world.first:
        worker.tell({"note": f"labels of {found.sum():,} cells are not learnt: their neighbours have another"})
    return found


def _stream(
    store: Store | AlignedStore,
    split: Literal["train", "validation"],
    config: TrainConfig,
    world: World,
    left_out: np.ndarray | None = None,
) -> Loader:
    """The cells of a split, as the model wants them, where it wants them."""
    loader = stream(
        store,
        split,
        config.data,
        seed=config.seed,
        shard=world.shard,
        lanes=config.data.lanes,
        device=world.device,
        proteins=MODELS[config.name].sees_proteins,
    )
    if config.data.stratify and split == "train":
        loader = stratified(loader, seed=config.seed)
    if not MODELS[config.name].labelled_beside:
        return loader
    return with_labelled(loader, config.data, seed=config.seed, left_out=left_out)


def checkpoints_in(
    worker: Worker, folder: RunFolder, config: TrainConfig, store: Store, change: Update | None
) -> Checkpoints:
    """Where the run in `folder` commits and resumes."""

    def announce(path: Path | None, step: int) -> None:
        if worker.world.first:
            folder.publish_metrics()
        if worker.announce is not None:
            worker.announce(path, step)

    return Checkpoints(
        folder.checkpoints,
        config.checkpoint,
        about={
            "data": store.fingerprint if change is None else f"{store.fingerprint} {change.model.fingerprint}",
            "seed": config.seed,
            "lanes": config.data.lanes,
            "workers": config.scale.workers,
            "config": config.model_dump(mode="json"),
        },
        world=worker.world,
        mirror=folder.mirror,
        announce=announce,
        found=lambda state: worker.tell(
            {"note": f"continuing from the checkpoint of step {state['step']:,} (epoch {state['epoch'] + 1})"}
        ),
        warn=lambda sentence: worker.tell({"warning": sentence.removeprefix("warning: ")}),
    )


def _record(result: FitResult, config: TrainConfig, began: float) -> dict[str, Any]:
    """What is worth knowing of the training, beside the model."""
    return {
        "stopped": result.stopped,
        "epochs": result.epochs,
        "steps": result.steps,
        "cells": result.cells,
        "asked_epochs": config.optim.epochs,
        "asked_steps": config.optim.max_steps,
        "seconds": round(time.perf_counter() - began, 1),
        "last": result.history[-1] if result.history else {},
        "config": config.model_dump(mode="json"),
    }


def _save(
    model: AtlasModel,
    store: Store,
    folder: RunFolder,
    record: Mapping[str, Any],
    worker: Worker,
    change: Update | None,
) -> None:
    """The model, and beside it the latent of its cells: of an update those of the reference before the new ones."""
    model, device = model.cpu(), worker.world.device

    def latent(target: Path) -> None:
        cells = store if change is None else change.view
        config = LoaderConfig(batch_size=1024, validation=0)
        where: dict[str, Any] = {"device": device, "proteins": model.sees_proteins}
        loader = stream(cells, "all", config, seed=0, lanes=1, shuffle=False, **where)
        worker.tell({"note": f"embedding the {store.n_cells:,} cells of the data"})
        about: dict[str, Any] = {"data": store.fingerprint, "model_name": model.name}
        if change is None:
            batch, labels = store.codes(store.schema.batch.name), label_columns(store)
        else:
            batch, labels = change.view.codes(change.view.batch), change.view.label_columns()
        before = None if change is None else change.kept(model.n_latent)
        if before is not None:
            about["before"] = before.about
        columns = distinct([(model.schema.batch, batch), *labels])
        write_latent(model.to(device), loader, target / LATENT, columns=columns, about=about, before=before)

    save(
        model,
        folder.model,
        training=record,
        data_fingerprint=store.fingerprint,
        lineage=[] if change is None else change.lineage(),
        replace=True,
        beside=latent,
    )
    folder.publish_model()
