"""Gene programs: from .gmt files into a model's settings, and what a trained expiMap says of them.

Names, genes and signs of the programs, and which of them differ between groups of cells (Lotfollahi et al. 2023).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field, create_model

from scarcade.dataloaders.programs import read_programs
from scarcade.engine.config import Section
from scarcade.engine.errors import UsageError
from scarcade.jobs.cells import cells_of
from scarcade.jobs.differential import groups_of
from scarcade.jobs.trained import Trained
from scarcade.models.enrichment import compare_groups
from scarcade.models.expimap import Expimap

FIELDS = {"programs": "--programs", "new_programs": "model.new_programs"}
SIZES = {"min_program_genes": "min_genes", "max_program_genes": "max_genes"}


class ProgramSizes(Section):
    """Which programs of a .gmt file are taken: settings beside those of a model that has programs."""

    min_program_genes: int = Field(13, ge=1, description="fewest genes of a program of a file that the data have")
    max_program_genes: int | None = Field(None, ge=1, description="most of them; default: any number")


def on_a_command_line(config: type[Section]) -> type[Section]:
    """The settings of a model as a command takes them, where it has programs with `ProgramSizes`."""
    if "programs" not in config.model_fields:
        return config
    return create_model(config.__name__, __base__=(config, ProgramSizes))


def programs_given(
    programs: Sequence[str | Path] | Mapping[str, Sequence[str]] | None,
) -> list[str] | dict[str, list[str]] | None:
    """What Python code or a command gave, as a setting: paths, or names with their genes."""
    if programs is None:
        return None
    if isinstance(programs, str | Path):
        return [str(programs)]
    if isinstance(programs, Mapping):
        return {str(name): list(genes) for name, genes in programs.items()}
    return [str(path) for path in programs]


def with_programs(settings: Mapping[str, Any], genes: Sequence[str]) -> dict[str, Any]:
    """A model's settings, with .gmt files in `programs` and `new_programs` replaced by the programs in them.

    ``min_program_genes`` (default 13) and ``max_program_genes`` say which are kept, by how many of their genes are
    among `genes`; they stand beside the files, and are not settings of the model.

    Raises:
        OpenError, GenesError: as `read_programs`. UsageError: a size that is not a number.
    """
    out = dict(settings)
    sizes = {name: out.pop(given) for given, name in SIZES.items() if given in out}
    for name, value in sizes.items():
        try:
            sizes[name] = int(value)
        except (TypeError, ValueError) as error:
            raise UsageError(f"--model.{name.replace('genes', 'program_genes')} {value}: not a whole number") from error
    for field, option in FIELDS.items():
        given = out.get(field)
        if given and not isinstance(given, Mapping):
            paths = [given] if isinstance(given, str | Path) else list(given)
            out[field] = read_programs(paths, genes, option=option, **sizes).programs
    return out


def program_table(model: Trained | Expimap, *, directions: Literal["sum", "counts"] = "sum") -> pd.DataFrame:
    """A row for each latent dimension: kind, number of genes, whether it is active, direction and its confidence.

    A program is active if the group lasso has left it a weight; new terms always are. The direction is 1 if a higher
    latent means more expression of the program's genes, -1 if less.
    """
    expimap = _expimap(model)
    config = expimap.config
    sign_L, confidence_L = expimap.directions(directions)
    weight_GL = expimap.gene_weights().detach()
    free = expimap.n_latent - len(config.programs) - len(config.new_programs)
    kinds = ["program"] * len(config.programs) + ["constrained"] * len(config.new_programs) + ["unconstrained"] * free
    n_genes = [len(genes) for genes in (*config.programs.values(), *config.new_programs.values())]
    return pd.DataFrame(
        {
            "kind": kinds,
            "genes": n_genes + [expimap.schema.n_genes] * free,
            "genes_with_weight": weight_GL.ne(0).sum(0).cpu().numpy(),
            "active": expimap.active_terms().cpu().numpy(),
            "direction": sign_L.cpu().numpy().astype(np.int8),
            "confidence": confidence_L.cpu().numpy(),
        },
        index=pd.Index(expimap.terms_names, name="program"),
    )


def program_genes(model: Trained | Expimap, program: str) -> pd.DataFrame:
    """Genes with a weight in `program`, the heaviest first: weight, and whether the program names the gene.

    Raises:
        UsageError: the model has no such program.
    """
    expimap = _expimap(model)
    names = expimap.terms_names
    if program not in names:
        raise UsageError(f"the model has no program {program!r}; it has {', '.join(names[:5])}, ...")
    weight_G = expimap.gene_weights().detach()[:, names.index(program)].cpu().numpy()
    inside = {*expimap.config.programs.get(program, ()), *expimap.config.new_programs.get(program, ())}
    table = pd.DataFrame({"weight": weight_G}, index=pd.Index(expimap.schema.genes, name="gene"))
    table["in_program"] = table.index.isin(inside)
    table = table[table["weight"] != 0]
    return table.loc[table["weight"].abs().sort_values(ascending=False, kind="stable").index]


def enrichment(
    trained: Trained,
    data: Any,
    groupby: str,
    group1: str | Sequence[str] | None = None,
    group2: str | None = None,
    *,
    n_pairs: int = 5000,
    use_directions: bool = True,
    active_only: bool = True,
    batch_key: str | None = None,
    layer: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Programs that are higher or lower in a group of cells; the strongest first, group by group.

    Args:
        data: an AnnData, a file or a store, streamed once.
        groupby: obs column; each of `group1` (default: every value) against `group2` (default: all other cells).
        use_directions: a positive Bayes factor means more expression of the program's genes in `group1`, and not just
            a higher latent, whose sign is arbitrary.

    Returns:
        Columns group1, group2, bayes_factor (natural log; beyond 2.3 either way is 10 to 1), p_h0, p_h1; indexed by
        program.
    """
    expimap = _expimap(trained)
    cells = cells_of(data, expimap, batch_key=batch_key, layer=layer)
    groups = groups_of(cells.n_cells, cells.column, groupby=groupby, group1=group1, group2=group2)
    mean, variance = trained.get_latent_representation(cells, return_dist=True)
    kept = expimap.active_terms().cpu().numpy() if active_only else np.ones(expimap.n_latent, bool)
    directions = expimap.directions()[0].cpu().numpy() if use_directions else None
    tables = []
    for number, group in enumerate(groups):
        found = compare_groups(
            mean, variance, group.rows1, group.rows2, n_pairs=n_pairs, directions=directions, seed=seed + number
        )
        table = pd.DataFrame(
            {"group1": group.name1, "group2": group.name2, "bayes_factor": found.bayes_factor}
            | {"p_h0": found.p_h0, "p_h1": found.p_h1},
            index=pd.Index(expimap.terms_names, name="program"),
        )[kept]
        tables.append(table.loc[table["bayes_factor"].abs().sort_values(ascending=False, kind="stable").index])
    return pd.concat(tables)


def _expimap(model: Trained | Expimap) -> Expimap:
    found = model.model if isinstance(model, Trained) else model
    if not isinstance(found, Expimap):
        raise UsageError(f"only expimap models have gene programs, and this one is a {found.name} model")
    return found
