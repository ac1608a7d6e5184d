"""The commands: each reads its part of the command line, calls the function of the same name, and prints the result.

Results go to stdout, progress and notes to stderr. Every command imports what it runs when it runs, so that
``scarcade --help`` does not wait for torch.
"""

import math
import os
import sys
import time
from json import dumps
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App

from scarcade import __version__
from scarcade.engine.compiling import told_of_compiling
from scarcade.engine.errors import InputError, UsageError
from scarcade.engine.published import is_there
from scarcade.engine.replaceable import check_replaceable
from scarcade.engine.storage import is_url, shown
from scarcade.jobs.console import Bar, mapping_table, mapping_told, record, training_told
from scarcade.jobs.options import (
    COMMON,
    NO_SECTIONS,
    BatchKey,
    BatchSize,
    Common,
    Epochs,
    FileBatch,
    Files,
    Force,
    Given,
    Json,
    Layer,
    Out,
    Queries,
    Seed,
    Threads,
    Unlabelled,
    Workers,
    flag,
    repeated,
    told,
)
from scarcade.jobs.submit_commands import jobs_app, submit

_BEGAN = time.time()  # of the command, nearly: parsing its options already imports what it runs
app = App(
    name="scarcade",
    help="Train single-cell reference atlases on Ray, straight from disk, and map queries onto them.",
    version=__version__,
    help_format="plaintext",
)
app.command(submit)
app.command(jobs_app)


@app.command
def simulate(
    out: Annotated[str, told("The store to write, OUT.zarr, or its URL.")],
    *,
    cells: Annotated[int, told("Number of cells.")] = 100_000,
    genes: Annotated[int, told("Number of genes.")] = 2_000,
    batches: Annotated[int, told("Number of batches.")] = 5,
    labels: Annotated[int, told("Number of cell types.")] = 8,
    proteins: Annotated[int, told("Number of surface proteins (CITE-seq).")] = 0,
    programs: Annotated[int, told("Number of gene programs.")] = 0,
    seed: Seed = 0,
    force: Force = False,
    common: Common = COMMON,
) -> None:
    """Write a made atlas with a known truth, of any size, out of core."""
    from scarcade.dataloaders.synthetic import simulate as run

    refuse_to_overwrite(out, force)
    check_replaceable(out, "store")
    with Bar("simulating") as bar, told_of_compiling(bar.line):
        store = run(
            out,
            cells=cells,
            genes=genes,
            batches=batches,
            labels=labels,
            proteins=proteins,
            programs=programs,
            seed=seed,
            replace=force,
            progress=lambda done: bar(done, cells),
        )
    print(f"{store.where}: {store.n_cells:,} cells x {store.n_genes:,} genes in {batches} batches")


@app.command
def ingest(
    files: Files,
    *,
    out: Out,
    batch_key: FileBatch = None,
    label_key: Annotated[tuple[str, ...], repeated("Column of obs with labels; the first is the primary one")] = (),
    layer: Layer = None,
    genes: Annotated[str, told("union, intersection, or a file with one gene a line.")] = "union",
    hvg: Annotated[int | None, told("Keep so many highly variable genes (seurat_v3, by batch).")] = None,
    protein_key: Annotated[str | None, told("Entry of obsm with protein counts.")] = None,
    protein_measured_key: Annotated[str | None, told("Column of obs: whether a cell's proteins were measured.")] = None,
    categorical: Annotated[tuple[str, ...], repeated("Further categorical covariate")] = (),
    continuous: Annotated[tuple[str, ...], repeated("Continuous covariate")] = (),
    size_factor: Annotated[str | None, told("Column of obs with the size factor of each cell.")] = None,
    unlabelled: Unlabelled = (),
    allow_noninteger: Annotated[bool, flag("Take counts that are not whole numbers.")] = False,
    seed: Annotated[int, told("Seed of the order of the cells on disk.")] = 0,
    workers: Annotated[int, told("Files read at once, by Ray; 0: one by one in this process.")] = 0,
    append: Annotated[bool, flag("Add the files to the store that is there.")] = False,
    force: Force = False,
    common: Common = COMMON,
) -> None:
    """Make one checked, shuffled, sharded store of many files."""
    refuse_name_of_a_file(out)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's and scipy's, which only look for work here
    from scarcade.dataloaders.ingest import ingest as run

    with Bar("ingesting") as bar, told_of_compiling(bar.line):
        store = run(
            files,
            out,
            batch_key=batch_key,
            label_keys=label_key,
            layer=layer,
            genes=genes,
            hvg=hvg,
            protein_key=protein_key,
            protein_measured_key=protein_measured_key,
            categorical=categorical,
            continuous=continuous,
            size_factor=size_factor,
            unlabelled=unlabelled,
            seed=seed,
            workers=workers,
            append=append,
            replace=force,
            allow_noninteger=allow_noninteger,
            progress=bar.ingesting,
            report=bar.line,
        )
    schema = store.schema
    found = [f"{len(schema.batch)} batches ({schema.batch.name})"]
    found += [f"{len(column)} labels ({column.name})" for column in schema.labels]
    print(f"{store.where}: {store.n_cells:,} cells x {store.n_genes:,} genes, {', '.join(found)}")


