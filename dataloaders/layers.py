"""Which matrix of a file holds the raw counts: found out by looking, or told, and said in either case.

By convention counts stand in ``layers["counts"]``, in ``X`` (CELLxGENE, 10x) or in ``raw.X`` (scanpy's workflow keeps
them there before it normalises). Files do not say which, so a sample of each is looked at; every value is checked
again when it is read.
"""

from dataclasses import dataclass

import numpy as np

from scarcade.dataloaders.matrix import Matrix
from scarcade.dataloaders.reading import piece
from scarcade.dataloaders.source import Source
from scarcade.engine.errors import CountsError

_SAMPLE = 1 << 16  # values at the beginning, in the middle and at the end


@dataclass(frozen=True)
class Layer:
    """The matrix that was chosen, and why."""

    name: str
    why: str  # for people
    others: tuple[str, ...] = ()  # other matrices that look like counts


def choose_layer(source: Source, told: str | None, *, integer: bool = True) -> Layer:
    """The layer to read: the one that was told, else ``counts``, ``X``, ``raw.X``, else the only other one with counts.

    Raises:
        OpenError: the told layer is not there. CountsError: none looks like counts, or several and none is usual.
    """
    names = source.layers()
    if told is not None:
        source.matrix(told)  # says what there is if it is not there
        return Layer(told, f"{source.where}: counts are taken from {told!r}, as told")
    if not integer:
        return Layer("X", f"{source.where}: values are taken from 'X'")
    states = {name: _state(source.matrix(name)) for name in names}
    good = [name for name in names if states[name] == "counts"]
    usual = [name for name in ("counts", "X", "raw.X") if name in good]
    chosen = usual[0] if usual else good[0] if len(good) == 1 else None
    if chosen is None and not good:
        empty = [name for name in ("X", "counts", "raw.X") if states.get(name) == "empty"]
        chosen = empty[0] if empty else None
    if chosen is not None:
        seen = ", ".join(f"{name}: {state}" for name, state in states.items())
        others = tuple(name for name in good if name != chosen)
        return Layer(chosen, f"{source.where}: counts are taken from {chosen!r} ({seen})", others)
    if good:
        raise CountsError(f"{source.where}: {', '.join(good)} look like counts; say which by --layer")
    seen = ", ".join(f"{name!r} {state}" for name, state in states.items()) or "there is no matrix at all"
    raise CountsError(f"{source.where}: no matrix holds raw counts: {seen}. Add them as layers['counts'] or X")


def looks(source: Source) -> dict[str, str]:
    """Layer -> "counts", "empty", or what speaks against counts."""
    return {name: _state(source.matrix(name)) for name in source.layers()}


def _state(matrix: Matrix) -> str:
    n = matrix.shape[0] if matrix.layout == "dense" else matrix.n_stored
    step = max(1, _SAMPLE // max(matrix.shape[1], 1)) if matrix.layout == "dense" else _SAMPLE
    any_value = False
    for start in sorted({0, max(0, n // 2 - step // 2), max(0, n - step)}):
        values = piece(matrix.data, start, min(start + step, n), matrix.where)
        if values.dtype.kind not in "iufb":
            return f"holds {values.dtype}"
        if values.dtype.kind == "f":
            if not np.isfinite(values).all():
                return "holds values that are not finite"
            if (values != np.floor(values)).any():
                return "holds fractions"
        if values.size and values.min() < 0:
            return "holds negative values"
        any_value = any_value or bool(values.any())
    return "counts" if any_value else "empty"
