"""Models of other tools as ours: a folder that train, map, embed and `sca.load` take."""

from pathlib import Path

from scarcade.models.interop.scvi_tools import read_scvi_tools
from scarcade.models.saved import save


def import_model(path: str | Path, out: str | Path, *, replace: bool = False) -> Path:
    """Write the SCVI model of scvi-tools in `path` (``model.pt``, or its folder) to the model folder `out`.

    The file is read in a process of its own that runs nothing of it.

    Raises:
        OpenError: there is no model. UnsafeFileError: the file names more than a model needs.
        ModelFileError: another class of model, or one that cannot be read. StorageError: `out` exists.
    """
    model = read_scvi_tools(path)
    save(model, Path(out), training=dict(model.record or {}), data_fingerprint=None, replace=replace)
    return Path(out)