@app.command
def train(
    *,
    data: Annotated[str, told("The store to train on, a folder or a URL.")],
    out: Annotated[str, told("Folder (or URL) of the run; the model comes to OUT/model.")],
    model: Annotated[str | None, told("Which model (default: scvi; with --update that of the reference).")] = None,
    recipe: Annotated[str | None, told("scarches: the architecture onto which queries are mapped well.")] = None,
    init_from: Annotated[str | None, told("Folder of a trained model to start from (scanvi: an scvi model).")] = None,
    update: Annotated[str | None, told("Folder of a trained reference that is updated with the data.")] = None,
    update_weights: Annotated[
        str | None, told("surgery: rows of new batches alone train (default); all: everything.")
    ] = None,
    min_genes: Annotated[float | None, told("Share of its genes that the data of an update must have.")] = None,
    programs: Annotated[tuple[Path, ...], repeated("Gene programs, a .gmt file (expimap)")] = (),
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    workers: Workers = None,
    threads: Threads = None,
    batch_key: BatchKey = None,
    label_key: Annotated[str | None, told("The store's primary label column, to make sure of it.")] = None,
    log: Annotated[tuple[str, ...], repeated("Curves for tensorboard, mlflow or wandb too (short for --log.to)")] = (),
    profile: Annotated[
        bool, flag("Tell where the time goes, in OUT/profile.json, with a trace in OUT/profile.")
    ] = False,
    sections: Given = NO_SECTIONS,
    common: Common = COMMON,
) -> None:
    """Train a reference, or update one with new data; the same command again continues the run."""
    from scarcade.jobs.train import train as run

    settings = sections.with_direct(
        epochs=epochs, batch_size=batch_size, workers=workers, threads=threads, log=log or None
    )
    if update_weights is not None:
        settings["update_weights"] = update_weights
    with Bar("training") as bar:
        done = run(
            data,
            model,
            out=out,
            recipe=recipe,
            init_from=init_from,
            update=update,
            min_genes=min_genes,
            programs=programs or None,
            seed=seed,
            batch_key=batch_key,
            label_key=label_key,
            settings=settings,
            profile=_BEGAN if profile else False,
            progress=training_told(bar),
        )
    print(f"{done.path}/model")


@app.command
def tune(
    *,
    data: Annotated[str, told("The store to search on.")],
    out: Annotated[str, told("Folder of the search.")],
    model: Annotated[str | None, told("Which model (default: scvi; with --update that of the reference).")] = None,
    trials: Annotated[int | None, told("Configurations to try (default: 20; with --tune.search grid: all).")] = None,
    refit: Annotated[
        bool, flag("Train a reference on the best configuration; its model comes to OUT/refit/model.")
    ] = False,
    recipe: Annotated[str | None, told("As train takes it.")] = None,
    init_from: Annotated[str | None, told("As train takes it.")] = None,
    update: Annotated[str | None, told("As train takes it.")] = None,
    programs: Annotated[tuple[Path, ...], repeated("Gene programs, a .gmt file (expimap)")] = (),
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    workers: Workers = None,
    threads: Threads = None,
    sections: Given = NO_SECTIONS,
    common: Common = COMMON,
) -> None:
    """Search hyperparameters with Ray Tune; the space is the table [space] of --config. The same command continues."""
    from scarcade.jobs.tune import tune as run
    from scarcade.jobs.tune_live import SearchTable

    settings = sections.with_direct(epochs=epochs, batch_size=batch_size, workers=workers, threads=threads)
    space, objective = settings.pop("space", {}), settings.pop("objective", None)
    with SearchTable() as table:
        found = run(
            data,
            model,
            out=out,
            space=space,
            trials=trials,
            objective=objective,
            recipe=recipe,
            init_from=init_from,
            update=update,
            programs=programs or None,
            seed=seed,
            refit=refit,
            settings=settings,
            progress=table,
        )
    print(found.told())


