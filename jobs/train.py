"""Trains a reference on a store: resolves the configuration, runs the loop, leaves a model. Resumes by itself."""

import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from scarcade.dataloaders.loader import LoaderConfig
from scarcade.dataloaders.store import Store, open_store
from scarcade.engine.config import checked, merged, nested
from scarcade.engine.errors import DataChangedError, UsageError
from scarcade.engine.gradients import running_statistics
from scarcade.engine.interrupts import interruptible
from scarcade.engine.launch import run
from scarcade.engine.metrics import Line, epoch_lines
from scarcade.engine.optim import final_kl_weight
from scarcade.engine.precision import slow_in_bfloat16
from scarcade.engine.schema import Schema
from scarcade.engine.storage import Mirror, is_url
from scarcade.jobs.mislabelled import check_latent
from scarcade.jobs.profiled import profile_table
from scarcade.jobs.programs import programs_given
from scarcade.jobs.run_curves import check_targets, run_curves
from scarcade.jobs.run_folder import MODEL, RunFolder
from scarcade.jobs.train_config import TrainConfig, resolved, to_toml
from scarcade.jobs.train_work import built, label_columns, update_in, work
from scarcade.jobs.trained import Trained, load
from scarcade.jobs.update import Update, Weights
from scarcade.models.model import AtlasModel
from scarcade.models.saved import read

__all__ = ["TrainedRun", "train"]

# What runs of older versions, whose file does not say it, were trained with.
_OLDER = {"data": LoaderConfig().model_dump(mode="json"), "optim": {"products": "float32"}}

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
    profile: bool | float = False,
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
        profile: write where the time goes to ``out/profile.json`` and a trace to ``out/profile``, and tell it as a
            note; a time (as ``time.time()`` gives it): counted from then.

    Raises:
        UsageError: a setting that does not exist, cannot be, or differs from what the run began with.
        DataChangedError: the store is not the one that the run began with.
        BusyError: another process works on the run. ClusterError, StorageError, CheckpointError: as they say.
        NonFiniteError: the loss was not finite; nothing was updated.
    """
    since = None if profile is False else time.time() if profile is True else float(profile)
    own = checked(LoaderConfig, nested(settings or {}).get("data", {}), prefix="data.")
    store = data if isinstance(data, Store) else open_store(data, cache=(own.cache, own.cache_gb))
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
        known = None if given.get("update") is None else read(given["update"])
        config = resolved(merged(begun, given), name=model, recipe=recipe, seed=seed, store=store, reference=known)
        if config.data.edit_labels and config.init_from is not None:
            check_latent(config.init_from, store)
        check_targets(config.log, folder)
        change = update_in(config, store, known)
        with folder.locked():
            folder.sweep()
            folder.settle(to_toml(config), _OLDER)
            done = _finished(folder, store, config, change)
            if done is None:
                for sentence in _notices(config, store, change):
                    tell({"note": sentence})
                done = _train(folder, store, config, tell, since)
                folder.fetch()
            else:
                tell({"note": f"{folder.place} is trained already ({done['epochs']} epochs); more with --epochs"})
                with run_curves(config, folder, tell) as curves:  # which may lack lines, or be new
                    curves.ended = "finished"
                folder.publish_metrics()
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
            f"{optim.kl_epochs:g} epochs); for a full warm-up set --optim.kl-epochs {max(1, optim.epochs // 2)} "
            f"or --optim.kl-steps {max(1, optim.epochs * steps // 2)}"
            if optim.kl_epochs is not None and optim.kl_steps is None and optim.kl_cells is None
            else f"the KL weight reaches {last:.3g} of {optim.kl_max:g} before the run ends"
        )
    with torch.device("meta"):
        model = built(config, store.schema if change is None else change.model.schema)
    if change is not None:
        found = [*change.notes(config.surgery), *found]
    labels = change.view.label_columns() if change is not None else label_columns(store)
    if model.labelled_beside and not (labels[0][1] >= 0).any():
        found.append(f"no cell has a label, so the classifier of this {model.name} model learns nothing")
    found += [notice for notice in (model.data_notice, model.surgery_notice) if notice]
    if optim.products == "bfloat16" and not config.scale.gpus and slow_in_bfloat16():
        found.append(
            "this processor has no units for bfloat16 (AMX, AVX-512 BF16), so products in it take many times as long "
            "as in float32; leave out --optim.products bfloat16, unless the workers are on other machines"
        )
    return [*found, *normalises_apart(config, model)]


def normalises_apart(config: TrainConfig, model: AtlasModel) -> list[str]:
    """That results depend on the number of workers, where they do."""
    if config.scale.workers < 2 or not running_statistics(model):
        return []
    has_other = "scarches" in model.recipes and config.recipe != "scarches"
    without = "; layer norm (--recipe scarches) does not" if has_other else ""
    return [
        f"batch norm: each of the {config.scale.workers} workers normalises with its own part of the batch, so "
        f"results depend a little on their number{without}"
    ]


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
            f"--out {folder.place}: its model was trained on other data than {store.where}; give another --out"
        )
    if model.get("parent") != (None if change is None else change.model.fingerprint):
        raise DataChangedError(
            f"--out {folder.place}: its model was updated from another reference than {config.update}; give another "
            "--out"
        )
    record = dict(model.get("training", {}))
    more = record.get("asked_epochs") != config.optim.epochs or record.get("asked_steps") != config.optim.max_steps
    return None if more and record.get("stopped") != "early" else record


def _train(
    folder: RunFolder, store: Store, config: TrainConfig, tell: Progress, profile: float | None
) -> dict[str, Any]:
    """Run the loop where `config.scale` says; returns what `work` did."""
    arguments = {
        "config": config.model_dump(mode="json"),
        "data": store.place,
        "fingerprint": store.fingerprint,
        "out": folder.place,
        "profile": profile,
    }
    with interruptible() as interrupts:
        done = run(work, arguments, config.scale, folder.place, tell=tell, interrupts=interrupts)
    if done.get("profile") is not None:
        tell({"note": profile_table(done["profile"])})
    if done["stopped"] == "interrupted":
        tell({"note": f"stopped at step {done['steps']}; the same command continues from there"})
        interrupts.pass_on()
    return done


def _plain(message: Mapping[str, Any]) -> None:
    """Without anybody who shows progress, warnings are warnings and the rest is silence."""
    if "warning" in message:
        warnings.warn(str(message["warning"]), UserWarning, stacklevel=2)
