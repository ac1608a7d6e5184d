"""The configuration of a training: what was given, resolved against the data and the model that it starts from."""

from collections.abc import Mapping
from typing import Any

import tomli_w
import torch
from pydantic import Field

from scarcade.dataloaders.loader import LoaderConfig, lanes_for
from scarcade.dataloaders.store import Store
from scarcade.engine.checkpoint import CheckpointConfig
from scarcade.engine.config import Section, checked, merged
from scarcade.engine.curves import LogConfig
from scarcade.engine.errors import UsageError
from scarcade.engine.launch import Scale
from scarcade.engine.optim import OptimConfig, default_epochs
from scarcade.jobs.own_settings import check_labelled, own_settings
from scarcade.jobs.update import Weights, training_defaults
from scarcade.models import MODELS
from scarcade.models.model import AtlasModel
from scarcade.models.saved import read
from scarcade.models.surgery import SurgeryConfig


class TrainConfig(Section):
    """Everything that a training is made of: the sum of its parts."""

    name: str = Field("scvi", description="Which model.")
    recipe: str | None = Field(None, description="Named settings of the model that go before its defaults.")
    init_from: str | None = Field(None, description="Folder of a trained model whose weights are the first ones.")
    update: str | None = Field(None, description="Folder of a trained reference that is updated with the data.")
    update_weights: Weights = Field("surgery", description="Which weights of it train: rows of new batches, or all.")
    min_genes: float = Field(0.5, ge=0, le=1, description="Share of its genes that the data must have.")
    seed: int = Field(0, ge=0, description="Of the first weights, the order of the cells, and the noise.")
    model: dict[str, Any] = Field({}, description="The model's own settings.")
    data: LoaderConfig = LoaderConfig()
    optim: OptimConfig = OptimConfig()
    surgery: SurgeryConfig = SurgeryConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    scale: Scale = Scale()
    log: LogConfig = LogConfig()


def resolved(
    given: Mapping[str, Any],
    *,
    name: str | None = None,
    recipe: str | None = None,
    seed: int = 0,
    store: Store,
    reference: AtlasModel | None = None,
) -> TrainConfig:
    """The whole configuration, with what depends on the data and on the number of workers filled in.

    Args:
        reference: the model at ``update``, if it is read already.

    Raises:
        UsageError: naming each field that does not exist or has a value that it cannot have.
    """
    if given.get("update") is not None:
        reference = reference or read(given["update"])
        return _filled(_updated(given, reference, name=name, recipe=recipe, seed=seed, store=store), store)
    for option in ("update_weights", "min_genes", "surgery"):
        if option in given:
            raise UsageError(f"--{option.replace('_', '-')}: is for updating a reference (--update MODEL)")
    name = name or "scvi"
    if name not in MODELS:
        raise UsageError(f"--model {name}: there is no such model; there are {', '.join(MODELS)}")
    kind = MODELS[name]
    if recipe is not None and recipe not in kind.recipes:
        there_are = f"there are {', '.join(kind.recipes)}" if kind.recipes else f"{name} has none"
        raise UsageError(f"--recipe {recipe}: there is no such recipe; {there_are}")
    started = given.get("init_from") is not None
    of_recipe = kind.training_recipes.get(recipe or "", {})
    given = merged(merged(kind.training_defaults(store.n_cells, started=started), of_recipe), given)
    config = checked(TrainConfig, {**given, "name": name, "recipe": recipe, "seed": seed})
    architecture = merged(kind.recipes[recipe] if recipe else {}, config.model)
    if config.data.edit_labels and (config.init_from is None or not kind.labelled_beside):
        raise UsageError(
            "--data.edit-labels (a part of --recipe transfer): is for --model scanvi with --init-from MODEL, in whose "
            "latent neighbours are sought"
        )
    check_labelled(config.data, kind)
    if config.init_from is not None:
        architecture = _shared_with(config.init_from, kind, architecture)
    if "programs" in architecture and "programs" not in kind.Config.model_fields:
        raise UsageError(f"--programs: {name} has no gene programs (--model expimap has)")
    architecture = own_settings(kind, architecture, store.schema.genes, "model")
    own = checked(kind.Config, architecture, prefix="model.")
    with torch.device("meta"):  # to have what the model itself says of its configuration, before anything starts
        kind(own, store.schema)
    return _filled(config.model_copy(update={"model": own.model_dump(mode="json", exclude_none=True)}), store)


def _filled(config: TrainConfig, store: Store) -> TrainConfig:
    """With what depends on the number of workers and of cells."""
    lanes, epochs = config.data.lanes, config.optim.epochs
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"lanes": lanes or lanes_for(config.scale.workers)}),
            "optim": config.optim.model_copy(update={"epochs": epochs or default_epochs(store.n_cells)}),
        }
    )


def _updated(
    given: Mapping[str, Any],
    reference: AtlasModel,
    *,
    name: str | None,
    recipe: str | None,
    seed: int,
    store: Store,
) -> TrainConfig:
    """The configuration of an update, whose architecture is that of the reference.

    Raises:
        UsageError: a setting that the reference fixes, or that cannot stand beside --update.
    """
    for option, value in (("recipe", recipe), ("init-from", given.get("init_from"))):
        if value is not None:
            raise UsageError(f"--{option} {value}: the reference given by --update has its architecture and weights")
    if given.get("data", {}).get("edit_labels"):
        raise UsageError("--data.edit-labels: is for --init-from MODEL; an update takes the labels as they are")
    weights = checked(TrainConfig, {key: given[key] for key in ("update_weights",) if key in given}).update_weights
    if name is not None and name != reference.name:
        raise UsageError(f"--model {name}: the reference given by --update {given['update']} is {reference.name}")
    own = reference.config.model_dump(mode="json", exclude_none=True)
    for key, value in given.get("model", {}).items():
        if value != own.get(key) and str(value) != str(own.get(key)):
            raise UsageError(
                f"--model.{key.replace('_', '-')} {value}: the reference given by --update was trained with "
                f"{own.get(key)}; leave the setting out"
            )
    for defaults in reversed(training_defaults(reference, weights, store.n_cells)):
        given = merged(defaults, given)
    surgery = dict(given.get("surgery", {}))
    if isinstance(surgery.get("model"), Mapping):
        surgery["model"] = own_settings(type(reference), surgery["model"], reference.schema.genes, "surgery.model")
    config = checked(TrainConfig, {**given, "surgery": surgery, "name": reference.name, "seed": seed, "model": own})
    check_labelled(config.data, type(reference))
    if weights == "all":
        for field in ("query_mode", "train_decoder_norm"):
            value = getattr(config.surgery, field)
            if value != SurgeryConfig.model_fields[field].default:  # the default stands in the run's own config.toml
                raise UsageError(
                    f"--surgery.{field.replace('_', '-')} {value}: is for --update-weights surgery; with all, all "
                    "weights train, as in a training from the start"
                )
    return config


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


def to_toml(config: TrainConfig) -> str:
    """The configuration as ``--config`` takes it: the model's name stands in the table of its settings."""
    raw = config.model_dump(mode="json", exclude_none=True)
    if config.update is None:
        raw = {name: value for name, value in raw.items() if name not in ("update_weights", "min_genes", "surgery")}
    raw["model"] = {"name": raw.pop("name"), **raw["model"]}
    return tomli_w.dumps(raw)
