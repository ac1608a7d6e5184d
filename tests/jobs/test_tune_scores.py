"""Scores of a trial: of the same cells whatever the trial, never of cells that it trained on."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from scarcade.dataloaders.loader import stream
from scarcade.dataloaders.store import Store
from scarcade.dataloaders.synthetic import simulate
from scarcade.engine.errors import GenesError, NonFiniteError, UsageError
from scarcade.engine.loop import fit
from scarcade.jobs.train_config import TrainConfig, resolved
from scarcade.jobs.train_work import built
from scarcade.jobs.tune_cells import LEARNT, SCORED, learnt_cells, scored_cells
from scarcade.jobs.tune_scores import LOSSES, METRICS, SCORES, check_metrics, validation_scores
from scarcade.models.model import AtlasModel
from tests.jobs.conftest import Atlas

SMALL = {"model": {"n_hidden": 16, "n_latent": 4}}


@pytest.fixture(scope="module")
def store(atlas: Atlas) -> Store:
    return atlas.store


def configured(store: Store, name: str = "scvi", **data: float) -> TrainConfig:
    return resolved({**SMALL, "data": data}, name=name, store=store)


def trained(config: TrainConfig, store: Store, *, epochs: int) -> AtlasModel:
    model = built(config, store.schema)
    loader = stream(store, "train", config.data, seed=0, lanes=1)
    fit(model, loader, None, config.optim.model_copy(update={"epochs": epochs, "lr": 4e-3}))
    return model


@pytest.mark.long
def test_a_trained_model_scores_better_than_one_that_is_not(store: Store) -> None:
    config = configured(store)
    before = validation_scores(built(config, store.schema), store, config, list(SCORES), 0)
    model = trained(config, store, epochs=12)
    model.train()
    after = validation_scores(model, store, config, list(SCORES), 0)
    assert model.training
    assert list(after) == list(SCORES)
    assert all(0 <= value <= 1 for value in after.values()), after
    assert after["label_accuracy"] > before["label_accuracy"] + 0.1
    assert after["label_accuracy"] > 0.7
    assert after["label_score"] > before["label_score"]
    assert after["total"] == pytest.approx(0.6 * after["label_score"] + 0.4 * after["batch_score"])
    assert validation_scores(model, store, config, ["ilisi"], 0) == {"ilisi": after["ilisi"]}


def test_a_classifier_is_asked_itself(store: Store) -> None:
    config = configured(store, "scanvi")
    model = built(config, store.schema)
    scores = validation_scores(model, store, config, ["label_accuracy", "label_f1"], 0)
    cells = scored_cells(store, store.schema, 0.1)
    model.eval()
    with torch.no_grad():
        predicted = torch.cat([model.predict_labels(batch).argmax(-1) for batch in cells.loader.epoch(0)]).numpy()
    assert cells.labels is not None
    assert scores["label_accuracy"] == pytest.approx(np.mean(predicted == cells.labels))


def test_cells_are_the_same_whatever_a_trial_holds_out_and_are_never_trained_on(store: Store) -> None:
    few = scored_cells(store, store.schema, 0.1)
    many = scored_cells(store, store.schema, 0.4)
    assert np.array_equal(few.rows, many.rows)
    assert few.rows[-1] < store.n_before(0.1)
    assert len(few) <= SCORED
    learnt = learnt_cells(store, store.schema, 0.1)
    assert np.array_equal(learnt.rows, learnt_cells(store, store.schema, 0.4).rows)
    assert learnt.rows[0] >= store.n_before(0.5)
    assert len(learnt) <= LEARNT


def test_cells_are_those_of_the_store(store: Store) -> None:
    cells = scored_cells(store, store.schema, 0.1)
    assert cells.labels is not None
    assert np.array_equal(cells.batches, store.codes("batch")[cells.rows])
    assert np.array_equal(cells.labels, store.codes("label")[cells.rows])
    batches = list(cells.loader.epoch(0))
    ours = torch.cat([batch.counts.dense(torch.device("cpu")) for batch in batches]).numpy()
    whole = stream(store, "all", configured(store).data, seed=0, lanes=1, shuffle=False)
    theirs = torch.cat([batch.counts.dense(torch.device("cpu")).clone() for batch in whole.epoch(0)]).numpy()
    assert np.array_equal(ours, theirs[cells.rows])


def test_cells_without_a_label_are_left_out(tmp_path: Path) -> None:
    store = simulate(
        tmp_path / "a.zarr", cells=1_500, genes=60, batches=2, labels=3, seed=3, unlabelled=0.6, proteins=4
    )
    cells = scored_cells(store, store.schema, 0.1)
    assert cells.labels is not None
    assert 10 <= len(cells) < 0.7 * store.n_before(0.1)
    assert cells.labels.min() >= 0
    assert np.array_equal(cells.labels, store.codes("label")[cells.rows])
    (batch,) = cells.loader.epoch(0)
    assert batch.proteins is not None
    counts = store.proteins(0, store.n_cells)
    assert counts is not None
    assert np.array_equal(batch.proteins.numpy(), counts[0][cells.rows])
    config = resolved({"model": {"n_hidden": 16}}, name="totalvi", store=store)
    scores = validation_scores(built(config, store.schema), store, config, ["total", "label_accuracy"], 0)
    assert set(scores) == {"total", "label_accuracy"}


def test_a_share_that_is_too_small_or_too_large_is_an_error(store: Store) -> None:
    for share, told in ((0.02, "holds out .* cells .* first .* Set it to 0.1"), (0.7, "last half .* set it to 0.5")):
        config = configured(store, validation=share)
        with pytest.raises(UsageError, match=f"--data.validation {share}: .*{told}"):
            validation_scores(built(config, store.schema), store, config, ["label_accuracy"], 0)
    with pytest.raises(UsageError, match=r"--data\.validation is 0"):
        check_metrics(["elbo"], store, 0.0)


def test_an_unknown_metric_is_told_with_all_that_there_are() -> None:
    with pytest.raises(UsageError, match="metric 'accurracy': there is no such metric") as error:
        check_metrics(["elbo", "accurracy"])
    assert all(name in str(error.value) for name in METRICS)
    assert {metric.mode for metric in LOSSES.values()} == {"min"}
    assert {metric.mode for metric in SCORES.values()} == {"max"}


def test_a_loss_is_not_computed_here(store: Store) -> None:
    config = configured(store)
    with pytest.raises(UsageError, match=r"'elbo': stands in metrics.jsonl"):
        validation_scores(built(config, store.schema), store, config, ["elbo"], 0)


def test_what_a_store_lacks_is_told_before_a_search(tmp_path: Path) -> None:
    store = simulate(tmp_path / "one.zarr", cells=600, genes=40, batches=1, labels=1, seed=3)
    check_metrics(["elbo", "loss"], store, 0.1)
    with pytest.raises(UsageError, match=r"'nmi': the scored cells of .* have one value alone in 'label'"):
        check_metrics(["nmi"], store, 0.1)
    for name in ("ilisi", "batch_score"):
        with pytest.raises(UsageError, match=f"'{name}': needs batches to mix"):
            check_metrics([name], store, 0.1)
    none = simulate(tmp_path / "none.zarr", cells=600, genes=40, batches=2, labels=2, seed=3, unlabelled=0.99)
    with pytest.raises(UsageError, match=r"[0-9] have a label"):
        check_metrics(["label_accuracy"], none, 0.1)


def test_a_store_without_label_column_has_batch_scores_alone(store: Store) -> None:
    bare = replace(store.schema, labels=())
    labelled, store.schema = store.schema, bare
    try:
        config = configured(store)
        model = built(config, bare)
        assert set(validation_scores(model, store, config, ["batch_score", "kbet"], 0)) == {"batch_score", "kbet"}
        with pytest.raises(UsageError, match=r"'label_accuracy': needs labels, .* has none"):
            validation_scores(model, store, config, ["label_accuracy"], 0)
    finally:
        store.schema = labelled


def test_a_latent_that_is_not_finite_is_an_error(store: Store) -> None:
    config = configured(store)
    model = built(config, store.schema)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="latent of"):
        validation_scores(model, store, config, ["total"], 0)


def test_a_model_of_other_genes_is_refused(store: Store) -> None:
    other = replace(store.schema, genes=tuple(reversed(store.schema.genes)))
    with pytest.raises(GenesError, match="other genes than the model"):
        scored_cells(store, other, 0.1)


def test_scores_take_a_second_at_most(tmp_path: Path) -> None:
    store = simulate(tmp_path / "a.zarr", cells=21_000, genes=500, batches=4, labels=6, seed=0)
    config = configured(store)
    model = built(config, store.schema)
    validation_scores(model, store, config, list(SCORES), 0)  # what is compiled is compiled
    took = []
    for _ in range(3):  # beside other work a processor's caches and clock are not ours
        began = time.process_time()
        validation_scores(model, store, config, list(SCORES), 0)
        took.append(time.process_time() - began)
    assert min(took) < 5.0  # 0.3 where nothing else runs, 2.6 beside three others on two cores
