"""Trains a reference on a store: resolves the configuration, runs the loop, leaves a model. Resumes by itself."""

import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import tomli_w
import torch
from pydantic import Field

from scarcade.dataloaders.labelled import with_labelled
from scarcade.dataloaders.loader import LoaderConfig, lanes_for, stream
from scarcade.dataloaders.store import Store, open_store
from scarcade.dataloaders.stratified import stratified
from scarcade.engine.checkpoint import CheckpointConfig, Checkpoints
from scarcade.engine.config import Section, checked, merged, nested
from scarcade.engine.contracts import Loader, Schema, Shard
from scarcade.engine.errors import DataChangedError, UsageError
from scarcade.engine.gradients import running_statistics
from scarcade.engine.interrupts import interruptible
from scarcade.engine.launch import Scale, Worker, run
from scarcade.engine.loop import fit
from scarcade.engine.metrics import Line, epoch_lines
from scarcade.engine.optim import OptimConfig, default_epochs, final_kl_weight
from scarcade.engine.state import FitResult
from scarcade.engine.storage import Mirror, is_url
from scarcade.jobs.cells import distinct
from scarcade.jobs.embed import write_latent
from scarcade.jobs.programs import programs_given, with_programs
from scarcade.jobs.run_folder import MODEL, RunFolder
from scarcade.jobs.trained import Trained, load
from scarcade.models import MODELS
from scarcade.models.model import AtlasModel
from scarcade.models.saved import read, save

Progress = Callable[[Mapping[str, Any]], None]
"""Given ``{"note": sentence}``, ``{"warning": sentence}``, or a line of metrics with `epochs` and `steps_per_epoch`."""


class TrainConfig(Section):
    """Everything that a training is made of: the sum of its parts."""

    name: str = Field("scvi", description="Which model.")
    recipe: str | None = Field(None, description="Named settings of the model that go before its defaults.")
    init_from: str | None = Field(None, description="Folder of a trained model whose weights are the first ones.")
    seed: int = Field(0, ge=0, description="Of the first weights, the order of the cells, and the noise.")
    model: dict[str, Any] = Field({}, description="The model's own settings.")
    data: LoaderConfig = LoaderConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    scale: Scale = Scale()


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
    model: str = "scvi",
    *,
    out: str | Path,
    recipe: str | None = None,
    init_from: str | Path | None = None,
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
        out: folder of the run, or a URL that Ray takes.
        recipe: "scarches" gives the architecture that surgery wants.
        programs: .gmt files with gene programs, or a mapping from names to genes (expimap).
        init_from: folder of a trained model to start from (scanvi: an scvi model); its architecture is taken over.
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
    given = merged(nested(settings or {}), nested({k: v for k, v in direct.items() if v is not None}))
    tell = progress or _plain
    folder = RunFolder(out)
    try:
        folder.fetch()
        begun = {} if (lanes := folder.lanes()) is None else {"data": {"lanes": lanes}}
        config = resolved(merged(begun, given), name=model, recipe=recipe, seed=seed, store=store)
        with folder.locked():
            folder.sweep()
            folder.settle(_toml(config))
            done = _finished(folder, store, config)
            if done is None:
                for sentence in _notices(config, store):
                    tell({"note": sentence})
                done = _train(folder, store, config, tell)
                folder.fetch()
            else:
                tell({"note": f"{folder.place} is trained already ({done['epochs']} epochs); more with --epochs"})
            history = epoch_lines(list(folder.metrics.read()))
    finally:
        folder.close()
    return TrainedRun(folder.place if folder.mirror else folder.local, done["stopped"], history)


