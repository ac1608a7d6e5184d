"""Makes ``scvi_*.npz`` beside it: tiny SCVI models of scvi-tools 1.4.2 with what they compute, as plain arrays.

Run it where scvi-tools is installed (``pip install scarcade[parity]``); nothing of scarcade is needed:

    python tests/parity/make_fixtures.py

Noise is replaced by its mean (every draw of a normal variable), models are in evaluation mode, and the KL
weight is 1, so that every number is a function of the weights and the cells. Counts are simulated.
"""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scvi
import torch
from scipy import sparse
from scvi.model.base._de_core import _fdr_de_prediction
from scvi.model.base._differential import DifferentialComputation

HERE = Path(__file__).parent
N_GENES, PER_BATCH = 20, 12
ARCHES: dict[str, Any] = {
    "n_layers": 2,
    "encode_covariates": True,
    "use_layer_norm": "both",
    "use_batch_norm": "none",
    "gene_likelihood": "nb",
    "dropout_rate": 0.2,
}
COVARIATES = {"categorical_covariate_keys": ["cat"], "continuous_covariate_keys": ["cont"]}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    # name: (arguments of setup_anndata, arguments of SCVI, whether a query is mapped)
    "default": ({}, {}, True),
    "arches": ({}, ARCHES, True),
    "covariates": (COVARIATES, {"n_layers": 2, "encode_covariates": True, "dispersion": "gene-batch"}, False),
    "latent_library": ({}, {"use_observed_lib_size": False, "encode_covariates": True, "gene_likelihood": "nb"}, True),
    "size_factor": ({"size_factor_key": "size"}, {"gene_likelihood": "nb"}, False),
    "gene_label": ({"labels_key": "label"}, {"dispersion": "gene-label"}, False),
    "gene_cell": ({}, {"dispersion": "gene-cell", "gene_likelihood": "nb"}, False),
    "poisson": ({}, {"gene_likelihood": "poisson"}, False),
    "normal": ({}, {"gene_likelihood": "normal", "log_variational": False}, False),
    "logistic_normal": ({}, {"latent_distribution": "ln"}, False),
    "one_batch": ({"batch_key": None}, {}, False),
    "shallow": ({}, {**ARCHES, "deeply_inject_covariates": False}, True),
}


def cells(n_batches: int) -> anndata.AnnData:
    rng = np.random.default_rng(0)
    n = n_batches * PER_BATCH
    programs = rng.gamma(0.7, 3.0, (3, N_GENES))
    label = rng.integers(0, 3, n)
    x = rng.poisson(programs[label] * rng.gamma(3.0, 0.4, (n, 1)))
    obs = pd.DataFrame(
        {
            "batch": np.repeat([f"b{i}" for i in range(n_batches)], PER_BATCH),
            "label": [f"t{i}" for i in label],
            "cat": [f"c{i}" for i in rng.integers(0, 2, n)],
            "cont": rng.normal(size=n).astype(np.float32),
            "size": (x.sum(1) / x.sum(1).mean() * 10 + 1).astype(np.float32),
        },
        index=[f"cell{i}" for i in range(n)],
    )
    var = pd.DataFrame(index=[f"gene{i}" for i in range(N_GENES)])
    return anndata.AnnData(sparse.csr_matrix(x.astype(np.float32)), obs=obs, var=var)


def expected(model: scvi.model.SCVI, adata: anndata.AnnData) -> dict[str, np.ndarray]:
    """What the module computes for all cells at once, and the gradients of the mean loss."""
    module = model.module
    module.eval()
    module.zero_grad()
    scdl = model._make_data_loader(adata=adata, batch_size=10_000)
    (tensors,) = list(scdl)
    inference, generative, loss = module(tensors, loss_kwargs={"kl_weight": 1.0})
    loss.loss.backward()
    px = generative["px"]
    out = {
        "qz_m": inference["qz"].loc,
        "qz_scale": inference["qz"].scale,
        "library": inference["library"],
        "rate": getattr(px, "mu", None) if getattr(px, "mu", None) is not None else px.mean,
        "reconstruction": loss.reconstruction_loss["reconstruction_loss"],
        "kl_z": loss.kl_local["kl_divergence_z"],
        "kl_l": loss.kl_local["kl_divergence_l"] * torch.ones(adata.n_obs),
        "loss": loss.loss,
    }
    if getattr(px, "zi_logits", None) is not None:
        out["dropout"] = px.zi_logits
    found = {f"expected/{k}": v.detach().numpy() for k, v in out.items()}
    last = model.adata_manager.get_state_registry("batch").categorical_mapping[-1]
    found["expected/normalised"] = model.get_normalized_expression(adata, transform_batch=last, return_numpy=True)
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            found[f"gradient/{name}"] = parameter.grad.numpy()
    return found


