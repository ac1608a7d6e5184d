"""What tests of every model share: one small store that all of them can train on, and what each is told.

A model that is new in MODELS is in these tests by itself; it has a line here only if it cannot do without a setting.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anndata as ad

from scarcade.dataloaders.ingest import ingest
from scarcade.dataloaders.store import Store
from scarcade.dataloaders.synthetic import simulate
from scarcade.engine.gradients import running_statistics
from scarcade.engine.schema import Schema
from scarcade.jobs.train import train
from scarcade.models import MODELS

EVERY = list(MODELS)
NARROW = {"n_hidden": 8, "hidden_layer_sizes": [8], "n_latent": 3}
"""For models that have these settings."""
ALL_PARTS: dict[str, Callable[[Schema], dict[str, Any]]] = {
    "scanvi": lambda _: {"dispersion": "gene-batch"},
    "trvae": lambda _: {"recon_loss": "zinb", "beta": 10.0},
    "totalvi": lambda _: {"protein_dispersion": "protein-batch"},
    "expimap": lambda schema: {
        "programs": {f"p{i}": schema.genes[5 * i : 5 * i + 10] for i in range(4)},
        **{"soft_mask": True, "alpha_l1": 0.5, "alpha_l1_epochs": 4, "anneal_every": 1},
        **{"n_ext": 2, "use_hsic": True, "gamma_ext": 0.1, "gamma_epochs": 3},
    },
}
"""Settings that a model cannot do without, or with which more of it is at work."""


def made_store(path: Path) -> Store:
    """300 cells of three batches with Ensembl ids, some unlabelled, the last batch without proteins."""
    made = path.with_name(f"made-{path.name}")
    cells = simulate(
        made, cells=300, genes=60, batches=3, labels=3, proteins=12, protein_batches=2, unlabelled=0.3, seed=5
    ).to_anndata()
    cells.var_names = [f"ENSG{i:011d}" for i in range(cells.n_vars)]
    measured = cells.obsm.pop("protein_measured").to_numpy(bool)
    cells.obsm["proteins"] = cells.obsm.pop("protein_counts").astype(float).where(measured)
    cells.write_h5ad(path.with_suffix(".h5ad"))
    return ingest(
        path.with_suffix(".h5ad"),
        path,
        batch_key="batch",
        label_keys=["label"],
        protein_key="proteins",
        report=lambda _: None,
    )


def made_query(path: Path, batch: str = "new") -> ad.AnnData:
    """Cells of the first batch of `made_store(path)` as those of a batch that no reference knows."""
    cells = ad.read_h5ad(path.with_suffix(".h5ad"))
    cells = cells[cells.obs["batch"] == cells.obs["batch"].cat.categories[0]].copy()
    cells.obs["batch"] = batch
    cells.obs_names = [f"q{i}" for i in range(cells.n_obs)]
    return cells


def settings_of(name: str, schema: Schema, **optim: Any) -> dict[str, Any]:
    """Of a small training; every step has something of all that a model has."""
    fields = MODELS[name].Config.model_fields
    return {
        "model": {
            **{field: value for field, value in NARROW.items() if field in fields},
            **(ALL_PARTS[name](schema) if name in ALL_PARTS else {}),
        },
        "optim": {"epochs": 2, "eps": 0.01, "kl_epochs": 1.0, "log_every": 1, **optim},
        "data": {"batch_size": 64},
        "scale": {"threads": 1},
    }


def recipe_of(name: str) -> str | None:
    """That for surgery, of a model that has recipes."""
    return "scarches" if "scarches" in MODELS[name].recipes else None


def same_on_any_workers(name: str, schema: Schema) -> dict[str, Any]:
    """`settings_of` that make the loss of a global batch a function of it alone.

    Batch norm normalises with a worker's own part of the batch: models that have it train with running statistics.
    """
    settings = settings_of(name, schema)
    kind = MODELS[name]
    recipe = kind.recipes.get(recipe_of(name) or "", {})
    model = kind(kind.Config.model_validate({**recipe, **settings["model"]}), schema)
    if running_statistics(model):
        settings["optim"]["mode"] = "eval"
    return settings


def trained_models(
    store: Store, folder: Path, changes: Mapping[str, Mapping[str, Any]] | None = None
) -> Callable[[str], Path]:
    """A model on the store by its name, in `folder`; each is trained once. `changes`: of the settings of a model."""

    def model(name: str) -> Path:
        if not (folder / name).is_dir():
            settings = settings_of(name, store.schema)
            settings["model"] |= (changes or {}).get(name, {})
            train(store, name, out=folder / name, recipe=recipe_of(name), settings=settings, progress=lambda _: None)
        return folder / name / "model"

    return model
