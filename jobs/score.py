"""Scores of a latent on disk or in memory: how well it keeps labels apart, mixes batches, and was labelled."""

import json
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scarcade.dataloaders.schema import DataWarning, column_of, label_text, look_alikes, text_of
from scarcade.dataloaders.source import AnnDataFile, Source, opened
from scarcade.engine.errors import CorruptError, OpenError, UsageError
from scarcade.engine.folder import MANIFEST, problems, read_manifest
from scarcade.engine.schema import Categories
from scarcade.engine.scores import integration, label_accuracy
from scarcade.engine.storage import is_url, shown
from scarcade.jobs.fetched import near
from scarcade.jobs.latent import KIND, LATENT, VARIANCE, read_latent

_WITH_LATENT = ("result", "merged")  # kinds of AnnData that `jobs.written` and `jobs.merged` write


def score(
    latent: Any,
    *,
    labels: str | None = None,
    batches: str | None = None,
    predicted: str | None = None,
    obsm: str | None = None,
    unlabelled: Sequence[str] = (),
    max_cells: int = 10_000,
    seed: int = 0,
) -> dict[str, float]:
    """Integration scores (`engine.scores.integration`), and accuracy of a column of predicted labels.

    Args:
        latent: a ``latent.zarr``, or an .h5ad, .zarr or AnnData with a latent in obsm (as results of a mapping, and
            what ``map --merge`` wrote, have); or a URL (it is copied here).
        labels, batches: columns of obs; at least one. predicted: column that is compared with `labels`.
        obsm: which entry of obsm; default: the only one that begins with X_ and is neither a PCA nor a UMAP.
        unlabelled: labels that mean no label; such cells are not scored. Those of the reference and of the mapping
            are known of what a mapping wrote.

    Raises:
        UsageError: no column was given, or obsm has several latents. CategoryError: a column that is not there.
        OpenError: not readable, or without a latent. InputError: too few cells that could be scored.
    """
    if labels is None and batches is None:
        raise UsageError("nothing to score by: give --labels, --batches, or both")
    if predicted is not None and labels is None:
        raise UsageError("--predicted is compared with --labels, which was not given")
    if max_cells < 10:
        raise UsageError(f"--max-cells {max_cells}: at least 10 cells are needed for a score")
    far = isinstance(latent, str) and is_url(latent)
    with near(latent) if far else nullcontext(latent) as here:
        cells, obs, where, none = _cells(here, obsm)
    where = shown(latent) if far else where
    truth = _text(obs, labels, where, "--labels", (*unlabelled, *none))
    for value in look_alikes([] if truth is None else [one for one in pd.unique(truth) if one is not None]):
        warnings.warn(
            f"{where}: {np.count_nonzero(truth == value)} cells are scored as cells of {labels} {value!r}; if that is "
            f"to say that they have none: --unlabelled {value!r}",
            DataWarning,
            stacklevel=2,
        )
    of_batch = _codes(_text(obs, batches, where, "--batches"))
    scores = integration(cells, _codes(truth), of_batch, max_cells=max_cells, seed=seed)
    if predicted is not None and labels is not None and truth is not None:
        given = text_of(column_of(obs, predicted, where, "--predicted"))
        values = Categories(labels, tuple(sorted({str(v) for v in (*truth, *given) if v is not None}))).codes()
        both = (np.array([values.get(value, -1) for value in column], np.int64) for column in (truth, given))
        scores |= label_accuracy(*both)
    return scores


def _cells(latent: Any, obsm: str | None) -> tuple[np.ndarray, pd.DataFrame, str, tuple[str, ...]]:
    """The latent (N, L), obs, what to call it, and labels that are known to mean none."""
    if isinstance(latent, str | Path) and _kind(Path(latent)) == KIND:
        ours = read_latent(latent)
        if obsm not in (None, ours.obsm_key):
            raise UsageError(f"--obsm {obsm}: {latent} has {ours.obsm_key}")
        frame = {c.name: pd.Categorical.from_codes(codes, categories=pd.Index(c.values)) for c, codes in ours.columns}
        return ours.mean, pd.DataFrame(frame, index=pd.RangeIndex(len(ours)).astype(str)), str(latent), ()
    with opened(latent) as file:
        entries = list(file.root["obsm"]) if isinstance(file, AnnDataFile) and "obsm" in file.root else []
        if not isinstance(file, AnnDataFile):
            entries = list(file.adata.obsm)
        key = _entry([str(entry) for entry in entries], obsm, file.where)
        values = file.element(f"obsm/{key}")
        if isinstance(values, pd.DataFrame):
            values = values.to_numpy()
        values = np.asarray(values)
        if values.ndim != 2 or values.dtype.kind not in "fiu":
            raise OpenError(f"{file.where}: obsm[{key!r}] is not a table of numbers, cells x dimensions")
        return values, file.obs(), file.where, _unlabelled(file)


def _unlabelled(file: Source) -> tuple[str, ...]:
    """What the mapping that wrote a file took for no label; nothing of another file."""
    try:
        mapping = json.loads(str(file.element("uns/scarcade")["mapping"]))
        return tuple(map(str, mapping["unlabelled"]))
    except (KeyError, TypeError, ValueError, AttributeError, OpenError):
        return ()


def _kind(path: Path) -> str | None:
    """What a folder of ours is; None of anything else.

    Raises:
        OpenError: one without a latent of cells. CorruptError: an AnnData that is not as it was written.
    """
    if not (path / MANIFEST).is_file():
        return None
    kind = str(read_manifest(path).get("kind"))
    if kind == "model":
        there = f"is {path / LATENT}" if (path / LATENT).is_dir() else "is not here; `scarcade embed` writes one"
        raise OpenError(f"{path}: is a model; the latent of its cells {there}")
    if kind not in (KIND, *_WITH_LATENT):
        raise OpenError(
            f"{path}: is a {kind}; what can be scored is a {LATENT}, what `scarcade map` wrote (a result, or the cells "
            "of --merge), or an .h5ad or .zarr with a latent in obsm"
        )
    if kind != KIND and (wrong := problems(path)):
        raise CorruptError(f"{path}: {'; '.join(wrong[:3])}")
    return kind


def _entry(entries: Sequence[str], obsm: str | None, where: str) -> str:
    there = ", ".join(entries) or "none"
    if obsm is not None:
        if obsm not in entries:
            raise UsageError(f"--obsm {obsm}: {where} has no such entry of obsm; it has {there}")
        return obsm
    latents = [name for name in entries if name.startswith("X_") and not name.endswith(VARIANCE)]
    narrower = [name for name in latents if name.lower() not in ("x_pca", "x_umap", "x_tsne")]
    if not entries:
        raise OpenError(f"{where}: has no latent to score: its obsm is empty; `scarcade embed` or `map` makes one")
    if len(narrower or latents) != 1:
        raise UsageError(f"{where}: say by --obsm which of its entries is the latent; it has {there}")
    return (narrower or latents)[0]


def _text(
    obs: pd.DataFrame, column: str | None, where: str, option: str, unlabelled: Sequence[str] = ()
) -> np.ndarray | None:
    return None if column is None else label_text(column_of(obs, column, where, option), unlabelled)


def _codes(text: np.ndarray | None) -> np.ndarray | None:
    return None if text is None else np.asarray(pd.Categorical(text).codes, np.int64)
