"""Architecture surgery: a frozen reference grown by rows for new conditions, which alone are trained.

Lotfollahi et al. 2022 (scArches). scvi-tools keeps whole weight matrices trainable and zeroes gradients
with hooks; here the reference's tensors do not require a gradient at all, so no optimiser can move them,
not even by weight decay, and what a query adds is a tensor of its own: `delta` is what a mapping stores.
New rows of one query do not touch those of another, so queries can be trained together as if alone.
"""

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from scarcade.engine.config import Section
from scarcade.engine.errors import CategoryError, GenesError, ModelFileError, UsageError
from scarcade.engine.schema import Categories, Schema
from scarcade.models.layers import GROWN, BatchNorm, Growable
from scarcade.models.model import AtlasModel

M = TypeVar("M", bound=AtlasModel)


class SurgeryConfig(Section):
    """How a query is trained onto a reference."""

    query_mode: Literal["eval", "train"] = Field(
        "eval",
        description="eval: no dropout, the reference's batch statistics (what scvi-tools does with today's "
        "lightning); train: dropout and the query's own batch statistics (the scArches paper)",
    )
    train_decoder_norm: bool = Field(
        False,
        description="also train the decoder's batch norm weights, as scvi-tools does; the latents of reference "
        "cells stay, but queries trained together are then no longer independent of each other",
    )
    model: dict[str, Any] = Field(
        {}, description="what the model itself adds for a query (expimap: n_ext, new_programs, ...)"
    )


def additions(reference: Schema, schema: Schema) -> dict[str, tuple[str, ...]]:
    """Covariate -> categories that `schema` has and `reference` has not, in code order.

    Raises:
        GenesError: other genes, or another order. CategoryError: other covariates, or changed old codes.
    """
    if schema.genes != reference.genes:
        raise GenesError(
            f"the query has {schema.n_genes} genes in an order of its own, the reference {reference.n_genes}: "
            "align the query to the reference's genes first"
        )
    if schema.labels and [c.values for c in schema.labels] != [c.values for c in reference.labels]:
        raise CategoryError("labels are fixed by the reference: the query's label columns must have the same values")
    if schema.continuous != reference.continuous or schema.size_factor != reference.size_factor:
        raise CategoryError(
            f"the reference was trained with the continuous covariates {list(reference.continuous)} and the size "
            f"factor {reference.size_factor!r}, the query has {list(schema.continuous)} and {schema.size_factor!r}"
        )
    if len(schema.categorical) != len(reference.categorical):
        raise CategoryError(
            f"the reference was trained with the categorical covariates {[c.name for c in reference.categorical]}, "
            f"the query has {[c.name for c in schema.categorical]}"
        )

    def new(old: Categories, grown: Categories) -> tuple[str, ...]:
        if grown.values[: len(old)] != old.values:
            raise CategoryError(f"'{old.name}': the query's categories must begin with the reference's, in its order")
        return grown.values[len(old) :]

    pairs = zip(reference.categorical, schema.categorical, strict=True)
    return {"batch": new(reference.batch, schema.batch)} | {
        f"categorical_{i}": new(old, grown) for i, (old, grown) in enumerate(pairs)
    }


