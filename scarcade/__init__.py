"""scarcade: atlas-scale training of single-cell reference models, and mapping of queries onto them.

The public names are resolved on first use, so that ``import scarcade`` (and ``scarcade --help``)
costs milliseconds and not the two seconds that torch needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from scarcade.engine import openmp  # noqa: F401 - what it sets counts only before torch is loaded

__version__ = "0.1.0"

_PUBLIC = {
    "simulate": "scarcade.dataloaders.synthetic",
    "ingest": "scarcade.dataloaders.ingest",
    "train": "scarcade.jobs.train",
    "tune": "scarcade.jobs.tune",
    "map_queries": "scarcade.jobs.mapping",
    "embed": "scarcade.jobs.embed",
    "score": "scarcade.jobs.score",
    "inspect": "scarcade.jobs.inspect",
    "load": "scarcade.jobs.trained",
    "push": "scarcade.jobs.sharing",
    "pull": "scarcade.jobs.sharing",
    "import_model": "scarcade.jobs.exchange",
    "export_model": "scarcade.jobs.exchange",
    "open_store": "scarcade.dataloaders.store",
    "MODELS": "scarcade.models",
}

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604  (the names are strings)

if TYPE_CHECKING:
    from scarcade.dataloaders.ingest import ingest
    from scarcade.dataloaders.store import open_store
    from scarcade.dataloaders.synthetic import simulate
    from scarcade.jobs.embed import embed
    from scarcade.jobs.exchange import export_model, import_model
    from scarcade.jobs.inspect import inspect
    from scarcade.jobs.mapping import map_queries
    from scarcade.jobs.score import score
    from scarcade.jobs.sharing import pull, push
    from scarcade.jobs.train import train
    from scarcade.jobs.trained import load
    from scarcade.jobs.tune import tune
    from scarcade.models import MODELS


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'scarcade' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
