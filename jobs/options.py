"""What options look like: their aliases and help, and those that stand for a field of a section.

`train`, `tune` and `map` take every field of their sections as ``--section.field`` besides the options of their own.
Nothing heavy is imported here, as in `commands`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from scarcade.engine.errors import UsageError
from scarcade.engine.tables import merged, nested

if TYPE_CHECKING:
    from scarcade.engine.config import Section

WITH_SECTIONS = ("train", "tune", "map")
UNCHECKED = {"tune": ("space",)}
"""Tables of a command's TOML file that are no section: the command itself checks them."""
DIRECT = {
    "epochs": "optim.epochs",
    "batch-size": "data.batch-size",
    "workers": "scale.workers",
    "threads": "scale.threads",
    "log": "log.to",
}
"""Options that `train`, `tune` and `map` take directly (`log`: `train` alone), and the fields they are short for."""


@dataclass(frozen=True)
class Sections:
    """The fields given as ``--section.field`` or in the tables of the TOML file, as a tree; not yet checked."""

    tree: Mapping[str, Any] = field(default_factory=dict)
    on_command_line: frozenset[str] = frozenset()  # dotted names

    def with_direct(self, **direct: Any) -> dict[str, Any]:
        """The tree with the direct options laid on it.

        Raises:
            UsageError: an option stands on the command line in both of its forms.
        """
        laid: dict[str, Any] = {}
        for name, value in direct.items():
            dotted = DIRECT[name.replace("_", "-")]
            if value is None:
                continue
            if dotted in self.on_command_line:
                raise UsageError(f"--{name.replace('_', '-')} and --{dotted}: they are one setting; give one of them")
            laid[dotted] = value
        return merged(self.tree, nested(laid))


@Parameter(name="*")
@dataclass(frozen=True)
class Common:
    """What every command takes; read before the command line is (`cli.main`), and listed here for --help."""

    config: Annotated[Path | None, Parameter(help="TOML file that may hold every option of this command.")] = None
    debug: Annotated[bool, Parameter(negative="", help="Show tracebacks and other libraries' warnings.")] = False


def told(text: str) -> Parameter:
    """An option and what --help says of it."""
    return Parameter(help=text)


def flag(text: str) -> Parameter:
    """A switch that is off unless it is given."""
    return Parameter(help=text, negative="")


def repeated(text: str) -> Parameter:
    """A list that is filled by giving its option several times."""
    return Parameter(help=f"{text} (repeatable).", negative="")


COMMON, NO_SECTIONS = Common(), Sections()
Given = Annotated[Sections, Parameter(parse=False)]
Files = Annotated[list[str], repeated(".h5ad or .zarr files, folders of them, or globs")]
Queries = Annotated[
    list[str], repeated(".h5ad or .zarr files, folders of them, globs, URLs, or tables of queries (.csv, .tsv)")
]
Out = Annotated[str, told("Where the result goes, a path or a URL; written under another name, then renamed.")]
Seed = Annotated[int, told("Seed of everything random.")]
BatchKey = Annotated[str | None, told("Column of obs with the batch (condition) of each cell.")]
FileBatch = Annotated[str | None, told("Column of obs with the batch; default: one batch a file, named after it.")]
Layer = Annotated[str | None, told("Where a file's counts are: X, raw.X or a layer; default: found out.")]
Epochs = Annotated[int | None, told("Passes over the cells (short for --optim.epochs).")]
BatchSize = Annotated[int | None, told("Cells in a step over all workers (--data.batch-size).")]
Workers = Annotated[int | None, told("Ray workers; 0: in this process (--scale.workers).")]
Threads = Annotated[int | None, told("Threads that each worker computes with (--scale.threads).")]
Unlabelled = Annotated[tuple[str, ...], repeated("A label that means no label")]
Force = Annotated[bool, flag("Replace OUT if it is there.")]
Json = Annotated[bool, Parameter(name="--json", negative="", help="Print the result as JSON.")]


def sections_of(command: str, model: str) -> "dict[str, type[Section]]":
    """The sections of a command's configuration by name; those of `train` depend on the model.

    Raises:
        UsageError: there is no such model.
    """
    from scarcade.engine.config import Section

    config: type[Section]
    own: dict[str, type[Section]] = {}
    if command == "map":
        from scarcade.jobs.query_task import MapConfig

        config = MapConfig
    else:
        from scarcade.jobs.programs import on_a_command_line
        from scarcade.jobs.train_config import TrainConfig
        from scarcade.models import MODELS

        if model not in MODELS:
            raise UsageError(f"--model {model}: there is no such model; there are {', '.join(MODELS)}")
        config, own = TrainConfig, {"model": on_a_command_line(MODELS[model].Config)}
        if command == "tune":
            from scarcade.jobs.tune_config import Objective, TuneConfig

            own |= {"tune": TuneConfig, "objective": Objective}
    kinds = {name: info.annotation for name, info in config.model_fields.items()}
    return {
        **own,
        **{name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Section)},
    }
