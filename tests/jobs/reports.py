"""Reports to look at in tests: of labels and names that would like to be programs, and of a crowd of labels."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np

from scarcade.engine.schema import Categories, Schema
from scarcade.jobs.mapping import map_queries
from scarcade.jobs.projection import project
from scarcade.jobs.query_task import Job, MapConfig
from scarcade.jobs.reference import TransferConfig, load_reference
from scarcade.jobs.report import write_report
from scarcade.jobs.results import Record, Results
from tests.jobs.conftest import Atlas, train_on

EVIL = "</script><script>document.title='pwned'</script>"
HOSTILE = f"{EVIL}<!--<img src=x onerror=document.title='pwned'>\u2028]]>{{{{ 7*7 }}}}"
SETTINGS: dict[str, Any] = {"epochs": 3, "report": {"picture": "pca"}}


class Relabelled:
    """What `train_on` wants of a store, with other labels."""

    def __init__(self, atlas: Atlas, labels: Categories) -> None:
        self.schema: Schema = replace(atlas.store.schema, labels=(labels,))
        self.fingerprint = atlas.store.fingerprint


def relabelled(atlas: Atlas, folder: Path, values: tuple[str, ...]) -> tuple[Path, ad.AnnData]:
    """A reference whose cells have the labels `values` in turn, and a query for it."""
    cells = atlas.store.to_anndata(["batch0", "batch1"])
    cells.obs["batch"] = cells.obs["batch"].astype(str)
    cells.obs["label"] = np.array(values, object)[np.arange(cells.n_obs) % len(values)]
    store: Any = Relabelled(atlas, Categories("label", values))
    model = train_on(cells, store, folder / "model", epochs=2)
    return model, ad.read_h5ad(atlas.query)


def hostile_report(atlas: Atlas, folder: Path, n: int = 1) -> Path:
    """`n` good queries and a broken one; their labels, batches, names, reasons and warnings are all hostile."""
    model, query = relabelled(atlas, folder, (HOSTILE, "x" * 1_000_000, "<b>T</b> & co", "CD4 T"))
    query.obs["batch"] = HOSTILE
    queries = {"good": query, "broken": ad.AnnData(query.X[:, :1])}
    out = folder / "out"
    good, broken = map_queries(model, queries, out, batch_key=None, **SETTINGS).queries
    good = {**good, "name": f"<b>good</b> {HOSTILE}", "warnings": [HOSTILE], "batch_key": HOSTILE, "path": HOSTILE}
    broken = {**broken, "name": f"\udcff {HOSTILE}", "reason": HOSTILE}
    return write_report(job_of(model, out), [*[good] * n, broken], 1.0)


def job_of(model: Path, out: Path) -> Job:
    """As `map_queries` makes it."""
    config = MapConfig(optim={"epochs": 3})
    reference = load_reference(model, TransferConfig())
    assert reference.latent is not None
    return Job(reference, config, Results(out), project(reference.latent.mean, "pca"))


def crowd(record: Record, n: int) -> list[Record]:
    """`n` records like one."""
    return [{**record, "name": f"patient {i}", "beyond": round(i / n, 4)} for i in range(n)]
