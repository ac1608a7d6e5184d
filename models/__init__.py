"""The models by their name on the command line. One model a file."""

from scarcade.models.model import AtlasModel
from scarcade.models.scanvi import Scanvi
from scarcade.models.scvi import RECIPES, Scvi

MODELS: dict[str, type[AtlasModel]] = {
    "scvi": Scvi,
    "scanvi": Scanvi,
}

__all__ = ["MODELS", "RECIPES", "AtlasModel", "Scanvi", "Scvi"]
