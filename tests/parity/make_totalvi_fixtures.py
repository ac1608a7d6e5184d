"""Makes ``totalvi_*.npz`` beside it: tiny TOTALVI models of scvi-tools 1.4.2 with what they compute, as plain arrays.

Run it where scvi-tools is installed (``pip install scarcade[parity]``); nothing of scarcade is needed:

    python -m tests.parity.make_totalvi_fixtures

As make_fixtures.py, from the root of the project. Batch b2 of the reference has no proteins (all zero, which
scvi-tools takes for missing) where a case says so, and b4 of the query has none.
"""

import logging
import warnings
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scvi
import torch

from tests.parity.make_fixtures import COVARIATES, Noiseless, cells, save, state

N_PROTEINS = 6
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool, bool]] = {
    # name: (arguments of setup_anndata, of TOTALVI, whether b2 lacks proteins, whether a query is mapped)
    "default": ({}, {}, False, True),
    "missing": ({}, {"use_layer_norm": "both", "use_batch_norm": "none"}, True, True),
    "covariates": (
        COVARIATES,
        {"gene_dispersion": "gene-batch", "protein_dispersion": "protein-batch", "gene_likelihood": "zinb"},
        True,
        False,
    ),
    "latent_library": ({}, {"use_observed_lib_size": False, "n_layers_decoder": 2}, False, False),
    "decoder_only": ({}, {"encode_covariates": False}, False, False),
    "logistic_normal": ({"size_factor_key": "size"}, {"latent_distribution": "ln"}, False, False),
}


def with_proteins(adata: anndata.AnnData, without: list[str]) -> anndata.AnnData:
    rng = np.random.default_rng(2)
    label = adata.obs["label"].str[1:].astype(int).to_numpy()
    high = (np.arange(N_PROTEINS) % 3)[None, :] == label[:, None]
    y = rng.poisson(np.where(high, 40.0, 4.0) * rng.gamma(4.0, 0.25, (len(label), 1)))
    y[adata.obs["batch"].isin(without)] = 0
    columns = [f"protein{i}" for i in range(N_PROTEINS)]
    adata.obsm["protein"] = pd.DataFrame(y.astype(np.float32), index=adata.obs_names, columns=columns)
    return adata


def expected(model: scvi.model.TOTALVI, adata: anndata.AnnData) -> dict[str, np.ndarray]:
    """What the module computes for all cells at once, the gradients of the mean loss, and what users ask for."""
    module = model.module
    module.eval()
    (tensors,) = list(model._make_data_loader(adata=adata, batch_size=10_000))
    _, _, half = module(tensors, loss_kwargs={"kl_weight": 0.5})
    module.zero_grad()
    inference, generative, loss = module(tensors, loss_kwargs={"kl_weight": 1.0})
    loss.loss.backward()
    py = generative["py_"]
    found = {
        "qz_m": inference["qz"].loc,
        "qz_scale": inference["qz"].scale,
        "library": inference["library_gene"],
        "px_rate": generative["px_"]["rate"],
        "rate_back": py["rate_back"],
        "rate_fore": py["rate_fore"],
        "mixing": py["mixing"],
        "genes": loss.reconstruction_loss["reconst_loss_gene"],
        "proteins": loss.reconstruction_loss["reconst_loss_protein"],
        "kl_z": loss.kl_local["kl_div_z"],
        "kl_l": loss.kl_local["kl_div_l_gene"],
        "kl_background": loss.kl_local["kl_div_back_pro"],
        "loss": loss.loss,
        "loss_half": half.loss,
    }
    out = {f"expected/{name}": value.detach().numpy() for name, value in found.items()}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            out[f"gradient/{name}"] = parameter.grad.numpy().copy()
    where = {"transform_batch": ["b0", "b1"]}
    genes, proteins = model.get_normalized_expression(adata, return_numpy=True, **where)
    out["expected/denoised_genes"], out["expected/denoised_proteins"] = genes, proteins
    _, background = model.get_normalized_expression(adata, return_numpy=True, include_protein_background=True, **where)
    out["expected/with_background"] = background
    out["expected/foreground"] = model.get_protein_foreground_probability(adata, return_numpy=True, **where)
    return out


def case(name: str, setup: dict[str, Any], init: dict[str, Any], missing: bool, with_query: bool) -> None:
    scvi.settings.seed = 0
    everything = with_proteins(cells(5), ["b2", "b4"] if missing else [])
    chosen = everything.obs.batch.isin(["b0", "b1", "b2"]).to_numpy()
    reference, query = everything[chosen].copy(), everything[~chosen].copy()
    scvi.model.TOTALVI.setup_anndata(
        reference, **{"batch_key": "batch", "protein_expression_obsm_key": "protein", **setup}
    )
    model = scvi.model.TOTALVI(reference, n_latent=3, n_hidden=8, **init)
    model.train(
        max_epochs=3,
        batch_size=18,
        accelerator="cpu",
        enable_progress_bar=False,
        logger=False,
        early_stopping=False,
        reduce_lr_on_plateau=False,
    )
    attributes = {"registry_": dict(model.registry_), "init_params_": model.init_params_}
    meta = {"scvi_version": scvi.__version__, "genes": list(reference.var_names), "attributes": attributes}
    meta["obs"] = reference.obs[["batch", "label", "cat"]].to_dict("list")
    meta["missing"] = missing
    arrays = {"x": reference.X.toarray(), "y": reference.obsm["protein"].to_numpy()}
    arrays |= {"cont": reference.obs["cont"], "size": reference.obs["size"], **state(model, "state")}
    with Noiseless():
        arrays |= expected(model, reference)
        if with_query:
            mapped = scvi.model.TOTALVI.load_query_data(query, model)
            found = state(mapped, "state") | expected(mapped, query)
            found |= {"x": query.X.toarray(), "y": query.obsm["protein"].to_numpy()}
            arrays |= {f"query/{k}": v for k, v in found.items()}
            meta["query_obs"] = query.obs[["batch", "label", "cat"]].to_dict("list")
    save(name, arrays, meta, model="totalvi")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for case_name, arguments in CASES.items():
        case(case_name, *arguments)