@app.command(name="map")
def map_(
    model: Annotated[str, told("Folder (or URL) of the reference model, as in runs/NAME/model.")],
    queries: Queries,
    *,
    out: Annotated[str, told("Folder (or URL) of the results.")],
    results: Annotated[Literal["h5ad", "zarr"] | None, told("How results are written (default: h5ad).")] = None,
    merge: Annotated[Path | None, told("A .zarr to write reference and queries to together.")] = None,
    batch_key: FileBatch = None,
    label_key: Annotated[tuple[str, ...], repeated("Known labels, for scoring; in the reference's order")] = (),
    layer: Layer = None,
    unlabelled: Unlabelled = (),
    min_genes: Annotated[float | None, told("Share of the reference's genes that a query must have.")] = None,
    protein_key: Annotated[str | None, told("Entry of obsm with protein counts; default: found out.")] = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    workers: Workers = None,
    threads: Threads = None,
    sections: Given = NO_SECTIONS,
    common: Common = COMMON,
) -> None:
    """Map queries onto a reference by surgery, each on its own; the same command again maps what is not done."""
    from scarcade.jobs.mapping import map_queries

    settings = sections.with_direct(epochs=epochs, batch_size=batch_size, workers=workers, threads=threads)
    if min_genes is not None:
        settings["min_genes"] = min_genes
    if results is not None:
        settings["results"] = results
    if protein_key is not None:
        settings["protein_key"] = protein_key
    if unlabelled:
        settings["unlabelled"] = unlabelled
    with Bar("mapping", unit="epochs") as bar, told_of_compiling(bar.line):
        result = map_queries(
            model,
            queries,
            out,
            merge=merge,
            batch_key=batch_key,
            label_key=label_key,
            layer=layer,
            seed=seed,
            told=mapping_told(bar),
            **settings,
        )
    print(mapping_table(result.queries))
    print(f"{shown(str(result.out))}/report.html")
    if result.merged is not None:
        print(result.merged)
    result.raise_if_failed()


@app.command
def embed(
    model: Annotated[str, told("Folder (or URL) of the model.")],
    data: Annotated[str, told("A store, or an .h5ad or .zarr file; or its URL.")],
    *,
    out: Out,
    output: Annotated[tuple[str, ...], repeated("What else to write: expression, proteins, programs, ...")] = (),
    transform_batch: Annotated[
        tuple[str, ...], repeated("Decode cells as if of this batch; of several, their mean")
    ] = (),
    samples: Annotated[int, told("Draws of the latent that outputs are averaged over; 0: its mean.")] = 0,
    batch_key: BatchKey = None,
    layer: Layer = None,
    batch_size: Annotated[int, told("Cells that are computed at once.")] = 1024,
    threads: Annotated[int | None, told("Threads to compute with.")] = None,
    force: Force = False,
    common: Common = COMMON,
) -> None:
    """Write the latent of any number of cells, and other outputs of the model, streamed."""
    from scarcade.jobs.embed import embed as run

    refuse_to_overwrite(out, force)
    check_replaceable(out, "latent", [model, data])
    with Bar("embedding") as bar, told_of_compiling(bar.line):
        path = run(
            model,
            data,
            out,
            outputs=output,
            settings={"transform_batch": list(transform_batch)} if transform_batch else None,
            n_samples=samples,
            batch_key=batch_key,
            layer=layer,
            batch_size=batch_size,
            threads=threads,
            replace=force,
            progress=bar,
        )
    print(path)


@app.command
def merge(
    model: Annotated[Path, told("Folder of the reference that a query was mapped onto.")],
    delta: Annotated[Path, told("NAME.delta of the query.")],
    *,
    data: Annotated[str | None, told("The query's cells, to stand beside the reference's in its latent.")] = None,
    out: Out,
    batch_key: BatchKey = None,
    layer: Layer = None,
    force: Force = False,
    common: Common = COMMON,
) -> None:
    """Make a mapped query a part of its reference: a model of its own, that knows the query's batches too."""
    from scarcade.jobs.trained import load

    refuse_to_overwrite(out, force)
    check_replaceable(out, "model", [model, delta, data])
    print(load(model, delta=delta).save(out, data, batch_key=batch_key, layer=layer, replace=force))


@app.command(name="import")
def import_(
    model: Annotated[Path, told("model.pt of scvi-tools, its folder, or a folder of scArches.")],
    *,
    out: Out,
    force: Force = False,
    common: Common = COMMON,
) -> None:
    """Make a model of scvi-tools or scArches one of ours. Nothing in its pickles is run."""
    from scarcade.jobs.exchange import import_model as run

    refuse_to_overwrite(out, force)
    check_replaceable(out, "model", [model])
    print(run(model, out, replace=force))


@app.command
def export(
    model: Annotated[str, told("Folder of the model, as in runs/NAME/model; or its URL.")],
    *,
    out: Out,
    force: Force = False,
    common: Common = COMMON,
) -> None:
    """Write a model as scvi-tools has it (scvi, scanvi, totalvi), or scArches (trvae, expimap, scgen)."""
    from scarcade.jobs.exchange import export_model as run

    refuse_to_overwrite(out, force)
    check_replaceable(out, "export", [model])
    done = run(model, out, replace=force)
    for line in (f"{done.name} of {done.tool}", *(f"note: {one}" for one in done.notes)):
        print(line, file=sys.stderr)
    print(done.path)


