"""A reference as arrays and plain values, so that it goes once into Ray's object store and is built in each worker.

Workers need no path to it, on whatever node they are. The latent of its cells, which can be gigabytes, is not copied in
a worker: all workers of a node look at the same pages. Weights are copied, because what comes out of the object store
cannot be written to.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scarcade.engine.schema import Categories, Schema
from scarcade.jobs.label_transfer import LabelTransfer
from scarcade.jobs.latent import Latent
from scarcade.jobs.reference import Reference
from scarcade.models.saved import rebuilt

Packed = dict[str, Any]


def packed(reference: Reference) -> Packed:
    """`reference` without objects of ours."""
    model = reference.model
    return {
        "path": str(reference.path),
        "model": model.name,
        "config": model.config.model_dump(mode="json"),
        "schema": model.schema.to_dict(),
        "weights": {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()},
        "fingerprint": model.fingerprint,
        "record": dict(model.record or {}),
        "latent": None if reference.latent is None else _packed_latent(reference.latent),
        "transfer": None if reference.transfer is None else _packed_transfer(reference.transfer),
        "contradicted": dict(reference.contradicted),
    }


def unpacked(values: Mapping[str, Any]) -> Reference:
    """What `packed` was given. Arrays of the latent stay where they are."""
    weights = {name: torch.from_numpy(np.array(array)) for name, array in values["weights"].items()}
    schema = Schema.from_dict(values["schema"])
    model = rebuilt(values["model"], values["config"], schema, weights, where=values["path"])
    model.fingerprint, model.record = values["fingerprint"], dict(values["record"])
    latent, transfer = values["latent"], values["transfer"]
    found = None if latent is None else _latent(latent)
    return Reference(
        path=Path(values["path"]),
        model=model,
        latent=found,
        transfer=None if found is None or transfer is None else _transfer(transfer, found),
        contradicted=dict(values["contradicted"]),
    )


def n_bytes(values: Mapping[str, Any]) -> int:
    """Bytes of the arrays in `values`."""
    arrays = list(values["weights"].values())
    if values["latent"] is not None:
        arrays += [values["latent"]["mean"], values["latent"]["variance"], *values["latent"]["codes"]]
    if values["transfer"] is not None:
        arrays += values["transfer"]["codes"]
    return sum(int(array.nbytes) for array in arrays)


def _packed_latent(latent: Latent) -> Packed:
    return {
        "obsm_key": latent.obsm_key,
        "mean": latent.mean,
        "variance": latent.variance,
        "columns": [(column.name, column.values) for column, _ in latent.columns],
        "codes": [codes for _, codes in latent.columns],
        "about": dict(latent.about),
    }


def _latent(values: Mapping[str, Any]) -> Latent:
    columns = tuple(
        (Categories(name, tuple(known)), codes)
        for (name, known), codes in zip(values["columns"], values["codes"], strict=True)
    )
    return Latent(values["obsm_key"], values["mean"], values["variance"], columns, dict(values["about"]))


def _packed_transfer(transfer: LabelTransfer) -> Packed:
    return {
        "columns": [(column.name, column.values) for column, _ in transfer.columns],
        "codes": [np.asarray(codes) for _, codes in transfer.columns],
        "k": transfer.k,
        "weights": transfer.weights,
        "seed": transfer.seed,
        "usual": transfer.usual,
    }


def _transfer(values: Mapping[str, Any], latent: Latent) -> LabelTransfer:
    columns = [
        (Categories(name, tuple(known)), codes)
        for (name, known), codes in zip(values["columns"], values["codes"], strict=True)
    ]
    return LabelTransfer(
        latent.mean, columns, values["k"], values["weights"], values["seed"], usual=float(values["usual"])
    )
