"""What the report says of a query in plain words: how far it lies from the reference; and text safe to look at."""

import unicodedata
from typing import Any

LIMIT_LABEL = 80  # characters of a label that are shown
FAR, NOTABLE = 0.25, 0.10  # shares of cells beyond the reference: it lies far from it; it is worth a look
FEW = 3  # so many cells beyond the reference are needed to say anything: fewer may be chance, whatever their share


def short(value: Any) -> str:
    """A label that does not break the page, however long it is; characters that nobody sees become visible."""
    text = str(value)
    text = text if len(text) <= LIMIT_LABEL else f"{text[: LIMIT_LABEL - 1]}…"
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cs") else c for c in text)


def level(n: int | None, beyond: float | None) -> str:
    """How far a query of `n` cells lies from the reference: far, notable, usual, or "" where it is not known."""
    if not n or beyond is None:
        return ""
    if round(beyond * n) < FEW:
        return "usual"
    return "far" if beyond > FAR else "notable" if beyond > NOTABLE else "usual"


def sentence(n: int | None, beyond: float | None) -> str:
    """What the share of its cells `beyond` the reference means for a query of `n` cells, in plain words."""
    if not n or beyond is None:
        return ""
    far = round(beyond * n)
    who = f"{percent(beyond)} of its cells lie" if n > 20 else f"{far} of its {n} cells lie"
    who = who if n > 1 else "Its one cell lies" if far else "Its one cell does not lie"
    fact = f"{who} farther out than 95 % of the reference's own"
    if n == 1:
        return f"{fact}."
    return {
        "far": f"{fact}: it holds what the reference does not.",
        "notable": f"{fact}, where 5 % is usual: some may be of a kind that the reference does not hold.",
        "usual": f"{fact}; about 5 % is usual.",
    }[level(n, beyond)]


def percent(value: float) -> str:
    """``62 %``; a decimal below ten."""
    return f"{100 * value:.0f} %" if value >= 0.095 or value == 0 else f"{100 * value:.1f} %"