@app.command
def push(
    model: Annotated[Path, told("Folder of the model, as in runs/NAME/model, or of a query's delta.")],
    url: Annotated[str, told("Where it is to lie: a folder or a URL (s3://, gs://, ...).")],
    *,
    force: Force = False,
    common: Common = COMMON,
) -> None:
    """Put a model where others find it. The same command again finishes what was stopped."""
    from scarcade.jobs.sharing import push as run

    print(run(model, url, replace=force))


@app.command
def pull(
    model: Annotated[str, told("The folder to write.")],
    url: Annotated[str, told("Where the model lies: a URL (s3://, gs://, https://, hf://USER/REPO, ...) or a folder.")],
    *,
    force: Force = False,
    common: Common = COMMON,
) -> None:
    """Fetch a model that others have put there, every byte of it checked."""
    from scarcade.jobs.sharing import pull as run

    if is_url(model):
        if is_url(url):
            raise UsageError(f"{shown(model)}: the folder to write comes first, and is one of this machine")
        model, url = url, model
    print(run(url, model, replace=force))


@app.command
def score(
    latent: Annotated[str, told("latent.zarr, or an .h5ad with a latent in obsm; or its URL.")],
    *,
    labels: Annotated[str | None, told("Column of obs with labels.")] = None,
    batches: Annotated[str | None, told("Column of obs with batches.")] = None,
    predicted: Annotated[str | None, told("Column with predicted labels, compared with --labels.")] = None,
    obsm: Annotated[str | None, told("Which entry of obsm; default: the only X_... that is a latent.")] = None,
    unlabelled: Unlabelled = (),
    max_cells: Annotated[int, told("Scores are those of so many cells, drawn at random.")] = 10_000,
    seed: Seed = 0,
    json: Json = False,
    common: Common = COMMON,
) -> None:
    """Integration and label scores of a latent."""
    from scarcade.jobs.score import score as run

    scores = run(
        latent,
        labels=labels,
        batches=batches,
        predicted=predicted,
        obsm=obsm,
        unlabelled=unlabelled,
        max_cells=max_cells,
        seed=seed,
    )
    rounded = {name: round(value, 4) if math.isfinite(value) else None for name, value in scores.items()}
    print(dumps(rounded, indent=1) if json else record(rounded))


@app.command
def inspect(
    path: Annotated[str, told("A store, model, run, delta, .h5ad or .zarr; or its URL.")],
    *,
    against: Annotated[Path | None, told("A model: can this file be mapped onto it, and if not, why?")] = None,
    batch_key: FileBatch = None,
    label_key: Annotated[tuple[str, ...], repeated("Column with labels, in the reference's order")] = (),
    layer: Layer = None,
    json: Json = False,
    common: Common = COMMON,
) -> None:
    """Say what is in a file or folder, whether it is intact, and whether it can be mapped."""
    from scarcade.jobs.inspect import inspect as run
    from scarcade.jobs.inspect import render

    found = run(path, against, batch_key=batch_key, label_keys=label_key or None, layer=layer)
    print(dumps(found, indent=1) if json else render(found))
    if not found["intact"]:
        raise InputError(f"{shown(path)}: is not intact: {found['problems'][0]}")
    if not found.get("mappable", True):
        raise InputError(f"{shown(path)}: cannot be mapped onto {against}: {found['reasons'][0]}")


@app.command
def demo(
    *,
    out: Annotated[Path, told("Folder of the demonstration.")] = Path("demo"),
    cells: Annotated[int, told("Number of cells to make.")] = 20_000,
    workers: Annotated[int, told("Ray workers to train with.")] = 2,
    seed: Seed = 0,
    force: Annotated[bool, flag("Start over; without it a demonstration continues.")] = False,
    common: Common = COMMON,
) -> None:
    """Simulate, ingest, train on Ray, map three queries and write a report, in about two minutes."""
    from scarcade.jobs.demo import demo as run

    print(run(out, cells=cells, workers=workers, seed=seed, force=force))


def refuse_to_overwrite(out: str, force: bool) -> None:
    """Before any work is done, and not after it.

    Raises:
        UsageError: `out` is there, and `force` was not given.
    """
    refuse_name_of_a_file(out)
    if not force and is_there(out):
        raise UsageError(f"{shown(out)}: exists already; --force replaces it")


def refuse_name_of_a_file(out: str) -> None:
    """A folder of such a name would look like a file that no reader can open.

    Raises:
        UsageError: `out` ends as the name of a file.
    """
    if out.endswith((".h5ad", ".h5")):
        raise UsageError(f"--out {shown(out)}: a folder is written; give it a name that ends in .zarr, or in nothing")
