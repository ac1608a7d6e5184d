"""The report of a search: one page with its best configuration, its curves, and what each parameter did to the trials.

The best configuration and the table of trials are plain HTML, so they are there without the page's script; what is
drawn needs it. What keeps values and reasons from running: `jobs.page`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from scarcade.jobs.page import island, write_page
from scarcade.jobs.report_words import percent, short
from scarcade.jobs.tune_report_data import Mode, Ranked, best_of, by_rank, drawing, number, ranked, text_of
from scarcade.jobs.tune_trial import Trial

STYLES = ("report.css", "tune_report.css")
SCRIPTS = ("tune_report_trials.js", "tune_report_plots.js", "tune_report_axes.js", "tune_report_table.js")
STATES = ("done", "stopped", "failed", "running", "waiting")
METRICS = 8  # columns of the table for what was measured besides the objective


def write_report(
    path: Path,
    *,
    title: str,
    objective: str,
    mode: Mode,
    space: Mapping[str, Mapping[str, Any]],
    trials: Sequence[Trial],
    defaults: Trial | None = None,
) -> Path:
    """Write the report of a search that is over or not.

    Args:
        objective: its name. space: field of the configuration -> {"loguniform": [low, high]}, {"choice": [...]}, ...
        defaults: a trial with the defaults, to compare with; it may be one of `trials`.

    Raises:
        StorageError: it cannot be written.
    """
    every = ranked(trials, mode, defaults)
    best = best_of(every, mode)
    usual = next((one for one in every if one.is_default), None)
    names = list(dict.fromkeys([*space, *(name for one in every for name in one.trial.parameters)]))
    metrics = list(dict.fromkeys(name for one in every for name in one.trial.metrics if name != objective))[:METRICS]
    return write_page(
        path,
        "tune_report.html",
        styles=STYLES,
        scripts=SCRIPTS,
        title=title,
        objective=objective,
        mode=mode,
        states=[(state, n) for state in STATES if (n := sum(trial.state == state for trial in trials))],
        n=len(trials),
        took=sum(trial.seconds for trial in trials),
        best=None if best is None else _best(every[best], usual, mode, names),
        reasons=_reasons(every),
        parameters=names,
        metrics=metrics,
        rows=[_row(place, every[place], names, metrics, best) for place in by_rank(every, mode)],
        drawing=island(drawing(every, objective, mode, space)),
    )


def to_toml(parameters: Mapping[str, Any]) -> str:
    """Parameters as ``--config`` of a training takes them; what TOML has no word for is a remark."""
    tree: dict[str, Any] = {}
    unset = []
    for dotted, value in parameters.items():
        if value is None:
            unset.append(f"# {dotted} is not set\n")
            continue
        *parents, leaf = dotted.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return "".join(unset) + tomli_w.dumps(tree)


def compared(best: float, usual: float, mode: Mode) -> str:
    """How much better than the defaults the best trial is, in words."""
    if best == usual:
        return f"as good as the defaults ({number(usual)})"
    better = (best < usual) == (mode == "min")
    share = f"{percent(abs(best - usual) / abs(usual))} " if usual else ""
    return f"{share}{'better' if better else 'worse'} than the defaults ({number(usual)})"


def _best(one: Ranked, usual: Ranked | None, mode: Mode, names: Sequence[str]) -> dict[str, Any]:
    """The best configuration, beside the defaults where they are known."""
    assert one.best is not None
    ours, theirs = one.trial.parameters, None if usual is None else usual.trial.parameters
    return {
        "name": one.trial.name,
        "state": one.trial.state,
        "value": number(one.best),
        "at": one.at,
        "epochs": one.trial.epochs,
        "is_default": one.is_default,
        "compared": None
        if usual is None or usual.best is None or one.is_default
        else compared(one.best, usual.best, mode),
        "has_defaults": theirs is not None,
        "parameters": [
            {
                "name": name,
                "value": text_of(ours[name]),
                "default": text_of(theirs[name]) if theirs and name in theirs else "",
                "differs": theirs is not None and name in theirs and theirs[name] != ours[name],
            }
            for name in names
            if name in ours
        ],
        "toml": to_toml(ours),
    }


def _reasons(every: Sequence[Ranked]) -> list[tuple[str, int, int]]:
    """(reason, failed trials, place of the first), the commonest first."""
    failed = [
        (one.trial.reason or "no reason is known", place)
        for place, one in enumerate(every)
        if one.trial.state == "failed"
    ]
    counts = Counter(reason for reason, _ in failed)
    return [(reason, n, next(place for told, place in failed if told == reason)) for reason, n in counts.most_common()]


def _row(place: int, one: Ranked, names: Sequence[str], metrics: Sequence[str], best: int | None) -> dict[str, Any]:
    """The line of a trial in the table; sorted by the values, read by their texts."""
    trial = one.trial
    return {
        "number": place,
        "name": short(trial.name),
        "state": trial.state,
        "best": place == best,
        "default": one.is_default,
        "reason": trial.reason,
        "epochs": trial.epochs,
        "seconds": trial.seconds,
        "value": one.best,
        "text": "" if one.best is None else number(one.best),
        "metrics": [number(trial.metrics[name]) if name in trial.metrics else "" for name in metrics],
        "parameters": [text_of(trial.parameters[name]) if name in trial.parameters else "" for name in names],
    }
