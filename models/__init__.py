"""The models by their name on the command line. One model a file."""

from scarcade.models.scvi import RECIPES, Scvi

MODELS: dict[str, type[Scvi]] = {"scvi": Scvi}

__all__ = ["MODELS", "RECIPES", "Scvi"]
