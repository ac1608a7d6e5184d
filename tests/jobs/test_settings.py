"""Dotted options against sections."""

from typing import Literal

import pytest
from pydantic import Field

from scarcade.engine.config import Section, checked, nested
from scarcade.engine.errors import UsageError
from scarcade.jobs.settings import check_tables, help_text, overrides, settings_of, split


class Inner(Section):
    depth: int = Field(2, description="How deep.")


class Optim(Section):
    lr: float = Field(1e-3, description="Learning rate.")
    clip: float | None = Field(None, description="Largest norm.")
    early_stopping: bool = Field(False, description="Stop early.")
    kind: Literal["adam", "sgd"] = Field("adam", description="Which.")
    sizes: tuple[int, ...] = Field((1, 2), description="Sizes.")
    inner: Inner = Inner()


class Config(Section):
    optim: Optim = Optim()


KNOWN = settings_of({"optim": Optim})


def read(*argv: str) -> Optim:
    rest, pairs = split(argv)
    assert rest == []
    return checked(Config, nested(overrides(pairs, KNOWN, "train"))).optim


def test_every_field_has_a_dotted_name() -> None:
    assert list(KNOWN) == [
        "optim.lr",
        "optim.clip",
        "optim.early-stopping",
        "optim.kind",
        "optim.sizes",
        "optim.inner.depth",
    ]


def test_values_are_read_by_their_type() -> None:
    assert read("--optim.lr", "1e-2").lr == 0.01
    assert read("--optim.lr=2").lr == 2.0
    assert read("--optim.clip", "none").clip is None
    assert read("--optim.kind", "sgd").kind == "sgd"
    assert read("--optim.sizes", "[3, 4]").sizes == (3, 4)
    assert read("--optim.sizes", "3,4").sizes == (3, 4)
    assert read("--optim.inner.depth", "7").inner.depth == 7
    assert read("--optim.early_stopping", "true").early_stopping
    assert not read("--optim.early-stopping", "False").early_stopping


def test_a_flag_needs_no_value_and_takes_none_that_is_an_option() -> None:
    rest, pairs = split(["--optim.early-stopping", "--data", "a.zarr"])
    assert rest == ["--data", "a.zarr"]
    assert overrides(pairs, KNOWN, "train") == {"optim.early-stopping": "true"}


def test_what_is_no_setting_stays_on_the_command_line() -> None:
    argv = ["map", "model", "./a.h5ad", "--out=o.x", "--epochs", "-1", "--", "--optim.lr", "1"]
    assert split(argv) == (argv, [])


def test_a_negative_value_is_a_value() -> None:
    assert split(["--optim.lr", "-1"])[1] == [("optim.lr", "-1")]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--optim.lrate", "1"], "did you mean"),
        (["--optim.zzz", "1"], r"\[optim\] has lr, clip"),
        (["--other.x", "1"], "its sections are optim"),
        (["--optim.lr"], "wants a value"),
        (["--optim.lr", "1", "--optim.lr", "1"], "given twice"),
    ],
)
def test_what_cannot_be_meant_is_told(argv: list[str], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        read(*argv)


def test_tables_of_a_file_are_checked_too() -> None:
    check_tables({"optim": {"early_stopping": True, "inner": {"depth": 1}}}, KNOWN, "train", "f.toml")
    with pytest.raises(UsageError, match=r"f\.toml: --optim\.lrr"):
        check_tables({"optim": {"lrr": 1}}, KNOWN, "train", "f.toml")


def test_help_says_values_meaning_and_default() -> None:
    text = help_text(KNOWN)
    assert "[optim]" in text
    assert "--optim.kind adam|sgd" in text
    assert "Learning rate. (default: 0.001)" in text
    assert "[optim.inner]" in text
