"""Models and deltas on disk: weights as safetensors, everything else as JSON, a manifest over both.

A model folder is data and never a program: no pickle is written, and none is read. Every byte is checked
against the manifest before a tensor is made (`weights`), the model is built without memory first, and takes the
file's tensors only where name, shape and type agree.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from torch import Tensor

from scarcade import __version__
from scarcade.engine.config import Section
from scarcade.engine.errors import ModelFileError, UsageError
from scarcade.engine.schema import Categories, Schema
from scarcade.models import MODELS
from scarcade.models.card import model_card
from scarcade.models.model import AtlasModel
from scarcade.models.surgery import additions, apply_delta, settled
from scarcade.models.surgery import delta as delta_of
from scarcade.models.weights import DELTA, MODEL, read_weights, write_weights

FORMAT = 1


class ModelRecord(Section):
    """The content of ``model.json``."""

    format: int
    kind: str
    model: str = Field(max_length=64)
    config: dict[str, Any]
    schema_: dict[str, Any] = Field(alias="schema")
    training: dict[str, Any]
    data_fingerprint: str | None
    parent: str | None  # fingerprint of the reference that this model was grown from
    lineage: tuple[dict[str, Any], ...] = ()  # every ancestor, the oldest first; see `lineage_after`
    scarcade_version: str


def save(
    model: AtlasModel,
    folder: Path,
    *,
    training: Mapping[str, Any],
    data_fingerprint: str | None,
    lineage: Sequence[Mapping[str, Any]] = (),
    replace: bool = False,
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Write `model` to `folder`, complete or not at all. Rows that surgery added become rows like any other.

    Args:
        training: what is worth knowing about the training; JSON.
        data_fingerprint: of the store or the loader that the model was trained on.
        lineage: as `lineage_after` gives it, for a model that was grown from another.
        beside: is given the unfinished folder, to write more files that are to stand in its manifest.

    Raises:
        StorageError: the folder exists and `replace` is not set, or cannot be written.
        ModelFileError: a weight is not finite.
    """
    plain = settled(model)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in plain.state_dict().items()}
    record = {
        "format": FORMAT,
        "kind": MODEL,
        "model": plain.name,
        "config": plain.config.model_dump(mode="json"),
        "schema": plain.schema.to_dict(),
        "training": dict(training),
        "data_fingerprint": data_fingerprint,
        "parent": lineage[-1]["fingerprint"] if lineage else None,
        "lineage": [dict(one) for one in lineage],
        "scarcade_version": __version__,
    }
    write_weights(folder, MODEL, tensors, record, model_card(plain, record), replace=replace, beside=beside)


