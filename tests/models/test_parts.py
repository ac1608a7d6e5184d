"""All models train on batches in parts (`--optim.accumulate`), from a store."""

from pathlib import Path
from typing import Any

import pytest
import torch

from scarcade.dataloaders.labelled import with_labelled
from scarcade.dataloaders.loader import LoaderConfig, stream
from scarcade.dataloaders.store import Store
from scarcade.dataloaders.stratified import stratified
from scarcade.dataloaders.synthetic import simulate
from scarcade.engine.loop import fit
from scarcade.engine.optim import OptimConfig
from scarcade.engine.state import FitResult
from scarcade.models import MODELS
from scarcade.models.model import AtlasModel

# none has statistics of a batch, whose parts have others
SMALL: dict[str, dict[str, Any]] = {
    "scvi": {"use_batch_norm": "none", "use_layer_norm": "both", "n_hidden": 16},
    "scanvi": {"use_batch_norm": "none", "use_layer_norm": "both", "n_hidden": 16},
    "totalvi": {"use_batch_norm": "none", "use_layer_norm": "both", "n_hidden": 16},
    "trvae": {"hidden_layer_sizes": (16, 8), "use_mmd": False},
    "expimap": {"hidden_layer_sizes": (16,)},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("parts") / "a.zarr"
    return simulate(path, cells=450, genes=60, batches=3, labels=3, unlabelled=0.3, proteins=5, seed=1)


def trained(name: str, store: Store, parts: int, **changes: Any) -> tuple[AtlasModel, FitResult]:
    kind = MODELS[name]
    settings = {**SMALL.get(name, {}), **changes}
    if name == "expimap":
        settings["programs"] = {f"p{i}": store.schema.genes[8 * i : 8 * i + 14] for i in range(6)}
    model = kind(kind.Config.model_validate(settings), store.schema, seed=3)
    config = LoaderConfig(batch_size=64)
    cells = stream(store, "train", config, seed=0)
    if kind.training_defaults(store.n_cells).get("data", {}).get("stratify"):
        cells = stratified(cells, seed=0)
    loader = with_labelled(cells, config, seed=0) if kind.labelled_beside else cells
    return model, fit(model, loader, None, OptimConfig(epochs=2, accumulate=parts), seed=0)


@pytest.mark.long
@pytest.mark.parametrize("name", SMALL)
def test_the_weights_are_those_of_whole_batches(name: str, store: Store) -> None:
    (whole, wanted), (parted, found) = (trained(name, store, parts) for parts in (1, 3))
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(parted.state_dict()[key], value, rtol=1e-4, atol=1e-4, msg=key)
    for line, expected in zip(found.history, wanted.history, strict=True):
        assert line.keys() == expected.keys()
        for term in (key for key in expected if "/" in key):
            assert line[term] == pytest.approx(expected[term], rel=1e-4, abs=1e-4), term


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("scvi", {"use_batch_norm": "both", "use_layer_norm": "none"}),
        ("totalvi", {"use_batch_norm": "both", "use_layer_norm": "none"}),
        ("scgen", {"hidden_layer_sizes": (16, 8)}),
        ("trvae", {"use_mmd": True}),
        ("expimap", {"use_hsic": True, "n_ext": 2}),
    ],
)
def test_what_is_of_a_batch_is_of_each_part(name: str, changes: dict[str, Any], store: Store) -> None:
    _, found = trained(name, store, 8, **changes)
    assert found.history[-1]["train/elbo"] < found.history[0]["train/elbo"]


def test_a_last_batch_of_fewer_cells_than_parts(tmp_path: Path) -> None:
    few = simulate(tmp_path / "few.zarr", cells=70, genes=60, batches=2, labels=2, seed=1)
    model, found = trained("scvi", few, 8)
    assert found.steps == 2
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
