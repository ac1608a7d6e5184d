"""Trains a reference on a store: resolves the configuration, runs the loop, leaves a model. Resumes by itself."""

import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
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
from scarcade.engine.config import checked, merged, nested
from scarcade.engine.contracts import Categories, Loader, Schema, Shard
from scarcade.engine.errors import DataChangedError, UsageError
from scarcade.engine.gradients import running_statistics
from scarcade.engine.interrupts import interruptible
from scarcade.engine.launch import Worker, run
from scarcade.engine.loop import fit
from scarcade.engine.metrics import Line, epoch_lines
from scarcade.engine.optim import final_kl_weight
from scarcade.engine.state import FitResult
from scarcade.engine.storage import Mirror, is_url
from scarcade.jobs.cells import distinct
from scarcade.jobs.embed import write_latent
from scarcade.jobs.latent import LATENT
from scarcade.jobs.mislabelled import contradicted_in
from scarcade.jobs.programs import programs_given
from scarcade.jobs.run_folder import MODEL, RunFolder
from scarcade.jobs.train_config import TrainConfig, resolved, to_toml
from scarcade.jobs.trained import Trained, load
from scarcade.jobs.update import Update, Weights, update_of
from scarcade.models import MODELS
from scarcade.models.model import AtlasModel
from scarcade.models.saved import read, save
from scarcade.models.surgery import trainable

__all__ = ["TrainConfig", "TrainedRun", "resolved", "train", "work"]

Progress = Callable[[Mapping[str, Any]], None]
"""Given ``{"note": sentence}``, ``{"warning": sentence}``, or a line of metrics with `epochs` and `steps_per_epoch`."""


@dataclass
class TrainedRun:
    """A run that is over."""

    path: Path | str  # the run's folder, or its URL
    stopped: str  # "epochs", "steps" or "early"
    history: list[Line] = field(repr=False)  # one line of metrics for each epoch

    @cached_property
    def model(self) -> Trained:
        """The trained model, read from ``<path>/model``."""
        if not is_url(self.path):
            return load(Path(self.path) / MODEL)
        with tempfile.TemporaryDirectory() as scratch:
            Mirror(str(self.path)).pull(MODEL, Path(scratch) / MODEL)
            return load(Path(scratch) / MODEL)


