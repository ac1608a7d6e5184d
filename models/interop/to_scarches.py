"""Our models as the three files of scArches: ``model_params.pt``, ``attr.pkl``, ``var_names.csv``."""

from pathlib import Path
from typing import Any

from torch import Tensor

from scarcade.engine.errors import ModelFileError
from scarcade.models.expimap import Expimap
from scarcade.models.interop import scarches, scgen
from scarcade.models.interop.to_registry import told_of_columns, told_of_counts
from scarcade.models.interop.written import state_dict, write_archive, write_values
from scarcade.models.scgen import Scgen
from scarcade.models.terms import CONSTRAINED, Terms
from scarcade.models.trvae import Trvae


def write_scarches(model: Trvae | Expimap | Scgen, folder: Path) -> tuple[str, list[str]]:
    """Write the three files into `folder`; (class in scArches, what the user should know).

    Raises:
        ModelFileError: scArches has no such model.
    """
    genes = model.schema.genes
    if wrong := [
        gene for gene in genes if len(gene.splitlines()) != 1 or gene != gene.strip() or set(gene) & set("#,")
    ]:
        raise ModelFileError(f"scArches would not read the gene {wrong[0]!r} from var_names.csv as it is")
    state = state_of(model)
    write_archive(state, folder / "model_params.pt")
    write_values(_attributes(model), folder / "attr.pkl")
    (folder / "var_names.csv").write_text("".join(f"{gene}\n" for gene in genes), encoding="utf-8")
    notes = [] if isinstance(model, Scgen) else [told_of_columns(model.schema)]
    notes += told_of_counts(model.schema, "scArches")
    if isinstance(model, Scgen) or model.config.recon_loss == "mse":
        notes.append(f"scArches expects log1p of counts that are scaled to {model.config.target_sum:g} a cell in X")
    if isinstance(model, Expimap):
        notes.append("its files have no place for the names of programs: they are in model.json of this model alone")
    if isinstance(model, Scgen) and len(model.schema.batch) > 1:
        notes.append("scgen of scArches knows no batches: their names are not in the files")
    return {Trvae: "TRVAE", Expimap: "EXPIMAP", Scgen: "scgen"}[type(model)], notes


def state_of(model: Trvae | Expimap | Scgen) -> dict[str, Tensor]:
    """The state dict of the module in scArches.

    Raises:
        ModelFileError: it has no such module.
    """
    if model.schema.size_factor:
        raise ModelFileError(
            f"sizes of cells are from {model.schema.size_factor!r}, in scArches the sums of their counts"
        )
    if not isinstance(model, Scgen):
        if model.config.normalise_input and model.config.recon_loss != "mse":
            raise ModelFileError("the encoder sees normalised counts (normalise_input), in scArches only with mse")
        if model.schema.continuous:
            raise ModelFileError("the model has continuous covariates, for which scArches has no place")
    found = scgen.to_state(model) if isinstance(model, Scgen) else scarches.to_state(model)
    if isinstance(model, Expimap) and not model.config.soft_ext_mask:
        masks = [one.masks() for one in model.modules() if isinstance(one, Terms) and one.covariate == CONSTRAINED]
        if masks and masks[0] is not None:
            found["decoder.L0.ext_L_m.mask"] = masks[0].numpy().T
    return state_dict(found)


def _attributes(model: Trvae | Expimap | Scgen) -> dict[str, Any]:
    config, schema = model.config, model.schema
    common = {
        "hidden_layer_sizes_": list(config.hidden_layer_sizes),
        "dr_rate_": config.dropout_rate,
        "is_trained_": True,
    }
    if isinstance(config, Scgen.Config):
        return {**common, "x_dim_": schema.n_genes, "z_dim_": config.n_latent}
    common |= {
        "condition_key_": schema.batch.name,
        "conditions_": list(schema.batch.values),
        "input_dim_": schema.n_genes,
        "recon_loss_": config.recon_loss,
        "use_bn_": config.norm == "batch",
        "use_ln_": config.norm == "layer",
    }
    if isinstance(config, Trvae.Config):
        return {
            **common,
            "latent_dim_": config.n_latent,
            "use_mmd_": config.use_mmd,
            "mmd_on_": config.mmd_on,
            "mmd_boundary_": config.mmd_boundary,
            "beta_": config.beta,
        }
    assert isinstance(config, Expimap.Config)

    def mask(programs: Any) -> list[list[float]]:
        return [[float(gene in inside) for gene in schema.genes] for inside in map(set, programs.values())]

    return {
        **common,
        "mask_": mask(config.programs),
        "ext_mask_": mask(config.new_programs) or None,
        "latent_dim_": len(config.programs),
        "n_ext_": config.n_ext,
        "n_ext_m_": len(config.new_programs),
        "soft_mask_": config.soft_mask,
        "soft_ext_mask_": config.soft_ext_mask,
        "use_l_encoder_": False,
        "use_hsic_": config.use_hsic,
        "hsic_one_vs_all_": config.hsic_one_vs_all,
        "decoder_last_layer_": config.decoder_last_layer,
    }
