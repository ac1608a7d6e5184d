import json
import time
from pathlib import Path

import pytest
import torch

from scarcade.engine.contracts import Losses
from scarcade.engine.errors import StorageError
from scarcade.engine.metrics import TOGETHER, Clock, MetricsFile, Sums, epoch_lines, means
from scarcade.engine.world import World


def test_sums_weigh_batches_of_unlike_size_by_their_cells() -> None:
    sums = Sums()
    assert sums.merged(World()) == ({}, 0)
    sums.add(Losses(torch.tensor([1.0, 2.0, 3.0]), {"kl": torch.ones(3)}))
    sums.add(Losses(torch.tensor([10.0]), {"kl": torch.zeros(1)}))
    found, cells = sums.merged(World())
    assert means(found, cells, "train") == {"train/loss": 4.0, "train/kl": 0.75}
    assert sums.merged(World()) == ({"loss": 0.0, "kl": 0.0}, 0)


def test_batches_are_added_up_however_many_there_are() -> None:
    sums = Sums()
    for n in range(2 * TOGETHER + 5):
        sums.add(Losses(torch.full((3,), float(n)), {"kl": torch.ones(3)}))
    count = 2 * TOGETHER + 5
    found, cells = sums.merged(World())
    assert (found, cells) == ({"loss": 3.0 * sum(range(count)), "kl": 3.0 * count}, 3 * count)


def test_labelled_cells_have_a_number_of_their_own() -> None:
    sums = Sums()
    for n in (2, 4):
        sums.add(
            Losses(
                torch.ones(3),
                {"kl": torch.ones(3)},
                labelled=torch.full((n,), 6.0 / n),
                labelled_terms={"ce": torch.ones(n)},
            )
        )
    found, cells = sums.merged(World())
    assert means(found, cells, "train") == {"train/loss": 3.0, "train/kl": 1.0, "train/ce": 1.0}
    assert means({k: 2 * v for k, v in found.items()}, 2 * cells, "train")["train/loss"] == 3.0


def test_clock_gives_cells_per_second_and_the_share_of_waiting() -> None:
    clock = Clock(waited=1.0, cells=100)
    time.sleep(0.05)
    line = clock.read(waited=1.02, cells=200)
    assert 500 < line["cells_per_s"] < 2001
    assert 0.05 < line["wait"] < 0.5
    assert clock.read(waited=99.0, cells=200)["wait"] == 1.0


def test_lines_are_appended_rewound_and_followed(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    assert metrics.follow(0) == ([], 0)
    for step in (1, 2, 3):
        metrics.write({"step": step, "train/loss": float("nan") if step == 2 else 1.0, "of": "epoch"})
    lines, offset = metrics.follow(0)
    assert [line["train/loss"] for line in lines] == [1.0, None, 1.0]
    with open(metrics.path, "a") as file:
        file.write('{"step": 4, "cut')
    assert metrics.follow(offset) == ([], offset)  # a line that is not whole yet
    metrics.rewind(2)
    assert [json.loads(text)["step"] for text in metrics.path.read_text().splitlines()] == [1, 2]
    assert len(epoch_lines(list(metrics.read()))) == 2
    MetricsFile(tmp_path / "none").rewind(3)


def test_a_file_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written"):
        MetricsFile(tmp_path / "no" / "metrics.jsonl").write({"step": 1})
