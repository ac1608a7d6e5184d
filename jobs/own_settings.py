"""Settings that only some models have a use for: refused where they would be taken and do nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

from scarcade.dataloaders.loader import LoaderConfig
from scarcade.engine.errors import UsageError
from scarcade.jobs.programs import FIELDS, SIZES, with_programs
from scarcade.models.model import AtlasModel


def own_settings(kind: type[AtlasModel], given: Mapping[str, Any], genes: Sequence[str], table: str) -> dict[str, Any]:
    """Settings of a model, with the programs of .gmt files in their place (`with_programs`).

    Args:
        table: what the settings stand in, for messages: "model" or "surgery.model".

    Raises:
        UsageError: sizes of programs (``min_program_genes``) where no file is read. Else as `with_programs`.
    """
    sizes = [name for name in SIZES if name in given]
    has_programs = "programs" in kind.Config.model_fields
    files = any(given.get(field) and not isinstance(given[field], Mapping) for field in FIELDS)
    if sizes and not (has_programs and files):
        why = "no .gmt file is given to take them from" if has_programs else f"{kind.name} has none"
        raise UsageError(
            f"--{table}.{sizes[0].replace('_', '-')} {given[sizes[0]]}: is about gene programs, and {why}; leave it out"
        )
    return with_programs(given, genes) if has_programs else dict(given)


def check_labelled(data: LoaderConfig, kind: type[AtlasModel]) -> None:
    """Refuse how labelled cells are dealt, for a model that learns nothing from labels.

    Raises:
        UsageError: `samples_per_label` is given to such a model.
    """
    if data.samples_per_label is not None and not kind.labelled_beside:
        raise UsageError(
            f"--data.samples-per-label {data.samples_per_label}: {kind.name} learns nothing from labels; leave it out"
        )
