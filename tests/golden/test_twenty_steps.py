"""Twenty steps of each recipe: a refactoring leaves these losses as they were.

``python -m tests.golden.test_twenty_steps`` writes the file anew; a change of it belongs in the commit's message.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from scarcade.dataloaders.loader import LoaderConfig, stream
from scarcade.dataloaders.synthetic import simulate
from scarcade.engine.loop import fit
from scarcade.engine.metrics import MetricsFile
from scarcade.engine.optim import OptimConfig
from scarcade.engine.world import use_threads
from scarcade.models import RECIPES, Scvi

FILE = Path(__file__).with_name("twenty_steps.json")
TERMS = ("train/loss", "train/reconstruction", "train/kl")


def losses(recipe: str, folder: Path) -> list[list[float]]:
    """Each step's loss, reconstruction and KL."""
    use_threads(1)
    store = simulate(folder / "atlas.zarr", cells=700, genes=60, batches=3, labels=4, seed=11)
    loader = stream(store, "train", LoaderConfig(batch_size=64, validation=0.1), seed=5, lanes=8)
    config: dict[str, Any] = {**RECIPES[recipe], "n_hidden": 32}
    metrics = MetricsFile(folder / "metrics.jsonl")
    fit(
        Scvi(Scvi.Config(**config), store.schema, seed=5),
        loader,
        None,
        OptimConfig(epochs=5, max_steps=20, kl_steps=20, log_every=1, lr=5e-3),
        seed=5,
        metrics=metrics,
    )
    # the last step of an epoch is told together with the epoch; all others alone
    return [[line[term] for term in TERMS] for line in metrics.read() if line["of"] == "steps"]


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_losses_are_as_they_were(recipe: str, tmp_path: Path) -> None:
    expected = json.loads(FILE.read_text())[recipe]
    found = losses(recipe, tmp_path)
    assert len(found) == len(expected) > 15
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one == pytest.approx(other, rel=2e-6), f"line {step}"


if __name__ == "__main__":
    from tempfile import TemporaryDirectory

    told = {}
    for recipe in sorted(RECIPES):
        with TemporaryDirectory() as folder:
            told[recipe] = losses(recipe, Path(folder))
    FILE.write_text(json.dumps(told, indent=1) + "\n")