def train(
    data: str | Path | Store,
    model: str | None = None,
    *,
    out: str | Path,
    recipe: str | None = None,
    init_from: str | Path | None = None,
    update: str | Path | None = None,
    update_weights: Weights | None = None,
    min_genes: float | None = None,
    programs: Sequence[str | Path] | Mapping[str, Sequence[str]] | None = None,
    seed: int = 0,
    epochs: int | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
    threads: int | None = None,
    batch_key: str | None = None,
    label_key: str | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> TrainedRun:
    """Train a model on a store, and leave it in ``out/model``. The same call again continues an unfinished run.

    Args:
        data: the store, or its path.
        model: its name; "scvi", or with `update` that of the reference.
        out: folder of the run, or a URL that Ray takes.
        recipe: "scarches" gives the architecture that surgery wants.
        programs: .gmt files with gene programs, or a mapping from names to genes (expimap).
        init_from: folder of a trained model to start from (scanvi: an scvi model); its architecture is taken over.
        update: folder of a trained reference that is to know the cells of `data` too; what it is, its genes and its
            codes stay. `update_weights` "surgery" trains the rows of new batches alone, "all" everything.
        min_genes: share of the reference's genes that the store must have.
        epochs, batch_size, workers, threads: short for the fields of `TrainConfig` of those names.
        batch_key, label_key: must be those of the store, if given.
        settings: further fields, as a tree (``{"optim": {"lr": 1e-3}}``) or dotted (``{"optim.lr": 1e-3}``).

    Raises:
        UsageError: a setting that does not exist, cannot be, or differs from what the run began with.
        DataChangedError: the store is not the one that the run began with.
        BusyError: another process works on the run. ClusterError, StorageError, CheckpointError: as they say.
        NonFiniteError: the loss was not finite; nothing was updated.
    """
    store = data if isinstance(data, Store) else open_store(data)
    _check_keys(store.schema, batch_key, label_key)
    direct: dict[str, Any] = {"optim.epochs": epochs, "data.batch_size": batch_size}
    direct |= {"scale.workers": workers, "scale.threads": threads}
    direct["model.programs"] = programs_given(programs)
    direct["init_from"] = None if init_from is None else str(Path(init_from).absolute())
    direct["update"] = None if update is None else str(Path(update).absolute())
    direct |= {"update_weights": update_weights, "min_genes": min_genes}
    given = merged(nested(settings or {}), nested({k: v for k, v in direct.items() if v is not None}))
    tell = progress or _plain
    folder = RunFolder(out)
    try:
        folder.fetch()
        begun = {} if (lanes := folder.lanes()) is None else {"data": {"lanes": lanes}}
        config = resolved(merged(begun, given), name=model, recipe=recipe, seed=seed, store=store)
        change = _update(config, store)
        with folder.locked():
            folder.sweep()
            folder.settle(to_toml(config), {"data": LoaderConfig().model_dump(mode="json")})
            done = _finished(folder, store, config, change)
            if done is None:
                for sentence in _notices(config, store, change):
                    tell({"note": sentence})
                done = _train(folder, store, config, tell)
                folder.fetch()
            else:
                tell({"note": f"{folder.place} is trained already ({done['epochs']} epochs); more with --epochs"})
            history = epoch_lines(list(folder.metrics.read()))
    finally:
        folder.close()
    return TrainedRun(folder.place if folder.mirror else folder.local, done["stopped"], history)


def _check_keys(schema: Schema, batch_key: str | None, label_key: str | None) -> None:
    if batch_key is not None and batch_key != schema.batch.name:
        raise UsageError(f"--batch-key {batch_key}: the store was made with --batch-key {schema.batch.name}")
    first = schema.labels[0].name if schema.labels else None
    if label_key is not None and label_key != first:
        raise UsageError(f"--label-key {label_key}: the first label column of the store is {first}")


def _build(config: TrainConfig, schema: Schema) -> AtlasModel:
    kind = MODELS[config.name]
    return kind(kind.Config.model_validate(config.model), schema, seed=config.seed)


def _update(config: TrainConfig, store: Store) -> Update | None:
    """The reference that is updated, and the store as it sees it."""
    if config.update is None:
        return None
    return update_of(config.update, store, weights=config.update_weights, min_genes=config.min_genes)


def _first(config: TrainConfig, schema: Schema, change: Update | None) -> AtlasModel:
    """The model with its first weights."""
    if change is not None:
        return change.grown(config.surgery, config.seed)
    model = _build(config, schema)
    if config.init_from is not None:
        model.start_from(read(config.init_from))
    return model


def _notices(config: TrainConfig, store: Store, change: Update | None = None) -> list[str]:
    """What a person should know before the run."""
    found = []
    optim = config.optim
    assert optim.epochs is not None
    n_train = store.n_cells - store.n_before(config.data.validation)
    steps = -(-n_train // config.data.batch_size)
    last = final_kl_weight(optim, epochs=optim.epochs, steps_per_epoch=steps, n_cells=n_train)
    if last < optim.kl_max:
        found.append(
            f"the KL weight reaches {last:.3g} of {optim.kl_max:g} in {optim.epochs} epochs (warm-up over "
            f"{optim.kl_epochs:g} epochs); for a full warm-up set --optim.kl_epochs {max(1, optim.epochs // 2)} "
            f"or --optim.kl_steps {max(1, optim.epochs * steps // 2)}"
            if optim.kl_epochs is not None and optim.kl_steps is None and optim.kl_cells is None
            else f"the KL weight reaches {last:.3g} of {optim.kl_max:g} before the run ends"
        )
    with torch.device("meta"):
        model = _build(config, store.schema if change is None else change.model.schema)
    if change is not None:
        found = [*change.notes(config.surgery), *found]
    labels = change.view.label_columns() if change is not None else _label_columns(store)
    if model.labelled_beside and not (labels[0][1] >= 0).any():
        found.append(f"no cell has a label, so the classifier of this {model.name} model learns nothing")
    found += [notice for notice in (model.data_notice, model.surgery_notice) if notice]
    if config.scale.workers > 1 and running_statistics(model):
        has_other = "scarches" in model.recipes and config.recipe != "scarches"
        without = "; layer norm (--recipe scarches) does not" if has_other else ""
        found.append(
            f"batch norm: each of the {config.scale.workers} workers normalises with its own part of the batch, so "
            f"results depend a little on their number{without}"
        )
    return found


def _label_columns(store: Store) -> list[tuple[Categories, np.ndarray]]:
    return [(one, store.codes(one.name)) for one in store.schema.labels]


def _finished(
    folder: RunFolder, store: Store, config: TrainConfig, change: Update | None = None
) -> dict[str, Any] | None:
    """How the run ended, if its model is there and no more was asked for.

    Raises:
        DataChangedError: it was trained on another store.
    """
    model = folder.model_record()
    if model is None:
        return None
    if model.get("data_fingerprint") != store.fingerprint:
        raise DataChangedError(
            f"--out {folder.place}: its model was trained on other data than {store.path}; give another --out"
        )
    if model.get("parent") != (None if change is None else change.model.fingerprint):
        raise DataChangedError(
            f"--out {folder.place}: its model was updated from another reference than {config.update}; give another "
            "--out"
        )
    record = dict(model.get("training", {}))
    more = record.get("asked_epochs") != config.optim.epochs or record.get("asked_steps") != config.optim.max_steps
    return None if more and record.get("stopped") != "early" else record


def _train(folder: RunFolder, store: Store, config: TrainConfig, tell: Progress) -> dict[str, Any]:
    """Run the loop where `config.scale` says; returns what `work` did."""
    arguments = {
        "config": config.model_dump(mode="json"),
        "data": str(store.path),
        "fingerprint": store.fingerprint,
        "out": folder.place,
    }
    with interruptible() as interrupts:
        done = run(work, arguments, config.scale, folder.place, tell=tell, interrupts=interrupts)
    if done["stopped"] == "interrupted":
        tell({"note": f"stopped at step {done['steps']}; the same command continues from there"})
        interrupts.pass_on()
    return done


def work(worker: Worker, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What each worker does: read its lanes, train, and on rank 0 write the model."""
    began = time.perf_counter()
    config = checked(TrainConfig, arguments["config"])
    store = open_store(arguments["data"])
    if store.fingerprint != arguments["fingerprint"]:
        raise DataChangedError(f"{store.path}: is not the same store on every machine of the cluster")
    assert config.data.lanes is not None
    change = _update(config, store)
    cells = store if change is None else change.view
    left_out = _left_out(worker, config, store)
    loaders: list[Loader] = [
        _stream(cells, split, config, worker.world.shard, left_out)
        for split in (("train", "validation") if store.n_before(config.data.validation) else ("train",))
    ]
    folder = RunFolder(arguments["out"])
    try:
        if worker.world.first:
            folder.fetch()
        model = _first(config, store.schema, change)
        if change is not None and not trainable(model):
            result = FitResult(history=[], steps=0, epochs=0, cells=0, stopped="epochs")
        else:
            result = fit(
                model,
                loaders[0],
                loaders[1] if len(loaders) > 1 else None,
                config.optim,
                world=worker.world,
                seed=config.seed,
                checkpoints=_checkpoints(worker, folder, config, store, change),
                metrics=folder.metrics,
                progress=worker.tell,
                stop=worker.stop,
            )
        record = _record(result, config, began)
        if worker.world.first:
            if result.stopped != "interrupted":
                _save(model, store, folder, record, worker, change)
            folder.publish_metrics()
        return record
    finally:
        folder.close()


def _left_out(worker: Worker, config: TrainConfig, store: Store) -> np.ndarray | None:
    """Cells whose label is not to be learnt (``data.edit_labels``), as bool (n cells of the store); None: no such."""
    if not config.data.edit_labels or config.init_from is None:
        return None
    found = contradicted_in(config.init_from, store, seed=config.seed)
    worker.tell({"note": f"labels of {found.sum():,} cells are not learnt: their neighbours have another"})
    return found


def _stream(
    store: Store | AlignedStore,
    split: Literal["train", "validation"],
    config: TrainConfig,
    shard: Shard,
    left_out: np.ndarray | None = None,
) -> Loader:
    """The cells of a split, as the model wants them."""
    loader = stream(store, split, config.data, seed=config.seed, shard=shard, lanes=config.data.lanes)
    if config.data.stratify and split == "train":
        loader = stratified(loader, seed=config.seed)
    if not MODELS[config.name].labelled_beside:
        return loader
    return with_labelled(loader, config.data, seed=config.seed, left_out=left_out)


def _checkpoints(
    worker: Worker, folder: RunFolder, config: TrainConfig, store: Store, change: Update | None
) -> Checkpoints:
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
    model = model.cpu()

    def latent(target: Path) -> None:
        cells = store if change is None else change.view
        loader = stream(cells, "all", LoaderConfig(batch_size=1024, validation=0), seed=0, lanes=1, shuffle=False)
        worker.tell({"note": f"embedding the {store.n_cells:,} cells of the data"})
        about: dict[str, Any] = {"data": store.fingerprint, "model_name": model.name}
        if change is None:
            batch, labels = store.codes(store.schema.batch.name), _label_columns(store)
        else:
            batch, labels = change.view.codes(change.view.batch), change.view.label_columns()
        before = None if change is None else change.kept(model.n_latent)
        if before is not None:
            about["before"] = before.about
        columns = distinct([(model.schema.batch, batch), *labels])
        write_latent(model, loader, target / LATENT, columns=columns, about=about, before=before)

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


def _plain(message: Mapping[str, Any]) -> None:
    """Without anybody who shows progress, warnings are warnings and the rest is silence."""
    if "warning" in message:
        warnings.warn(str(message["warning"]), UserWarning, stacklevel=2)
