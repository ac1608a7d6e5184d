"""A reference to map onto: the model, and what it carries of its own cells (their latent and labels)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import Field

from scarcade.engine.config import Section
from scarcade.engine.errors import ModelFileError
from scarcade.engine.schema import UNLABELLED, Schema
from scarcade.jobs.cached_model import local_model
from scarcade.jobs.label_transfer import LabelTransfer, Weights
from scarcade.jobs.latent import LATENT, Latent, read_latent
from scarcade.jobs.mislabelled import contradicted
from scarcade.models.model import AtlasModel
from scarcade.models.saved import read


class TransferConfig(Section):
    """How labels are carried over."""

    k: int = Field(50, ge=1, description="Neighbours in the reference that vote.")
    weights: Weights = Field("gaussian", description="gaussian: as scArches; distance: as scikit-learn.")
    edit: bool = Field(
        False, description="Cells of the reference do not vote if most of their own neighbours share another label."
    )


@dataclass(frozen=True)
class Reference:
    """A model to map onto, with the latent of its own cells where it carries one."""

    path: Path
    model: AtlasModel
    latent: Latent | None
    transfer: LabelTransfer | None
    contradicted: Mapping[str, int] = field(default_factory=dict)  # label column -> cells that do not vote (`edit`)

    @property
    def fingerprint(self) -> str:
        return self.model.fingerprint or ""

    @property
    def schema(self) -> Schema:
        return self.model.schema


def load_reference(path: str | Path, config: TransferConfig, *, seed: int = 0) -> Reference:
    """The model in the folder (or at the URL) `path`, and what its ``latent.zarr`` says of its cells.

    Raises:
        OpenError, CorruptError, ModelFileError: the folder is no intact model; the latent is not that of the model.
    """
    path = local_model(path)
    model = read(path)
    if not (path / LATENT).is_dir():
        return Reference(path, model, None, None)
    latent = read_latent(path / LATENT)
    if latent.mean.shape[1] != model.n_latent:
        raise ModelFileError(
            f"{path / LATENT}: has {latent.mean.shape[1]} dimensions, the model {model.n_latent}: not its own"
        )
    columns, wrong = [], {}
    for wanted in model.schema.labels:
        found = latent.column(wanted.name)
        if found is None or found[0].values != wanted.values:
            raise ModelFileError(f"{path / LATENT}: its column {wanted.name!r} is not that of the model")
        codes = np.array(found[1], np.int64)
        if config.edit:
            known = np.flatnonzero(codes != UNLABELLED)
            outvoted = known[contradicted(latent.mean[known], codes[known], seed=seed)]
            codes[outvoted], wrong[wanted.name] = UNLABELLED, len(outvoted)
        columns.append((found[0], codes))
    return Reference(path, model, latent, LabelTransfer(latent.mean, columns, config.k, config.weights, seed), wrong)
