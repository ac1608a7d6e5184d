from pathlib import Path
from typing import Any

import pytest

from scarcade.dataloaders.store import Store
from scarcade.dataloaders.synthetic import simulate
from scarcade.engine.errors import UsageError
from scarcade.jobs.tune_space import Fixed, all_parameters, check_space, described, random_parameters, space_of

TABLE: dict[str, Any] = {
    "model": {"n-latent": {"choice": [5, 10]}},
    "optim.lr": {"loguniform": [1e-4, 1e-2]},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return simulate(tmp_path_factory.mktemp("space") / "a.zarr", cells=300, genes=30, batches=2, labels=2, seed=0)


def checked(store: Store, table: dict[str, Any], **given: Any) -> None:
    check_space(space_of(table), Fixed(given, name="scvi", recipe=None, seed=0), store)


def test_fields_may_be_dotted_or_in_tables(store: Store) -> None:
    checked(store, TABLE)
    assert list(space_of(TABLE)) == ["model.n_latent", "optim.lr"]
    assert described(space_of(TABLE), TABLE)["model.n_latent"] == {"choice": [5, 10]}


def test_the_nth_trial_depends_on_the_seed_and_its_number_alone() -> None:
    space = space_of(TABLE)
    turned = space_of(dict(reversed(TABLE.items())))
    trials = [random_parameters(space, 3, number) for number in range(5)]
    assert trials == [random_parameters(turned, 3, number) for number in range(5)]
    assert trials != [random_parameters(space, 4, number) for number in range(5)]
    assert len({str(trial) for trial in trials}) == 5


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({}, r"\[space\]: is empty"),
        ({"model.n_latnet": {"choice": [5]}}, "model.n-latnet: .* did you mean model.n-latent"),
        ({"modle.n_latent": {"choice": [5]}}, "modle.n-latent"),
        ({"model.n_latent": {"choice": [5, "many"]}}, r"model.n_latent: cannot be 'many': .*integer"),
        ({"model.n_latent": {"choice": [5, 0]}}, "model.n_latent: cannot be 0"),
        ({"model.n_latent": {"uniform": [5, 20]}}, r"model.n_latent: cannot be [0-9.]+: .*fractional"),
        ({"optim.lr": {"uniform": [-1, 1]}}, r"optim.lr: cannot be -1.0"),
        ({"model.gene_likelihood": {"choice": ["nb", "gamma"]}}, "model.gene_likelihood: cannot be 'gamma'"),
        ({"data.validation": {"choice": [0.1, 0.2]}}, "cannot be searched: it decides which cells"),
        ({"optim.epochs": {"choice": [5, 10]}}, "--epochs says how many"),
        ({"scale.threads": {"choice": [1, 2]}}, "scale.threads: cannot be searched"),
    ],
)
def test_a_space_that_cannot_be_is_told_before_anything_starts(store: Store, table: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        checked(store, table)


def test_a_field_is_fixed_or_searched(store: Store) -> None:
    with pytest.raises(UsageError, match=r"optim.lr: is fixed too \(--optim.lr\)"):
        checked(store, TABLE, optim={"lr": 1e-3})


def test_cells_must_be_held_out(store: Store) -> None:
    with pytest.raises(UsageError, match=r"--data.validation 0: trials are compared on held-out cells"):
        checked(store, TABLE, data={"validation": 0})


def test_seed_and_recipe_may_be_searched(store: Store, tmp_path: Path) -> None:
    table = {"seed": {"choice": [0, 1]}, "recipe": {"choice": ["scarches"]}}
    checked(store, table)
    config = Fixed({}, name="scvi", recipe=None, seed=0).config({"seed": 1, "recipe": "scarches"}, store)
    assert (config.seed, config.recipe) == (1, "scarches")


def test_a_grid_is_every_combination() -> None:
    space = space_of({"model.n_latent": {"grid": [5, 10]}, "optim.lr": {"choice": [1e-3, 1e-2]}})
    assert [tuple(one.values()) for one in all_parameters(space)] == [(5, 1e-3), (5, 1e-2), (10, 1e-3), (10, 1e-2)]
    with pytest.raises(UsageError, match=r"optim.lr: --tune.search grid wants"):
        all_parameters(space_of(TABLE))
