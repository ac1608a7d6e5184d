"""Gene programs as a setting: name -> genes, and the mask that a model makes of them. Shapes: T programs, G genes."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, PlainSerializer
from torch import Tensor

from scarcade.engine.errors import UsageError


def _words(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {name: genes.split() if isinstance(genes, str) else genes for name, genes in value.items()}


def _lines(value: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """A program as one line, as in a .gmt file, where no name has a space in it."""
    return {name: " ".join(g) if all(len(gene.split()) == 1 for gene in g) else list(g) for name, g in value.items()}


Programs = Annotated[
    dict[str, tuple[str, ...]], BeforeValidator(_words), PlainSerializer(_lines, return_type=dict, when_used="json")
]
"""Name of a gene program -> its genes."""


def program_mask(programs: Mapping[str, Sequence[str]], genes: Sequence[str]) -> Tensor:
    """(T, G): 1 where a gene is in a program; without values where the default device has none (meta).

    Raises:
        UsageError: a gene of a program is not one of `genes`.
    """
    places = {gene: i for i, gene in enumerate(genes)}
    inside: list[tuple[int, int]] = []
    for t, (name, members) in enumerate(programs.items()):
        if unknown := [gene for gene in members if gene not in places]:
            raise UsageError(f"program {name!r}: the data have no gene {unknown[0]!r}")
        inside += [(t, places[gene]) for gene in members]
    mask_TG = torch.zeros(len(programs), len(genes))
    if inside and not mask_TG.is_meta:
        t_, g_ = torch.tensor(inside).T
        mask_TG[t_, g_] = 1
    return mask_TG
