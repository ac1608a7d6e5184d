"""The sentences of the report."""

import pytest

from scarcade.jobs.report_words import level, percent, sentence, short


@pytest.mark.parametrize(
    ("n", "beyond", "expected", "told"),
    [
        (1000, 0.62, "far", "62 % of its cells lie farther out than 95 % of the reference's own: it holds what the"),
        (1000, 0.14, "notable", "some may be of a kind that the reference does not hold."),
        (
            1000,
            0.05,
            "usual",
            "5.0 % of its cells lie farther out than 95 % of the reference's own; about 5 % is usual.",
        ),
        (4, 0.75, "far", "3 of its 4 cells lie farther out"),
        (4, 0.5, "usual", "2 of its 4 cells lie farther out"),
        (1, 1.0, "usual", "Its one cell lies farther out than 95 % of the reference's own."),
        (1, 0.0, "usual", "Its one cell does not lie farther out"),
        (0, None, "", ""),
        (None, None, "", ""),
    ],
)
def test_what_is_beyond_the_reference_is_said(n: int | None, beyond: float | None, expected: str, told: str) -> None:
    assert level(n, beyond) == expected
    assert told in sentence(n, beyond)


def test_text_that_is_safe_to_look_at() -> None:
    assert len(short("y" * 500)) == 80
    assert short("CD4 T") == "CD4 T"
    assert (
        short("a\x00b\x1bc\udcff") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c\N{REPLACEMENT CHARACTER}"
    )


def test_percent() -> None:
    assert [percent(value) for value in (0, 0.004, 0.094, 0.096, 0.62, 1.0)] == [
        "0 %",
        "0.4 %",
        "9.4 %",
        "10 %",
        "62 %",
        "100 %",
    ]
