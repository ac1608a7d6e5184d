"""Makes ``scanvi_*.npz`` beside it: tiny SCANVI models of scvi-tools 1.4.2 with what they compute, as plain arrays.

As make_fixtures.py, from the root of the project:

    python -m tests.parity.make_scanvi_fixtures
"""

import logging
import warnings
from typing import Any

import anndata
import numpy as np
import scvi
import torch

from tests.parity.make_fixtures import ARCHES, Noiseless, cells, save, state

RATIO = 50
UNKNOWN = "unknown"
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    # name: (arguments of setup_anndata, arguments of SCANVI, whether a query is mapped)
    "default": ({}, {}, True),
    "arches": ({}, ARCHES, True),
    "linear": ({}, {"linear_classifier": True, "gene_likelihood": "nb"}, False),
    "covariates": (
        {"categorical_covariate_keys": ["cat"]},
        {"encode_covariates": True, "dispersion": "gene-batch", "n_layers": 2},
        False,
    ),
    "latent_library": ({}, {"use_observed_lib_size": False, "encode_covariates": True}, False),
}


def labelled(adata: anndata.AnnData) -> np.ndarray:
    return np.flatnonzero((adata.obs["label"] != UNKNOWN).to_numpy())


def expected(model: scvi.model.SCANVI, adata: anndata.AnnData) -> dict[str, np.ndarray]:
    """What the module computes for all cells at once, and the gradients of the mean loss."""
    module = model.module
    module.eval()
    module.zero_grad()
    (tensors,) = list(model._make_data_loader(adata=adata, batch_size=10_000))
    (beside,) = list(model._make_data_loader(adata=adata, indices=labelled(adata), batch_size=10_000))
    inference, generative = module(tensors, compute_loss=False)
    loss = module.loss(
        tensors, inference, generative, kl_weight=1.0, labelled_tensors=beside, classification_ratio=RATIO
    )
    loss.loss.backward()
    out = {
        "qz_m": inference["qz"].loc,
        "qz_scale": inference["qz"].scale,
        "reconstruction": loss.reconstruction_loss["reconstruction_loss"],
        "kl": loss.kl_local["kl_local"],
        "classification": loss.classification_loss,
        "logits": loss.logits,
        "loss": loss.loss,
    }
    found = {f"expected/{k}": v.detach().numpy() for k, v in out.items()}
    found["expected/soft"] = model.predict(adata, soft=True).to_numpy()
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            found[f"gradient/{name}"] = parameter.grad.numpy()
    return found


def case(name: str, setup: dict[str, Any], init: dict[str, Any], with_query: bool) -> None:
    scvi.settings.seed = 0
    everything = cells(5)
    names = everything.obs["label"].to_numpy(dtype=object)
    names[::4] = UNKNOWN
    everything.obs["label"] = names
    chosen = everything.obs.batch.isin(["b0", "b1", "b2"]).to_numpy()
    reference, query = everything[chosen].copy(), everything[~chosen].copy()
    scvi.model.SCANVI.setup_anndata(
        reference, labels_key="label", unlabeled_category=UNKNOWN, batch_key="batch", **setup
    )
    model = scvi.model.SCANVI(reference, n_hidden=8, n_latent=3, **init)
    model.train(max_epochs=3, batch_size=18, accelerator="cpu", enable_progress_bar=False, logger=False)
    attributes = {"registry_": dict(model.registry_), "init_params_": model.init_params_}
    meta = {"scvi_version": scvi.__version__, "genes": list(reference.var_names), "attributes": attributes}
    meta["obs"] = reference.obs[["batch", "label", "cat"]].to_dict("list")
    arrays = {"x": reference.X.toarray()} | state(model, "state")
    with Noiseless():
        arrays |= expected(model, reference)
        if with_query:
            mapped = scvi.model.SCANVI.load_query_data(query, model)
            found = state(mapped, "state") | expected(mapped, query) | {"x": query.X.toarray()}
            arrays |= {f"query/{k}": v for k, v in found.items()}
            meta["query_obs"] = query.obs[["batch", "label", "cat"]].to_dict("list")
    save(name, arrays, meta, model="scanvi")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for case_name, (setup_arguments, init_arguments, query_too) in CASES.items():
        case(case_name, setup_arguments, init_arguments, query_too)