def save(name: str, arrays: dict[str, np.ndarray], meta: dict[str, Any], model: str = "scvi") -> None:
    """One flat vector and its index: a thousand small arrays would be mostly headers."""
    index, parts, at = {}, [], 0
    for key, value in arrays.items():
        value = np.asarray(value, dtype=np.float32)
        index[key] = [at, list(value.shape)]
        parts.append(value.ravel())
        at += value.size
    text = json.dumps({"index": index, "meta": meta}, default=lambda v: np.asarray(v).tolist())
    np.savez_compressed(
        HERE / f"{model}_{name}.npz",
        values=np.concatenate(parts),
        json=np.frombuffer(text.encode(), dtype=np.uint8),
    )


def state(model: scvi.model.SCVI, prefix: str) -> dict[str, np.ndarray]:
    return {f"{prefix}/{k}": v.numpy() for k, v in model.module.state_dict().items() if "tracked" not in k}


def case(name: str, setup: dict[str, Any], init: dict[str, Any], with_query: bool) -> None:
    scvi.settings.seed = 0
    everything = cells(5)
    chosen = everything.obs.batch.isin(["b0", "b1", "b2"]).to_numpy()
    reference, query = everything[chosen].copy(), everything[~chosen].copy()
    scvi.model.SCVI.setup_anndata(reference, **{"batch_key": "batch", **setup})
    model = scvi.model.SCVI(reference, n_hidden=8, n_latent=3, **init)
    model.train(max_epochs=3, batch_size=18, accelerator="cpu", enable_progress_bar=False, logger=False)
    attributes = {"registry_": dict(model.registry_), "init_params_": model.init_params_}
    meta = {"scvi_version": scvi.__version__, "genes": list(reference.var_names), "attributes": attributes}
    meta["obs"] = reference.obs[["batch", "label", "cat"]].to_dict("list")
    arrays = {"x": reference.X.toarray(), "cont": reference.obs["cont"], "size": reference.obs["size"]}
    arrays |= state(model, "state")
    with Noiseless():
        arrays |= expected(model, reference)
        if with_query:
            mapped = scvi.model.SCVI.load_query_data(query, model)
            for batch_norm in mapped.module.modules():
                if isinstance(batch_norm, torch.nn.BatchNorm1d):
                    batch_norm.eval()
            found = state(mapped, "state") | expected(mapped, query) | {"x": query.X.toarray()}
            arrays |= {f"query/{k}": v for k, v in found.items()}
            meta["query_obs"] = query.obs[["batch", "label", "cat"]].to_dict("list")
    save(name, arrays, meta)


class Noiseless:
    """Draws of normal variables are their means."""

    def __enter__(self) -> None:
        normal: Any = torch.distributions.Normal
        self.old: tuple[Any, Any] = normal.rsample, normal.sample
        normal.rsample = normal.sample = lambda self, shape=(): self.mean.expand(*shape, *self.mean.shape)

    def __exit__(self, *_: object) -> None:
        normal: Any = torch.distributions.Normal
        normal.rsample, normal.sample = self.old


def differential() -> None:
    """Their Bayes factors from given draws of frequencies, so that the arithmetic can be compared."""
    rng = np.random.default_rng(1)
    adata = cells(2)
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    model = scvi.model.SCVI(adata, n_hidden=8, n_latent=3)
    in1 = (adata.obs.label == "t0").to_numpy()
    draws = {
        (side, batch): rng.dirichlet(np.linspace(0.2, 3.0, N_GENES) * (1.0 + side * rng.random(N_GENES)), 40)
        for side in range(2)
        for batch in (None, "b0", "b1")
    }
    arrays = {"x": adata.X.toarray(), "in1": in1}
    for (side, batch), value in draws.items():
        draws[side, batch] = value.astype(np.float32)
        arrays[f"draws/{side}/{batch}"] = draws[side, batch]

    def given(adata: object, indices: np.ndarray, transform_batch: str | None, n_samples_overall: int) -> np.ndarray:
        side = 0 if in1[indices].all() else 1
        return draws[side, transform_batch]

    settings = {
        "vanilla": {"mode": "vanilla", "use_observed_batches": True},
        "change": {"mode": "change", "delta": 0.25, "use_observed_batches": True},
        "two": {"mode": "change", "delta": 0.5, "test_mode": "two", "use_observed_batches": True},
        "corrected": {"mode": "change", "delta": 0.25, "use_observed_batches": False},
    }
    columns = {}
    for name, arguments in settings.items():
        computation = DifferentialComputation(given, None, model.adata_manager)
        found = computation.get_bayes_factors(in1, ~in1, **arguments)
        columns[name] = list(found)
        for key, value in found.items():
            arrays[f"{name}/{key}"] = np.broadcast_to(np.asarray(value), N_GENES)
        if "proba_de" in found:
            calls = _fdr_de_prediction(pd.Series(found["proba_de"]).sort_values(ascending=False), fdr=0.3)
            arrays[f"{name}/calls"] = calls.sort_index().to_numpy()
    save("differential", arrays, {"columns": columns, "scvi_version": scvi.__version__})


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for case_name, (setup_arguments, init_arguments, query_too) in CASES.items():
        case(case_name, setup_arguments, init_arguments, query_too)
    differential()
