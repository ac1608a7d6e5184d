"""The models by their name on the command line. One model a file."""

from scarcade.models.expimap import Expimap
from scarcade.models.model import AtlasModel
from scarcade.models.scanvi import Scanvi
from scarcade.models.scgen import Scgen
from scarcade.models.scvi import RECIPES, Scvi
from scarcade.models.totalvi import Totalvi
from scarcade.models.trvae import Trvae

MODELS: dict[str, type[AtlasModel]] = {
    "scvi": Scvi,
    "scanvi": Scanvi,
    "trvae": Trvae,
    "expimap": Expimap,
    "scgen": Scgen,
    "totalvi": Totalvi,
}

__all__ = ["MODELS", "RECIPES", "AtlasModel", "Expimap", "Scanvi", "Scgen", "Scvi", "Totalvi", "Trvae"]
