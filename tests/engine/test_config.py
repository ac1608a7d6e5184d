"""Configuration from TOML and overrides."""

import tomllib
from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from scarcade.engine.config import Section, checked, merged, nested, read_toml, to_toml
from scarcade.engine.errors import UsageError


class _Optim(Section):
    lr: float = Field(1e-3, gt=0)
    max_steps: int | None = None


class _Job(Section):
    optim: _Optim = _Optim()
    seed: int = 0


def test_overrides_win_over_the_file_and_the_result_reads_back() -> None:
    raw = merged({"optim": {"lr": 0.1, "max_steps": 5}}, nested({"optim.lr": 0.2, "seed": 7}))
    job = checked(_Job, raw)
    assert (job.optim.lr, job.optim.max_steps, job.seed) == (0.2, 5, 7)
    assert checked(_Job, tomllib.loads(to_toml(job))) == job


def test_dashes_in_names_count_as_underscores() -> None:
    assert checked(_Job, nested({"optim.max-steps": 3})).optim.max_steps == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optim.lrr": 1.0}, "--optim.lrr: there is no such setting"),
        ({"optim.lr": -1.0}, "--optim.lr: Input should be greater than 0"),
        ({"seed": "x"}, "--seed: Input should be a valid integer"),
    ],
)
def test_a_wrong_field_is_named(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        checked(_Job, nested(overrides))


def test_a_section_within_a_larger_one_is_named_and_values_are_left_alone() -> None:
    with pytest.raises(UsageError, match=r"^--model\.optim\.lr: .*given: 'a--b'"):
        checked(_Job, {"optim": {"lr": "a--b"}}, prefix="model.")


def test_fields_are_named_as_options_and_keys_of_a_user_as_they_are() -> None:
    class Inner(Section):
        a_number: int = 0
        own_names: dict[str, int] = Field(default_factory=dict)
        a_list: tuple[int, ...] = ()

    class Outer(Section):
        in_ner: Inner | None = None

    for raw, told in (
        ({"a_number": "x"}, "--in-ner.a-number: "),
        ({"own_names": {"T_cell": "x"}}, "--in-ner.own-names.T_cell: "),
        ({"a_list": [1, "x"]}, "--in-ner.a-list: "),
        ({"no_field": 1}, "--in-ner.no-field: there is no such setting"),
    ):
        with pytest.raises(UsageError, match=f"^{told}"):
            checked(Outer, {"in_ner": raw})


def test_a_value_has_no_fields() -> None:
    with pytest.raises(UsageError, match="'seed' is a value"):
        nested({"seed": 1, "seed.x": 2})


def test_nothing_is_changed_after_it_is_resolved() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        _Job().seed = 3  # type: ignore[misc]


@pytest.mark.parametrize("content", [b"a = ", b"\xff"])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"c\.toml: not valid TOML"):
        read_toml(path)
    with pytest.raises(UsageError, match="No such file"):
        read_toml(tmp_path / "none.toml")