def grow(model: M, schema: Schema, *, seed: int, config: SurgeryConfig | None = None, share: bool = False) -> M:
    """A copy of `model` for `schema`: every tensor frozen, with trainable rows for the new conditions.

    The copy stands in evaluation mode. A row's first weights are a pure function of (seed, layer, category).

    Labels and proteins are the reference's: a query has what it has of them.

    Args:
        share: the copy has the tensors of `model` itself, which are frozen: for many queries of one reference. Where
            `config` has more than rows move, it is a copy all the same.

    Raises:
        GenesError, CategoryError: as `additions`, or the model sees proteins and `schema` has others.
        UsageError: the model cannot add what `config.model` asks for.
    """
    config = config or SurgeryConfig()
    new = additions(model.schema, schema)
    if model.sees_proteins and schema.proteins not in ((), model.schema.proteins):
        raise GenesError(
            f"the query has {len(schema.proteins)} proteins in an order of its own, the reference "
            f"{len(model.schema.proteins)}: align the query to the reference's proteins first"
        )
    more = config.train_decoder_norm or config.model or config.query_mode == "train"  # which moves statistics
    grown = settled(model, share=share and not more)
    freeze(grown)
    grown.schema = replace(schema, labels=model.schema.labels, proteins=model.schema.proteins)
    for path, module in grown.named_modules():
        if isinstance(module, Growable):
            module.grow(new, seed, path)
    grown.after_growth()
    if config.model:
        grown.extend(config.model, seed=seed)
        grown.extension = dict(config.model)
    for module in grown.modules():
        if isinstance(module, BatchNorm):
            module.momentum = 0.0  # running statistics belong to the reference
    if config.train_decoder_norm:
        for tensor in decoder_norm(grown).values():
            tensor.requires_grad_(True)
    grown.query_mode, grown.is_grown = config.query_mode, True
    grown.eval()
    return grown


def settled(model: M, *, share: bool = False) -> M:
    """A copy in which grown rows are rows like any other, and everything can be trained.

    Nothing is shared; or, if `share` is asked for, all tensors but those of grown rows are, and are left as they are.
    """
    kept = (*model.parameters(), *model.buffers(), model.schema, model.record, model.config) if share else ()
    plain = copy.deepcopy(model, {id(one): one for one in kept})
    for module in plain.modules():
        if isinstance(module, Growable):
            module.settle()
        if isinstance(module, BatchNorm):
            module.momentum = module.MOMENTUM
    if not share:
        plain.requires_grad_(True)
    plain.query_mode = None
    plain.extension = {}
    plain.fingerprint = plain.record = None  # it is no longer what was read
    return plain


def freeze(model: nn.Module) -> None:
    """No parameter of `model` requires a gradient."""
    model.requires_grad_(False)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def decoder_norm(model: AtlasModel) -> dict[str, nn.Parameter]:
    """Weight and bias of the decoder's batch norms, by name."""
    return {n: p for n, p in model.named_parameters() if n.startswith(model.decoder_norms)}


def delta(model: nn.Module) -> dict[str, Tensor]:
    """What surgery added to the reference: new rows, new batches' library sizes, and what else was trained."""
    moved = trainable(model)
    return {
        name: tensor.detach().clone().contiguous()
        for name, tensor in model.state_dict().items()
        if name in moved or name.rsplit(".", 1)[-1].startswith(GROWN)
    }


def apply_delta(
    reference: M, tensors: Mapping[str, Tensor], schema: Schema, extension: Mapping[str, Any] | None = None
) -> M:
    """`reference` grown for `schema`, with the rows of a `delta`. The result is frozen, in evaluation mode.

    Args:
        extension: what `SurgeryConfig.model` was.

    Raises:
        ModelFileError: the delta is not one of this reference and schema.
    """
    try:
        grown = grow(reference, schema, seed=0, config=SurgeryConfig(model=dict(extension or {})))
    except UsageError as error:
        raise ModelFileError(f"the delta does not fit the reference: {error}") from error
    state = grown.state_dict()
    wanted = {name for name in state if name.rsplit(".", 1)[-1].startswith(GROWN)}
    allowed = wanted | set(decoder_norm(grown))
    if not wanted <= tensors.keys() or not tensors.keys() <= allowed:
        missing, surplus = sorted(wanted - tensors.keys()), sorted(tensors.keys() - allowed)
        raise ModelFileError(f"the delta does not fit the reference: missing {missing}, not expected {surplus}")
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            raise ModelFileError(
                f"the delta does not fit the reference: {name} is {tuple(tensor.shape)}, "
                f"{tuple(state[name].shape)} was expected"
            )
        with torch.no_grad():
            state[name].copy_(tensor)
    freeze(grown)
    return grown


def reference_hash(model: nn.Module) -> str:
    """sha256 over every tensor that surgery did not add: equal before and after the training of a query."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.numel() and not name.rsplit(".", 1)[-1].startswith(GROWN):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
