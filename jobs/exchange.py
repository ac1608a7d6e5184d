"""Models of other tools as ours: a folder that train, map, embed and `sca.load` take."""

from pathlib import Path

from scarcade.engine.errors import OpenError
from scarcade.engine.published import published
from scarcade.engine.storage import is_url
from scarcade.models.interop.scarches import is_scarches, read_scarches
from scarcade.models.interop.scgen import is_scgen, read_scgen
from scarcade.models.interop.scvi_tools import read_scvi_tools
from scarcade.models.model import AtlasModel
from scarcade.models.saved import save


def import_model(path: str | Path, out: str | Path, *, replace: bool = False) -> Path | str:
    """Write the model in `path` to the folder, or URL, `out`.

    It is one of scvi-tools (``model.pt``, or its folder) or of scArches (its folder).

    The file is read in a process of its own that runs nothing of it.

    Raises:
        OpenError: there is no model, or it is one of ours. UnsafeFileError: the file names more than a model needs.
        ModelFileError: another class of model, or one that cannot be read. StorageError: `out` exists.
    """
    path = Path(path)
    if not path.exists():
        raise OpenError(f"{path}: no such file or folder")
    if (path / "model.json").is_file():
        raise OpenError(f"{path}: is a model of scarcade already; train, map and embed take it as it is")
    model: AtlasModel
    if is_scgen(path):
        model = read_scgen(path)
    elif is_scarches(path):
        model = read_scarches(path)
    else:
        model = read_scvi_tools(path)
    with published(out, replace=replace) as target:
        save(model, target, training=dict(model.record or {}), data_fingerprint=None, replace=replace)
    return str(out) if is_url(out) else Path(out)
