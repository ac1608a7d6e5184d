import json
from pathlib import Path
from typing import Any

import pytest

from scarcade.engine.errors import CorruptError
from scarcade.jobs.tune_board import Board
from scarcade.jobs.tune_trial import Trial
from scarcade.jobs.tune_written import write_tables


def result(epoch: int, value: float, **more: Any) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "objective": value,
        "metrics": {"elbo": value},
        "parameters": {"lr": 1},
        "seconds": 2,
        **more,
    }


def board_of(out: Path, n: int = 2) -> Board:
    board = Board(out, "min")
    for number in range(n):
        board.put(Trial(f"trial-{number:04d}", {"lr": 1}))
    return board


def test_records_are_found_again_and_what_ran_waits(tmp_path: Path) -> None:
    board = board_of(tmp_path)
    board.took("trial-0000", result(1, 5.0), "running")
    board.took("trial-0001", result(1, 4.0), "done")
    again = Board(tmp_path, "min")
    again.load()
    assert [trial.state for trial in again] == ["waiting", "done"]
    assert again["trial-0000"].curve == [(1, 5.0)]
    assert [trial.name for trial in again.left()] == ["trial-0000"]
    assert again["trial-0001"] == board["trial-0001"]


def test_epochs_that_are_trained_again_are_told_once(tmp_path: Path) -> None:
    board = board_of(tmp_path)
    for epoch in (1, 2, 3, 2, 3):
        board.took("trial-0000", result(epoch, 10.0 - epoch), "running")
    assert board["trial-0000"].curve == [(1, 9.0), (2, 8.0), (3, 7.0)]
    assert board["trial-0000"].seconds == 10


def test_the_best_did_not_fail_and_was_trained_longest_among_equals(tmp_path: Path) -> None:
    board = board_of(tmp_path, 4)
    assert board.best() is None
    board.took("trial-0000", result(1, 5.0), "stopped")
    board.took("trial-0001", result(3, 5.0), "done")
    board.took("trial-0002", result(1, 1.0), "running")
    board.took("trial-0002", {"failed": "broken", "seconds": 1}, "failed")
    assert [trial.name for trial in board.ranked()] == ["trial-0001", "trial-0000"]
    assert board["trial-0002"].reason == "broken"


@pytest.mark.parametrize("content", ["{", "[]", '{"name": "trial-0000"}', None])
def test_a_record_that_is_not_ours_is_told(tmp_path: Path, content: str | None) -> None:
    board = board_of(tmp_path)
    path = tmp_path / "trials" / "trial-0000" / "trial.json"
    other = {**board["trial-0000"].record(), "name": "../../elsewhere"}
    path.write_text(json.dumps(other) if content is None else content)
    with pytest.raises(CorruptError, match=r"trial-0000/trial.json: is not a trial's record"):
        Board(tmp_path, "min").load()


def test_tables_hold_all_trials_and_no_formula(tmp_path: Path) -> None:
    board = board_of(tmp_path)
    board.took("trial-0000", result(2, 3.5), "done")
    board.took("trial-0001", {"failed": "=1+1\nbroken", "seconds": 1}, "failed")
    write_tables(board, {"title": "elbo"})
    lines = (tmp_path / "trials.csv").read_text().splitlines()
    assert lines[0] == "name,state,epochs,objective,last,seconds,lr,elbo,reason"
    assert lines[1] == "trial-0000,done,2,3.5,3.5,2.0,1,3.5,"
    assert lines[2] == "trial-0001,failed,0,,,1.0,1,,'=1+1 broken"
    assert json.loads((tmp_path / "trials.json").read_text())["trials"][0]["curve"] == [[2, 3.5]]
