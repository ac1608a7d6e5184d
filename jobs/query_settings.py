"""Settings of the surgery of one query: those of training, with other defaults, and what is asked of queries alone."""

from typing import Literal

from pydantic import Field

from scarcade.dataloaders.loader import LoaderConfig
from scarcade.engine.config import HIDDEN
from scarcade.engine.optim import OptimConfig
from scarcade.models.surgery import SurgeryConfig


class QueryOptim(OptimConfig):
    """As in training, with the numbers for surgery of scvi-tools' tutorials."""

    epochs: int | None = Field(200, ge=1, description="Passes over the query's cells.")
    products: Literal["float32"] = Field(
        "float32", description="Queries are trained in float32.", json_schema_extra=HIDDEN
    )
    record: Literal[True] = Field(True, description="Of a GPU.", json_schema_extra=HIDDEN)
    weight_decay: float = Field(0.0, ge=0, description="L2 term added to the gradient (not decoupled).")


class QueryData(LoaderConfig):
    """How a query's cells are dealt out."""

    validation: float = Field(0.0, ge=0, lt=1, description="Fraction of the query's cells that is held out.")
    lanes: int | None = Field(1, ge=1, description="Stretches read in turn; one process reads them all.")
    edit_labels: bool = Field(False, description="Is --transfer.edit here.", json_schema_extra=HIDDEN)
    gpu_memory: int | None = Field(None, ge=0, description="Of a GPU.", json_schema_extra=HIDDEN)
    stream_above: int = Field(
        1 << 28,
        ge=0,
        description="Bytes of a query's counts in memory; one that needs more is streamed, to the same result.",
    )


class QuerySurgery(SurgeryConfig):
    """How the reference is grown and trained."""

    train_decoder: bool = Field(
        False, description="Train new rows even where they cannot move cells (encode_covariates = false)."
    )
    use_labels: bool = Field(
        False,
        description="scanvi: labels of the query's cells take part in its training; then they no longer test it",
    )