def lineage_after(reference: AtlasModel, update: str, new: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """The lineage of a model that came of `reference`: that of the reference, and the reference itself.

    Args:
        update: "surgery" or "all", which weights were trained. new: covariate -> values that were added.
    """
    record = reference.record or {}
    own = {
        "fingerprint": reference.fingerprint,
        "data_fingerprint": record.get("data_fingerprint"),
        "scarcade_version": record.get("scarcade_version"),
        "update": update,
        "new": {name: list(values) for name, values in new.items()},
    }
    return [*map(dict, record.get("lineage", ())), own]


def read(folder: str | Path) -> AtlasModel:
    """The model in `folder`, in evaluation mode, with its `fingerprint` and `record`.

    Raises:
        UnsafeFileError: a pickle, which could run code (`scarcade import` reads those of scvi-tools safely).
        OpenError: not a folder of ours. CorruptError: a byte differs from what was written.
        ModelFileError: intact, but of another version or class, or tensors that do not fit.
    """
    folder = Path(folder)
    tensors, raw, fingerprint = read_weights(folder, MODEL)
    try:
        record = ModelRecord.model_validate(raw)
    except ValidationError as error:
        raise ModelFileError(f"{folder}: model.json is not a model's: {_reasons(error)}") from error
    _known(folder, record.format, record.model)
    schema = Schema.from_dict(record.schema_)
    check_schema(schema, str(folder))
    model = rebuilt(record.model, record.config, schema, tensors, where=str(folder))
    model.fingerprint = fingerprint
    model.record = record.model_dump(by_alias=True)
    return model


def rebuilt(
    name: str, config: Mapping[str, Any], schema: Schema, tensors: Mapping[str, Tensor], *, where: str
) -> AtlasModel:
    """The model of the class `name` that takes `tensors` as its weights, in evaluation mode.

    Raises:
        ModelFileError: the architecture is not valid, or not that of the tensors; `where` is named.
    """
    kind = MODELS[name]
    try:
        checked = kind.Config.model_validate(config)
    except ValidationError as error:
        raise ModelFileError(f"{where}: the architecture in model.json is not valid: {_reasons(error)}") from error
    with torch.device("meta"):  # sizes in a file cost nothing until they are known to agree with its tensors
        try:
            model = kind(checked, schema)
        except (UsageError, RuntimeError) as error:
            raise ModelFileError(f"{where}: {error}") from error
    _fits(where, tensors, model.state_dict())
    model.load_state_dict(tensors, strict=True, assign=True)
    model.requires_grad_(True)
    model.eval()
    return model


def save_delta(
    model: AtlasModel, folder: Path, *, parent: str, training: Mapping[str, Any], replace: bool = False
) -> None:
    """Write what surgery added to the reference with fingerprint `parent`: kilobytes.

    Raises:
        StorageError, ModelFileError: as `save`.
    """
    tensors = {name: tensor.cpu() for name, tensor in delta_of(model).items()}
    record = {
        "format": FORMAT,
        "kind": DELTA,
        "model": model.name,
        "parent": parent,
        # the genes and labels are the reference's
        "batch": {"name": model.schema.batch.name, "values": model.schema.batch.values},
        "categorical": [{"name": c.name, "values": c.values} for c in model.schema.categorical],
        "extension": dict(model.extension),
        "training": dict(training),
        "scarcade_version": __version__,
    }
    card = (
        f"# What a query added to a {model.name} reference\n\nOnly the rows of the query's new conditions. Apply it "
        f"with `scarcade.models.saved.read_delta(folder, reference)` on the reference with fingerprint `{parent}`.\n"
    )
    write_weights(folder, DELTA, tensors, record, card, replace=replace)


def read_delta(folder: str | Path, reference: AtlasModel) -> AtlasModel:
    """`reference` with the rows of the delta in `folder`, frozen, in evaluation mode.

    Raises:
        ModelFileError: the delta belongs to another reference. Else as `read`.
    """
    folder = Path(folder)
    tensors, raw, fingerprint = read_weights(folder, DELTA)
    try:
        _known(folder, raw["format"], raw["model"])
        if raw["parent"] != reference.fingerprint:
            raise ModelFileError(
                f"{folder}: was made on the reference {raw['parent']}, the one given is {reference.fingerprint}"
            )

        def categories(one: Mapping[str, Any]) -> Categories:
            return Categories(str(one["name"]), tuple(map(str, one["values"])))

        batch, categorical = categories(raw["batch"]), [categories(one) for one in raw["categorical"]]
        extension = dict(raw.get("extension", {}))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ModelFileError(f"{folder}: delta.json is not a delta's ({error!r})") from error
    whole = reference.schema.to_dict() | {
        "batch": {"name": batch.name, "values": batch.values},
        "categorical": [{"name": c.name, "values": c.values} for c in categorical],
    }
    schema = Schema.from_dict(whole)
    check_schema(schema, str(folder))
    grown = apply_delta(reference, tensors, schema, extension)
    grown.fingerprint = fingerprint
    new = {name: values for name, values in additions(reference.schema, schema).items() if values}
    grown.record = {**raw, "lineage": lineage_after(reference, "surgery", new)}
    return grown


def check_schema(schema: Schema, where: str) -> None:
    """Names of genes, and values of every covariate, are there and unique.

    Raises:
        ModelFileError: they are not.
    """
    columns = [("genes", schema.genes)]
    columns += [(c.name, c.values) for c in (schema.batch, *schema.categorical, *schema.labels)]
    for name, values in columns:
        if len(set(values)) != len(values):
            raise ModelFileError(f"{where}: the values of {name} are not unique")
    if not schema.genes or not schema.batch.values:
        raise ModelFileError(f"{where}: a model needs at least one gene and one batch")


def _known(folder: Path, version: Any, model: Any) -> None:
    if version != FORMAT:
        raise ModelFileError(
            f"{folder}: has format {version!r}, this version of scarcade reads format {FORMAT}; "
            + ("update scarcade" if isinstance(version, int) and version > FORMAT else "save it again")
        )
    if model not in MODELS:
        raise ModelFileError(f"{folder}: is a model of the class {model!r}; known are {', '.join(MODELS)}")


def _fits(folder: str, tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    if tensors.keys() != wanted.keys():
        missing, surplus = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
        raise ModelFileError(f"{folder}: weights do not fit model.json: missing {missing}, not expected {surplus}")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape or tensor.dtype != wanted[name].dtype:
            raise ModelFileError(
                f"{folder}: weight {name} is {tuple(tensor.shape)} {tensor.dtype}, model.json asks for "
                f"{tuple(wanted[name].shape)} {wanted[name].dtype}"
            )


def _reasons(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False))
