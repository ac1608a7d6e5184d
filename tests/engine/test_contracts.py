"""Schema, Noise and Batch."""

import json

import pytest
import torch

from scarcade.engine.contracts import Noise
from scarcade.engine.errors import ModelFileError
from scarcade.engine.schema import Categories, Schema

SCHEMA = Schema(
    genes=("A", "B"),
    batch=Categories("batch", ("b0", "b1")),
    labels=(Categories("cell_type", ("B", "T")),),
    proteins=("CD3",),
)


def test_a_schema_survives_json() -> None:
    again = Schema.from_dict(json.loads(json.dumps(SCHEMA.to_dict())))
    assert again == SCHEMA
    assert again.fingerprint() == SCHEMA.fingerprint()


def test_another_gene_order_is_another_schema() -> None:
    raw = SCHEMA.to_dict() | {"genes": ("B", "A")}
    assert Schema.from_dict(raw).fingerprint() != SCHEMA.fingerprint()


@pytest.mark.parametrize("broken", [{"batch": None}, {"labels": 3}, {"genes": None}])
def test_a_malformed_schema_is_an_error_of_ours(broken: dict[str, object]) -> None:
    with pytest.raises(ModelFileError, match="schema"):
        Schema.from_dict(SCHEMA.to_dict() | broken)


def test_extending_categories_keeps_old_codes() -> None:
    assert SCHEMA.batch.extended(["z", "b1", "a"]).values == ("b0", "b1", "a", "z")


def test_a_cell_meets_the_same_noise_however_lanes_are_dealt() -> None:
    def lane(which: int) -> tuple[tuple[int, ...], int]:
        return ((0, 17, which), 3)

    together = Noise([lane(0), lane(1), lane(2)])
    whole = [together.normal(4), together.uniform(2)]
    for which in range(3):
        alone = Noise([lane(which)])
        cells = slice(3 * which, 3 * which + 3)
        assert torch.equal(alone.normal(4), whole[0][cells])
        assert torch.equal(alone.uniform(2), whole[1][cells])


def test_lanes_and_steps_differ() -> None:
    draws = [Noise([((0, step, lane), 5)]).normal(3) for step in range(3) for lane in range(3)]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 9


def test_dropout_keeps_the_mean() -> None:
    ones = torch.ones(20_000, 4)
    dropped = Noise([((1, 2), 20_000)]).dropout(ones, 0.25)
    assert sorted(set(dropped.flatten().tolist())) == pytest.approx([0.0, 4 / 3])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)
    assert Noise([((1, 2), 4)]).dropout(ones[:4], 0.0) is not None