def resolved(
    given: Mapping[str, Any], *, name: str = "scvi", recipe: str | None = None, seed: int = 0, store: Store
) -> TrainConfig:
    """The whole configuration, with what depends on the data and on the number of workers filled in.

    Raises:
        UsageError: naming each field that does not exist or has a value that it cannot have.
    """
    if name not in MODELS:
        raise UsageError(f"--model {name}: there is no such model; there are {', '.join(MODELS)}")
    kind = MODELS[name]
    if recipe is not None and recipe not in kind.recipes:
        there_are = f"there are {', '.join(kind.recipes)}" if kind.recipes else f"{name} has none"
        raise UsageError(f"--recipe {recipe}: there is no such recipe; {there_are}")
    given = merged(kind.training_defaults(store.n_cells, started=given.get("init_from") is not None), given)
    config = checked(TrainConfig, {**given, "name": name, "recipe": recipe, "seed": seed})
    architecture = merged(kind.recipes[recipe] if recipe else {}, config.model)
    if config.init_from is not None:
        architecture = _shared_with(config.init_from, kind, architecture)
    architecture = with_programs(architecture, store.schema.genes)
    try:
        own = checked(kind.Config, architecture)
    except UsageError as error:
        raise UsageError(str(error).replace("--", "--model.")) from error
    with torch.device("meta"):  # to have what the model itself says of its configuration, before anything starts
        kind(own, store.schema)
    return config.model_copy(
        update={
            "model": own.model_dump(mode="json", exclude_none=True),
            "data": config.data.model_copy(update={"lanes": config.data.lanes or lanes_for(config.scale.workers)}),
            "optim": config.optim.model_copy(update={"epochs": config.optim.epochs or default_epochs(store.n_cells)}),
        }
    )


def _shared_with(init_from: str, kind: type[AtlasModel], architecture: Mapping[str, Any]) -> dict[str, Any]:
    """`architecture`, with the fields that must be those of the model to start from.

    Raises:
        UsageError: a setting that was given differs from that model's.
    """
    shared = kind.config_from(read(init_from))
    for name, value in shared.items():
        if name in architecture and architecture[name] != value:
            raise UsageError(
                f"--model.{name.replace('_', '-')} {architecture[name]}: the model in --init-from {init_from} was "
                f"trained with {value}; leave the setting out"
            )
    return {**architecture, **shared}


def _toml(config: TrainConfig) -> str:
    """The configuration as ``--config`` takes it: the model's name stands in the table of its settings."""
    raw = config.model_dump(mode="json", exclude_none=True)
    raw["model"] = {"name": raw.pop("name"), **raw["model"]}
    return tomli_w.dumps(raw)


def _check_keys(schema: Schema, batch_key: str | None, label_key: str | None) -> None:
    if batch_key is not None and batch_key != schema.batch.name:
        raise UsageError(f"--batch-key {batch_key}: the store was made with --batch-key {schema.batch.name}")
    first = schema.labels[0].name if schema.labels else None
    if label_key is not None and label_key != first:
        raise UsageError(f"--label-key {label_key}: the first label column of the store is {first}")


def _build(config: TrainConfig, schema: Schema) -> AtlasModel:
    kind = MODELS[config.name]
    return kind(kind.Config.model_validate(config.model), schema, seed=config.seed)


def _first(config: TrainConfig, schema: Schema) -> AtlasModel:
    """The model with its first weights."""
    model = _build(config, schema)
    if config.init_from is not None:
        model.start_from(read(config.init_from))
    return model


