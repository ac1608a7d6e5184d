"""A query that is trained among others takes the path that it takes alone, whatever its company."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor

from scarcade.dataloaders.loader import CellLoader, Columns, LoaderConfig, in_memory
from scarcade.dataloaders.stratified import stratified
from scarcade.engine.contracts import Batch
from scarcade.engine.errors import NonFiniteError, UsageError
from scarcade.engine.loop import fit
from scarcade.engine.optim import OptimConfig
from scarcade.engine.pack import Member, Pack
from scarcade.engine.schema import Schema
from scarcade.models import MODELS
from scarcade.models.model import AtlasModel
from scarcade.models.packed import Packed, put_rows, rows_of, why_alone
from scarcade.models.surgery import SurgeryConfig, grow, reference_hash
from tests.models.cells import made_schema

SCHEMA = made_schema(60, batches="abc", labels="xy")
PROGRAMS = {f"p{i}": SCHEMA.genes[8 * i : 8 * i + 14] for i in range(5)}
SMALL: dict[str, dict[str, Any]] = {
    "scvi": {**MODELS["scvi"].recipes["scarches"], "n_hidden": 16, "n_latent": 4},
    "scanvi": {**MODELS["scanvi"].recipes["scarches"], "n_hidden": 16, "n_latent": 4},
    "trvae": {"hidden_layer_sizes": (16, 8), "n_latent": 4, "recon_loss": "zinb", "beta": 5.0},
    "expimap": {"programs": PROGRAMS, "hidden_layer_sizes": (16,), "n_ext": 2, "use_hsic": True},
}
DATA = LoaderConfig(batch_size=32, validation=0.0, read_ahead=False, lanes=2)
OPTIM = OptimConfig(epochs=4, lr=1e-2, kl_epochs=3, weight_decay=1e-3)
QUERIES = ((75, "x"), (9, "y"), (64, "xy"), (1, "x"), (140, "xyz"))  # cells, new batches; names come twice


class Doubles:
    """Counts in float64, for a model in float64."""

    def __init__(self, counts: Any) -> None:
        self._counts, self.shape, self.csr = counts, counts.shape, counts.csr

    def dense(self, device: torch.device) -> Tensor:
        dense: Tensor = self._counts.dense(device)
        return dense.double()

    def log1p(self, device: torch.device, kind: torch.dtype = torch.float32) -> Tensor:
        logs = torch.log1p(self.dense(device))
        return logs if kind == torch.float32 else logs.to(kind)


class DoubleLoader:
    """A loader whose counts are float64."""

    def __init__(self, loader: CellLoader) -> None:
        self._loader, self.schema, self.waited = loader, loader.schema, 0.0
        self.n_cells, self.steps_per_epoch, self.fingerprint = (
            loader.n_cells,
            loader.steps_per_epoch,
            loader.fingerprint,
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for batch in self._loader.epoch(epoch, start):
            yield replace(batch, counts=Doubles(batch.counts))


@dataclass
class Query:
    """Made cells of a query, and the reference grown for them."""

    name: str
    grown: AtlasModel
    loader: Callable[..., CellLoader]

    def member(self, *, validation: bool = False, stratify: bool = False, known: bool = True) -> Member:
        train = self.loader("train" if validation else "all", validation=0.3 if validation else 0.0)
        held_out = self.loader("validation", validation=0.3) if validation else None
        double = next(self.grown.parameters()).dtype == torch.float64
        ordered = self.loader("all", lanes=1, shuffle=False)
        found = [self.grown.constants(batch) for batch in (DoubleLoader(ordered) if double else ordered).epoch(0)]
        loaders: list[Any] = [stratified(train, seed=0) if stratify else train, held_out]
        if double:
            loaders = [None if one is None else DoubleLoader(one) for one in loaders]
        constants = {name: torch.cat([one[name] for one in found]) for name in found[0]} if known else {}
        return Member(self.name, rows_of(self.grown), loaders[0], loaders[1], 0, constants)


def reference(name: str, *, double: bool = False, schema: Schema = SCHEMA, **changes: Any) -> AtlasModel:
    kind = MODELS[name]
    model = kind(kind.Config.model_validate({**SMALL[name], **changes}), schema, seed=3)
    return (model.double() if double else model).eval()


def query_of(model: AtlasModel, number: int, n: int, new: str, *, poison: bool = False) -> Query:
    rng = np.random.default_rng(number)
    known = model.schema
    schema = replace(known, batch=known.batch.extended([f"new {one}" for one in new]))
    x = rng.poisson(rng.gamma(0.4, 2.0, (n, known.n_genes))).astype(np.float32)
    if poison:
        x[n // 2, :] = np.inf
    categorical = []
    if known.categorical:
        values = (*known.categorical[0].values, "w")
        schema = replace(schema, categorical=(replace(known.categorical[0], values=values),))
        categorical.append(rng.integers(0, len(values), n))
    first, last = len(known.batch), len(schema.batch)
    columns = Columns(batch=rng.integers(first, last, n), labels=np.full(n, -1), categorical=tuple(categorical))

    def loader(split: str, *, validation: float = 0.0, **settings: Any) -> CellLoader:
        config = DATA.model_copy(update={"validation": validation})
        return in_memory(sp.csr_matrix(x), columns, schema, config, seed=0, split=split, **settings)  # type: ignore[arg-type]

    return Query(f"q{number}", grow(model, schema, seed=0, share=True), loader)


def queries(model: AtlasModel, places: Sequence[int] = range(len(QUERIES))) -> list[Query]:
    return [query_of(model, place, *QUERIES[place]) for place in places]


def trained(model: AtlasModel, members: Sequence[Member], optim: OptimConfig = OPTIM, late: int = 0) -> None:
    """Train `members` together; the last of them boards `late` steps after the others."""
    pack = Pack(Packed(model, grow(model, model.schema, seed=0)), optim)
    for member in members[: len(members) - 1 if late else len(members)]:
        pack.board(member)
    for _ in range(late):
        pack.step()
    if late:
        pack.board(members[-1])
    while pack.members:
        pack.step()


def same(one: Member, other: Member) -> bool:
    return one.rows.keys() == other.rows.keys() and all(torch.equal(one.rows[k], other.rows[k]) for k in one.rows)


@pytest.mark.long
@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("name", SMALL)
def test_weights_and_latent_are_those_of_training_alone(name: str, double: bool) -> None:
    model = reference(name, double=double)
    before = reference_hash(model)
    packed, alone = queries(model), queries(model)
    members = [one.member() for one in packed]
    trained(model, members)
    tolerance = 1e-6 if double else 1e-4
    for one, other, member in zip(packed, alone, members, strict=True):
        start = rows_of(other.grown)
        train: Any = other.loader("all")
        result = fit(other.grown, DoubleLoader(train) if double else train, None, OPTIM, seed=0)
        wanted = rows_of(other.grown)
        assert max(float((wanted[k] - start[k]).abs().max()) for k in wanted) > 1e-2  # it learnt something
        for table, rows in member.rows.items():
            torch.testing.assert_close(rows, wanted[table], rtol=tolerance, atol=tolerance)
        put_rows(one.grown, member.rows)
        ordered: Any = one.loader("all", lanes=1, shuffle=False)
        for batch in (DoubleLoader(ordered) if double else ordered).epoch(0):
            for found, at in zip(one.grown.embed(batch), other.grown.embed(batch), strict=True):
                torch.testing.assert_close(found, at, rtol=tolerance, atol=tolerance)
        assert member.state.step == result.steps
        assert [line["epoch"] for line in member.state.history] == [line["epoch"] for line in result.history]
        for ours, line in zip(member.state.history, result.history, strict=True):
            assert ours["kl_weight"] == line["kl_weight"]
            for term in line:
                if term.startswith("train/"):
                    assert ours[term] == pytest.approx(line[term], rel=1e-4, abs=1e-4)
    assert reference_hash(model) == before


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in SMALL),
        # products with as few columns take other ways through MKL on some processors
        *(("scvi", {"n_latent": n}) for n in (1, 10)),
        ("expimap", {"n_ext": 1, "hidden_layer_sizes": (33,)}),
        ("scanvi", {"n_latent": 10, "linear_classifier": True}),
        ("trvae", {"n_latent": 10, "hidden_layer_sizes": (10, 7)}),
        ("scvi", {"n_latent": 6, "n_hidden": 9, "gene_likelihood": "zinb"}),
    ],
)
def test_a_query_has_the_same_bits_in_any_company(name: str, changes: dict[str, Any]) -> None:
    model = reference(name, **changes)
    members = [one.member() for one in queries(model)]
    trained(model, members)
    for places, late in (((4,), 0), ((3,), 0), ((2, 0), 0), ((1, 3, 4), 5), ((4, 3, 2, 1, 0), 7)):
        others = [one.member() for one in queries(model, places)]
        trained(model, others, late=late)
        for place, other in zip(places, others, strict=True):
            assert same(members[place], other), (place, places)
            assert [line["train/loss"] for line in other.state.history] == [
                line["train/loss"] for line in members[place].state.history
            ]


@pytest.mark.long
def test_rates_and_early_stopping_are_each_query_s_own() -> None:
    model = reference("scvi")
    optim = OptimConfig(
        epochs=30, lr=0.5, kl_epochs=0, plateau=True, plateau_patience=0, early_stopping=True, stop_patience=2
    )
    alone, together = queries(model, (0, 2, 4)), queries(model, (0, 2, 4))
    members = [one.member(validation=True) for one in together]
    trained(model, members, optim)
    ends = set()
    for one, member in zip(alone, members, strict=True):
        train, held_out = one.loader("train", validation=0.3), one.loader("validation", validation=0.3)
        result = fit(one.grown, train, held_out, optim, seed=0)
        assert (member.state.stopped, member.state.epoch) == (result.stopped, result.epochs)
        assert [line["lr"] for line in member.state.history] == [line["lr"] for line in result.history]
        ends.add(result.epochs)
    assert len(ends) > 1  # they did not all stop at once
    assert min(ends) < 30


def test_batches_that_are_met_equally_often() -> None:
    model = reference("trvae")
    members = [one.member(stratify=True) for one in queries(model)]
    trained(model, members)
    (alone,) = [one.member(stratify=True) for one in queries(model, (4,))]
    trained(model, [alone])
    assert same(members[4], alone)


def test_gradients_are_clipped_for_each_query() -> None:
    model, optim = reference("scvi"), OPTIM.model_copy(update={"clip": 0.05})
    members = [one.member() for one in queries(model)]
    trained(model, members, optim)
    (alone,) = queries(model, (0,))
    fit(alone.grown, alone.loader("all"), None, optim, seed=0)
    for table, rows in rows_of(alone.grown).items():
        torch.testing.assert_close(members[0].rows[table], rows, rtol=1e-4, atol=1e-4)


def test_covariates_of_one_name_are_each_query_s_own() -> None:
    schema = made_schema(60, batches="abc", categorical=("uv",))
    model = reference("scvi", schema=schema)
    members = [one.member() for one in queries(model)]
    assert {len(rows) for rows in members[0].rows.values()} == {1}
    assert any("categorical_0" in table for table in members[0].rows)
    trained(model, members)
    (alone,) = queries(model, (2,))
    fit(alone.grown, alone.loader("all"), None, OPTIM, seed=0)
    for table, rows in rows_of(alone.grown).items():
        torch.testing.assert_close(members[2].rows[table], rows, rtol=1e-4, atol=1e-4)


def test_one_that_is_not_finite_leaves_and_the_others_do_not_notice() -> None:
    model = reference("scvi")
    members = [one.member() for one in queries(model, (0, 2))]
    bad = query_of(model, 7, 40, "x", poison=True).member()
    trained(model, [members[0], bad, members[1]])
    assert isinstance(bad.error, NonFiniteError)
    assert "not finite" in str(bad.error)
    others = [one.member() for one in queries(model, (0, 2))]
    trained(model, others)
    assert all(same(one, other) and one.error is None for one, other in zip(members, others, strict=True))


@pytest.mark.parametrize("name", SMALL)
def test_without_what_is_known_of_cells_the_weights_are_the_same(name: str) -> None:
    model = reference(name)
    first, second = (queries(model, (2,))[0].member(known=known) for known in (True, False))
    trained(model, [first])
    trained(model, [second])
    for table, rows in first.rows.items():
        torch.testing.assert_close(rows, second.rows[table], rtol=1e-4, atol=1e-4)


def test_what_couples_queries_is_named() -> None:
    plain, norm = reference("scvi"), reference("scvi", use_batch_norm="both")
    one_more = replace(SCHEMA, batch=SCHEMA.batch.extended(["new"]))

    def reason(of: AtlasModel, **surgery: Any) -> str | None:
        return why_alone(grow(of, one_more, seed=0, config=SurgeryConfig(**surgery)))

    assert reason(plain) is None
    assert reason(plain, query_mode="train") is None  # dropout is each cell's own
    assert reason(norm) is None
    assert "batch norm" in (reason(norm, query_mode="train") or "")
    assert "decoder" in (reason(norm, train_decoder_norm=True) or "")
    assert "library" in (reason(reference("scvi", use_observed_lib_size=False)) or "")
    assert "terms" in (reason(reference("expimap"), model={"n_ext": 1}) or "")


def test_a_query_without_rows_cannot_board() -> None:
    model = reference("scvi")
    pack = Pack(Packed(model, grow(model, model.schema, seed=0)), OPTIM)
    member = queries(model, (0,))[0].member()
    member.rows = {}
    with pytest.raises(UsageError, match="no row"):
        pack.board(member)
