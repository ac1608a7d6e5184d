"""Models in the files of scvi-tools and scArches: what is written is what the originals wrote, tensor by tensor."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scarcade.engine.errors import ModelFileError
from scarcade.engine.schema import Categories
from scarcade.models.expimap import Expimap
from scarcade.models.interop import scvi_tools, totalvi
from scarcade.models.interop.foreign import read_three_files
from scarcade.models.interop.pickles import read_pickle
from scarcade.models.interop.scarches import read_scarches
from scarcade.models.interop.scgen import read_scgen
from scarcade.models.interop.scvi_files import read_files
from scarcade.models.interop.scvi_tools import build, read_scvi_tools
from scarcade.models.interop.to_registry import labels_used, unlabelled_of
from scarcade.models.interop.to_scarches import write_scarches
from scarcade.models.interop.to_scvi_tools import state_of, write_scvi_tools
from scarcade.models.scanvi import Scanvi
from scarcade.models.scgen import Scgen
from scarcade.models.scvi import Scvi
from scarcade.models.totalvi import Totalvi
from scarcade.models.trvae import Trvae
from tests.models.cells import made_schema
from tests.parity.originals import HERE, made_beside, part
from tests.parity.test_scarches_plain import CASES, PROGRAMS, SCHEMA
from tests.shared import shared

MADE = sorted(p.stem for p in HERE.glob("*.npz") if p.stem not in ("scvi_differential", "totalvi_missing"))
COUNTED = ".num_batches_tracked"
OF_CELLS = {"n_obs", "n_cells"}


def without_cells(registry: Any) -> Any:
    """What a registry says of all but single cells."""
    if isinstance(registry, dict):
        return {key: without_cells(value) for key, value in registry.items() if key not in OF_CELLS}
    return registry.tolist() if isinstance(registry, np.ndarray) else registry


def check_state(found: dict[str, Any], theirs: dict[str, np.ndarray], ours: Scvi) -> None:
    """The same names, shapes and kinds of numbers; the same bits but where a model of theirs has what it never uses."""
    assert {key for key in found if not key.endswith(COUNTED)} == {key for key in theirs if not key.endswith(COUNTED)}
    used = totalvi.to_state(ours) if isinstance(ours, Totalvi) else scvi_tools.to_state(ours)
    for key, value in theirs.items():
        if key.endswith(COUNTED):
            continue
        assert found[key].shape == value.shape, key
        assert found[key].dtype == value.dtype, key
        np.testing.assert_array_equal(found[key], value if key in used else 0, err_msg=key)


@pytest.mark.parametrize("name", MADE)
def test_scvi_tools_would_have_written_the_same(name: str, tmp_path: Path) -> None:
    arrays, meta = made_beside(name)
    theirs = part(arrays, "state")
    model = build(theirs, meta["genes"], meta["attributes"], where=name)
    given = meta["attributes"]["registry_"]
    proteins = given["field_registries"].get("proteins")
    kind, _ = write_scvi_tools(model, tmp_path, proteins["data_registry"]["attr_key"] if proteins else "")
    assert kind == given["model_name"]
    state, genes, attributes = read_files(tmp_path)
    check_state(state, theirs, model)
    assert genes == meta["genes"]
    ours, original = without_cells(attributes["registry_"]), without_cells(given)
    original = json.loads(json.dumps(original).replace('"unknown"', '"Unknown"'))  # our name of cells without a label
    fields, wanted = ours["field_registries"], original["field_registries"]
    if labels_used(model) is None:
        del fields["labels"], wanted["labels"]
        original["setup_args"] |= {"labels_key": None} if kind == "SCVI" else {}
    assert fields.keys() == wanted.keys()
    if wanted["batch"]["state_registry"]["original_key"] == "_scvi_batch":  # no column: ours is called batch
        del fields["batch"], wanted["batch"]
        original["setup_args"]["batch_key"] = "batch"
    for field in ("X", "batch", "labels", "extra_categorical_covs", "size_factor"):
        assert fields.get(field) == wanted.get(field), field
    assert ours["setup_args"] == {**original["setup_args"], "layer": ours["setup_args"]["layer"]}
    again = read_scvi_tools(tmp_path / "model.pt")
    assert again.config == model.config
    assert again.schema == replace(model.schema, labels=again.schema.labels, counts_from=again.schema.counts_from)
    assert again.schema.labels in ((), model.schema.labels)
    for part_of, value in model.state_dict().items():
        if not part_of.startswith("adversary"):  # not in their files
            assert torch.equal(again.state_dict()[part_of], value), part_of


@pytest.mark.parametrize("name", ["SCVI_default", "SCVI_covs_genebatch", "SCVI_arches_nb", "SCANVI", "TOTALVI"])
def test_a_model_of_scvi_tools_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    path = shared(f"parity/{name}/ref_model")
    theirs, genes, attributes = read_files(path)
    model = read_scvi_tools(path)
    write_scvi_tools(model, tmp_path, "protein")
    state, ours, written = read_files(tmp_path)
    assert ours == genes
    check_state(state, theirs, model)
    assert written.keys() == attributes.keys()
    content = read_pickle(tmp_path / "model.pt")
    assert content.keys() == {"model_state_dict", "var_names", "attr_dict"}
    assert content["model_state_dict"]["pyro_param_store"] == {"params": {}, "constraints": {}}
    before, after = attributes["registry_"], written["registry_"]
    assert after.keys() == before.keys() - {"_scvi_uuid"}
    for part_of in ("model_name", "setup_method_name", "scvi_version", "setup_args"):
        assert after[part_of] == before[part_of]


@pytest.mark.parametrize("name", ["trVAE_nb", "trVAE_zinb_mmd", "expiMap", "scGen"])
def test_a_model_of_scarches_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    path = shared(f"parity/{name}/ref_model")
    model: Any = read_scgen(path) if name == "scGen" else read_scarches(path)
    write_scarches(model, tmp_path)
    (state, genes, attributes), (theirs, names, wanted) = read_three_files(tmp_path), read_three_files(path)
    assert attributes == wanted
    assert genes == names
    assert state.keys() == theirs.keys()
    for key, value in theirs.items():
        if not key.endswith(COUNTED):
            np.testing.assert_array_equal(state[key], value, err_msg=key)
            assert state[key].dtype == value.dtype


@pytest.mark.parametrize(("kind", "config"), CASES, ids=str)
def test_every_model_of_scarches_can_be_written_and_read(
    kind: type[Trvae] | type[Expimap], config: dict[str, Any], tmp_path: Path
) -> None:
    settings = {"hidden_layer_sizes": (12, 8)} | ({"n_latent": 4} if kind is Trvae else {"programs": PROGRAMS}) | config
    checked: Any = kind.Config.model_validate(settings)
    model: Any = kind(checked, SCHEMA, seed=1)
    if kind is Expimap and model.config.n_ext and model.config.new_programs:
        with pytest.raises(ModelFileError, match="constrained and unconstrained"):
            write_scarches(model, tmp_path)
        return
    write_scarches(model, tmp_path)
    again = read_scarches(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    state = read_pickle(tmp_path / "model_params.pt")
    hard = kind is Expimap and bool(model.config.new_programs) and not model.config.soft_ext_mask
    assert ("decoder.L0.ext_L_m.mask" in state) == hard


def test_what_another_tool_would_compute_differently_is_not_written(tmp_path: Path) -> None:
    schema = replace(made_schema(12, batches="ab", labels="xy"), proteins=tuple("pqrs"))
    for config, told in (
        ({"formulation": "1.2"}, "today's formulas"),
        ({"dispersion": "gene-label"}, "takes no labels"),
        ({"protein_dispersion": "protein-label"}, "takes no labels"),
        ({"deeply_inject_covariates": False}, "first layers alone"),
    ):
        model = Totalvi(Totalvi.Config.model_validate({"n_hidden": 4, "n_latent": 2, **config}), schema)
        with pytest.raises(ModelFileError, match=told):
            state_of(model)
    plain = made_schema(12, batches="ab")
    with pytest.raises(ModelFileError, match="normalise_input"):
        write_scarches(Trvae(Trvae.Config(hidden_layer_sizes=(4,), normalise_input=True), plain), tmp_path)
    for gene in ("a\nb", "IL#2", "a,b", " a"):
        named = replace(plain, genes=(gene, *plain.genes[1:]))
        with pytest.raises(ModelFileError, match="would not read the gene"):
            write_scarches(Scgen(Scgen.Config(hidden_layer_sizes=(4, 4)), named), tmp_path)
    sized = replace(plain, size_factor="size")
    with pytest.raises(ModelFileError, match="from 'size', in scArches the sums"):
        write_scarches(Scgen(Scgen.Config(hidden_layer_sizes=(4, 4)), sized), tmp_path)
    labelled = Scanvi(Scanvi.Config(n_hidden=4, n_latent=2, dispersion="gene-label"), schema)
    with pytest.raises(ModelFileError, match="no dispersion by label"):
        state_of(labelled)
    assert not any(tmp_path.iterdir())


def test_cells_without_a_label_have_a_name_that_is_no_label(tmp_path: Path) -> None:
    schema = replace(made_schema(12, batches="ab"), labels=(Categories("kind", ("Unknown", "T")),))
    _, notes = write_scvi_tools(Scanvi(Scanvi.Config(n_hidden=4, n_latent=2), schema), tmp_path, "")
    assert "'_Unknown' in 'kind'" in notes[-1]
    assert unlabelled_of(replace(schema, unlabelled=("n/a", ""))) == "n/a"
    _, _, attributes = read_files(tmp_path)
    assert attributes["unlabeled_category_"] == "_Unknown"
    labels = attributes["registry_"]["field_registries"]["labels"]["state_registry"]
    assert labels["categorical_mapping"] == ["Unknown", "T", "_Unknown"]
    assert attributes["labels_"] == []  # none of a single cell


@pytest.mark.parametrize(
    ("counts_from", "layer", "told"),
    [
        ("X", None, ""),
        ("counts", "counts", ""),
        ("raw_counts", "raw_counts", ""),
        ("layers/counts", "counts", ""),
        ("raw.X", None, "counts were in raw.X"),
        ("X, counts", None, "counts were in X, counts"),
    ],
)
def test_counts_are_looked_for_where_they_were_or_it_is_told(
    counts_from: str, layer: str | None, told: str, tmp_path: Path
) -> None:
    schema = replace(made_schema(12, batches="ab"), counts_from=counts_from)
    _, notes = write_scvi_tools(Scvi(Scvi.Config(n_hidden=4, n_latent=2), schema), tmp_path, "")
    registry = read_files(tmp_path)[2]["registry_"]
    assert registry["setup_args"]["layer"] == layer
    where = {"attr_name": "layers" if layer else "X", "attr_key": layer}
    assert registry["field_registries"]["X"]["data_registry"] == where
    assert any(told in note for note in notes) if told else not any("counts" in note for note in notes)
    assert read_scvi_tools(tmp_path).schema.counts_from == (layer or "X")
    _, notes = write_scarches(Trvae(Trvae.Config(hidden_layer_sizes=(4,), n_latent=2), schema), tmp_path)
    assert any("scArches takes them from X" in note for note in notes) == (counts_from != "X")


def test_a_linear_classifier_stays_one(tmp_path: Path) -> None:
    schema = made_schema(12, batches="ab", labels="xy")
    config = Scanvi.Config(n_hidden=4, n_latent=2, linear_classifier=True, classifier_layers=2, classifier_hidden=6)
    write_scvi_tools(Scanvi(config, schema), tmp_path, "")
    arguments = read_files(tmp_path)[2]["init_params_"]
    assert arguments["non_kwargs"]["linear_classifier"] is True
    assert "classifier_parameters" not in arguments["kwargs"]["model_kwargs"]


def test_normalised_counts_are_what_scarches_sees_with_squared_errors(tmp_path: Path) -> None:
    config = Trvae.Config(hidden_layer_sizes=(4,), n_latent=2, recon_loss="mse", normalise_input=True)
    write_scarches(Trvae(config, made_schema(12, batches="ab")), tmp_path)
    assert read_scarches(tmp_path).config.recon_loss == "mse"


def test_an_archive_that_is_cut_short_is_told(tmp_path: Path) -> None:
    write_scvi_tools(Scvi(Scvi.Config(n_hidden=4, n_latent=2), made_schema(12, batches="ab")), tmp_path, "")
    path = tmp_path / "model.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelFileError, match=r"model.pt: cannot be read as a model: .*the file is truncated"):
        read_scvi_tools(path)
