"""Many .h5ad and .zarr files -> one shuffled, sharded, checked store, in memory that does not depend on their size.

Each file is surveyed (`survey`), then read once: every value is checked, genes are renamed, cells are dealt into
buckets of neighbouring keys, and counts per gene are tallied for the choice of variable genes (`genes`). At last the
buckets are sorted one by one and written. Reading is nine tenths of the work (gzip in HDF5), so it is what runs in
parallel, a file a process.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from scarcade.dataloaders.build import Build, Progress
from scarcade.dataloaders.genes import read_gene_list
from scarcade.dataloaders.source import AnnDataFile, expand
from scarcade.dataloaders.store import Store, open_store
from scarcade.dataloaders.survey import IngestConfig
from scarcade.engine.cluster import cluster
from scarcade.engine.config import checked
from scarcade.engine.errors import ClusterError, InputError, ScarcadeError, UsageError
from scarcade.engine.lock import sole_writer
from scarcade.engine.published import is_there, published
from scarcade.engine.replaceable import check_replaceable
from scarcade.engine.storage import is_url, shown

T = TypeVar("T")


def ingest(
    files: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    batch_key: str | None = None,
    label_keys: Sequence[str] = (),
    layer: str | None = None,
    genes: str | Sequence[str] = "union",
    hvg: int | None = None,
    protein_key: str | None = None,
    protein_measured_key: str | None = None,
    categorical: Sequence[str] = (),
    continuous: Sequence[str] = (),
    size_factor: str | None = None,
    unlabelled: Sequence[str] = (),
    seed: int = 0,
    workers: int = 0,
    append: bool = False,
    replace: bool = False,
    allow_noninteger: bool = False,
    progress: Progress | None = None,
    report: Callable[[str], None] | None = None,
) -> Store:
    """Make the store `out` from `files` (paths, folders, globs); the settings are those of `IngestConfig`.

    With `append` a new version of an existing store takes its place: the one that a single ingest of all files
    would have made, bit for bit; its genes stay as they are if they were chosen by `hvg` or a list. With
    `workers` > 1 files are read by that many processes of Ray. The same call again on a store that is done
    returns it. `report` gets every decision as a line (default: stderr).

    Raises:
        InputError: a file that cannot be used; nothing is left half-written. UsageError: settings that cannot be
        meant, or `out` exists. StorageError: the disk is full. BusyError: another process writes `out`.
    """
    tell = report if report is not None else lambda line: print(line, file=sys.stderr)
    known_genes = genes if isinstance(genes, str) else tuple(genes)
    if isinstance(known_genes, str) and known_genes not in {"union", "intersection"}:
        known_genes = tuple(read_gene_list(known_genes))
    config = checked(
        IngestConfig,
        {
            "batch_key": batch_key,
            "label_keys": tuple(label_keys),
            "layer": layer,
            "genes": known_genes,
            "hvg": hvg,
            "protein_key": protein_key,
            "protein_measured_key": protein_measured_key,
            "categorical": tuple(categorical),
            "continuous": tuple(continuous),
            "size_factor": size_factor,
            "unlabelled": tuple(unlabelled),
            "seed": seed,
            "allow_noninteger": allow_noninteger,
        },
    )
    if workers < 0:
        raise UsageError(f"--workers {workers}: wanted are 0 (one by one in this process) or more")
    if hvg is not None and allow_noninteger:
        raise UsageError("--hvg needs counts; it cannot be used with --allow-noninteger")
    paths = expand(files)
    with published(out, replace=True) as target, sole_writer(target):
        place = str(out) if is_url(out) else target
        old = None
        if replace:
            check_replaceable(place, "store", paths)
        elif is_there(place):
            paths, done = _left_to_do(paths, place, config, append, tell)
            if done is not None:
                return done
            old = place
        parallel = workers > 1 and len(paths) > 1
        run = Build(
            config,
            target,
            old,
            each=partial(each, workers=workers if parallel else 0),
            parallel=parallel,
            progress=progress or (lambda *_: None),
            tell=tell,
        )
        with cluster(cpus=workers) if parallel else nullcontext():
            run.make(paths)
    return open_store(place)


def _left_to_do(
    paths: list[Path], target: str | Path, config: IngestConfig, append: bool, tell: Callable[[str], None]
) -> tuple[list[Path], Store | None]:
    """The files that `target` does not hold yet; the store itself if that is none."""
    where = shown(str(target))
    try:
        store = open_store(target)
    except InputError as error:
        raise UsageError(
            f"{where}: exists and is no intact store ({error}); choose another --out, or --force"
        ) from error
    held = {(one["name"], one["bytes"], one["xxh3_128"]) for one in store.sources if "xxh3_128" in one}
    sizes = {(name, n_bytes) for name, n_bytes, _ in held}
    fresh, settings = [], [one.get("settings") for one in store.sources]
    for path in paths:
        with AnnDataFile(path) as file:
            n_bytes, content = file.content_hash() if (path.name, _size(path)) in sizes else (0, "")
        if (path.name, n_bytes, content) not in held:
            fresh.append(path)
    wanted = config.recorded()
    different = sorted({key for one in settings for key in wanted if (one or {}).get(key) != wanted[key]})
    if append and different:
        was = ", ".join(f"{key} = {(settings[0] or {}).get(key)!r}" for key in different)
        raise UsageError(f"{where}: was made with {was}; give the same to append to it")
    if not append and (fresh or different or len(held) != len(paths)):
        raise UsageError(f"{where}: exists already; --append adds cells to it, --force makes it anew")
    if len(fresh) < len(paths):
        tell(f"{where}: holds {len(paths) - len(fresh)} of the {len(paths)} files already")
    return fresh, None if fresh else store


def _size(path: Path) -> int:
    return sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())


def each(work: Callable[..., T], jobs: Sequence[tuple[Any, ...]], workers: int) -> Iterator[tuple[int, T]]:
    """(number of the job, its result) as they are done: here, or with `workers` > 1 in tasks of Ray, which must run.

    Raises:
        what `work` raises. ClusterError: Ray lost a task twice.
    """
    if workers <= 1:
        for i, job in enumerate(jobs):
            yield i, work(*job)
        return
    import ray

    task: Any = ray.remote(num_cpus=1, max_retries=1)(_caught)
    waiting: dict[Any, int] = {}
    left = list(enumerate(jobs))[::-1]
    while left or waiting:
        while left and len(waiting) < workers:
            i, job = left.pop()
            waiting[task.remote(work, job)] = i
        ready, _ = ray.wait(list(waiting), num_returns=1)
        i = waiting.pop(ready[0])
        try:
            value, error = ray.get(ready[0])
        except ray.exceptions.RayError as lost:
            raise ClusterError(f"{jobs[i][0]}: the process that read it was lost ({lost})") from lost
        if error is not None:
            raise error
        yield i, value


def _caught(work: Callable[..., T], job: tuple[Any, ...]) -> tuple[T | None, ScarcadeError | None]:
    """Our own errors as values: Ray would wrap them in a traceback of its own."""
    try:
        return work(*job), None
    except ScarcadeError as error:
        return None, error
