"""Models of other tools as ours: a folder that train, map, embed and `sca.load` take; and ours as theirs."""

from dataclasses import dataclass
from pathlib import Path

from scarcade.dataloaders.writer import PROTEIN_COUNTS
from scarcade.engine.errors import ModelFileError, OpenError
from scarcade.engine.folder import committed
from scarcade.engine.published import published
from scarcade.engine.storage import is_url, shown
from scarcade.jobs.fetched import near
from scarcade.models.interop.scarches import is_scarches, read_scarches
from scarcade.models.interop.scgen import is_scgen, read_scgen
from scarcade.models.interop.scvi_tools import read_scvi_tools
from scarcade.models.interop.to_others import write_export
from scarcade.models.model import AtlasModel
from scarcade.models.saved import read, save


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


@dataclass(frozen=True)
class Exported:
    """A model in the files of another tool."""

    path: Path | str
    tool: str  # scvi-tools, scArches
    name: str  # of the class there
    notes: tuple[str, ...]  # what the user should know


def export_model(path: str | Path, out: str | Path, *, replace: bool = False) -> Exported:
    """Write a model of ours to the folder, or URL, `out` in the files of the tool that it comes from.

    scvi, scanvi and totalvi as ``model.pt`` of scvi-tools, trvae, expimap and scgen as the three files of scArches.

    Raises:
        OpenError, CorruptError: there is no model of ours in `path`, or it is damaged. ModelFileError: the other tool
        has no such model. StorageError: `out` exists, or cannot be written.
    """
    with near(path) as folder, published(out, replace=replace) as target:
        model = read(folder)
        with committed(target, extra={"kind": "export"}, replace=replace) as work:
            try:
                tool, name, notes = write_export(model, work, PROTEIN_COUNTS)
            except ModelFileError as error:
                raise ModelFileError(f"{shown(str(path))}: cannot be exported: {error}") from error
    return Exported(str(out) if is_url(out) else Path(out), tool, name, tuple(notes))