def _notices(config: TrainConfig, store: Store) -> list[str]:
    """What a person should know before the run."""
    found = []
    optim = config.optim
    assert optim.epochs is not None
    n_train = store.n_cells - store.n_before(config.data.validation)
    steps = -(-n_train // config.data.batch_size)
    last = final_kl_weight(optim, epochs=optim.epochs, steps_per_epoch=steps, n_cells=n_train)
    if last < optim.kl_max:
        found.append(
            f"the KL weight reaches {last:.3g} of {optim.kl_max:g} in {optim.epochs} epochs, as in scvi-tools (warm-up "
            f"over {optim.kl_epochs:g} epochs); for a full warm-up set --optim.kl_epochs {max(1, optim.epochs // 2)} "
            f"or --optim.kl_steps {max(1, optim.epochs * steps // 2)}"
            if optim.kl_epochs is not None and optim.kl_steps is None and optim.kl_cells is None
            else f"the KL weight reaches {last:.3g} of {optim.kl_max:g} before the run ends"
        )
    with torch.device("meta"):
        model = _build(config, store.schema)
    if model.labelled_beside and not (store.codes(store.schema.labels[0].name) >= 0).any():
        found.append(f"no cell has a label, so the classifier of this {model.name} model learns nothing")
    if notice := model.surgery_notice:
        found.append(notice)
    if config.scale.workers > 1 and running_statistics(model):
        found.append(
            f"batch norm: each of the {config.scale.workers} workers normalises with its own part of the batch, so "
            "results depend a little on their number; layer norm (--recipe scarches) does not"
        )
    return found


def _finished(folder: RunFolder, store: Store, config: TrainConfig) -> dict[str, Any] | None:
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
    loaders: list[Loader] = [
        _stream(store, split, config, worker.world.shard)
        for split in (("train", "validation") if store.n_before(config.data.validation) else ("train",))
    ]
    folder = RunFolder(arguments["out"])
    try:
        if worker.world.first:
            folder.fetch()
        model = _first(config, store.schema)
        result = fit(
            model,
            loaders[0],
            loaders[1] if len(loaders) > 1 else None,
            config.optim,
            world=worker.world,
            seed=config.seed,
            checkpoints=_checkpoints(worker, folder, config, store),
            metrics=folder.metrics,
            progress=worker.tell,
            stop=worker.stop,
        )
        record = _record(result, config, began)
        if worker.world.first:
            if result.stopped != "interrupted":
                _save(model, store, folder, record, worker)
            folder.publish_metrics()
        return record
    finally:
        folder.close()


def _stream(store: Store, split: Literal["train", "validation"], config: TrainConfig, shard: Shard) -> Loader:
    """The cells of a split, as the model wants them."""
    loader = stream(store, split, config.data, seed=config.seed, shard=shard, lanes=config.data.lanes)
    if config.data.stratify and split == "train":
        loader = stratified(loader, seed=config.seed)
    return with_labelled(loader, config.data, seed=config.seed) if MODELS[config.name].labelled_beside else loader


def _checkpoints(worker: Worker, folder: RunFolder, config: TrainConfig, store: Store) -> Checkpoints:
    def announce(path: Path | None, step: int) -> None:
        if worker.world.first:
            folder.publish_metrics()
        if worker.announce is not None:
            worker.announce(path, step)

    return Checkpoints(
        folder.checkpoints,
        config.checkpoint,
        about={
            "data": store.fingerprint,
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


def _save(model: AtlasModel, store: Store, folder: RunFolder, record: Mapping[str, Any], worker: Worker) -> None:
    """The model, and beside it the latent of the reference's cells."""

    def latent(target: Path) -> None:
        loader = stream(store, "all", LoaderConfig(batch_size=1024, validation=0), seed=0, lanes=1, shuffle=False)
        worker.tell({"note": f"embedding the {store.n_cells:,} cells of the reference"})
        write_latent(
            model,
            loader,
            target / "latent.zarr",
            columns=distinct([(one, store.codes(one.name)) for one in (store.schema.batch, *store.schema.labels)]),
            about={"data": store.fingerprint, "model_name": model.name},
        )

    save(
        model.cpu(),
        folder.model,
        training=record,
        data_fingerprint=store.fingerprint,
        replace=True,
        beside=latent,
    )
    folder.publish_model()


def _plain(message: Mapping[str, Any]) -> None:
    """Without anybody who shows progress, warnings are warnings and the rest is silence."""
    if "warning" in message:
        warnings.warn(str(message["warning"]), UserWarning, stacklevel=2)
