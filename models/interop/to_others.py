"""Which tool has which of our models, and its files."""

from pathlib import Path

from scarcade.engine.errors import ModelFileError
from scarcade.models.expimap import Expimap
from scarcade.models.interop.to_scarches import write_scarches
from scarcade.models.interop.to_scvi_tools import write_scvi_tools
from scarcade.models.model import AtlasModel
from scarcade.models.scgen import Scgen
from scarcade.models.scvi import Scvi
from scarcade.models.trvae import Trvae


def write_export(model: AtlasModel, folder: Path, proteins: str) -> tuple[str, str, list[str]]:
    """Write `model` into `folder` in the files of another tool: (the tool, its class, what the user should know).

    Args:
        proteins: entry of obsm in which new cells have their proteins.

    Raises:
        ModelFileError: no tool has such a model, or it would compute something else.
    """
    if isinstance(model, Scvi):
        return "scvi-tools", *write_scvi_tools(model, folder, proteins)
    if isinstance(model, Trvae | Expimap | Scgen):
        return "scArches", *write_scarches(model, folder)
    raise ModelFileError(f"no other tool has a {model.name} model")
