"""What a command does not import: each of these is between a tenth of a second and several seconds of every start."""

import subprocess
import sys
from pathlib import Path

from tests.jobs.conftest import Atlas

HEAVY = ("ray", "torch._dynamo", "torch._inductor", "sympy", "scipy.stats", "sklearn", "umap", "matplotlib", "optuna")
TOLD = """
import sys
from scarcade.jobs.cli import main
code = main(sys.argv[1:])
print("imported:", *sorted(sys.modules))
sys.exit(code)
"""


def imported(*command: str | Path) -> set[str]:
    """Modules that a command line has imported when it is done."""
    done = subprocess.run(
        [sys.executable, "-c", TOLD, *map(str, command)], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_help_imports_nothing_that_computes() -> None:
    found = imported("--help")
    assert "scarcade.jobs.commands" in found
    assert not found & {*HEAVY, "torch", "numpy", "numba", "pandas", "anndata", "zarr", "pydantic", "pyarrow"}


def test_ingesting_imports_no_torch(atlas: Atlas, tmp_path: Path) -> None:
    found = imported("ingest", atlas.query, "--out", tmp_path / "s.zarr", "--batch-key", "batch", "--hvg", "20")
    assert "scarcade.dataloaders.build" in found
    assert not found & {*HEAVY, "torch"}


def test_training_in_this_process_imports_no_compiler_and_no_cluster(atlas: Atlas, tmp_path: Path) -> None:
    options = ("--model.n-hidden", "8", "--optim.max-steps", "2", "--threads", "1", "--workers", "0")
    found = imported("train", "--data", atlas.store.place, "--out", tmp_path / "run", *options)
    assert "torch" in found
    assert not found & {*HEAVY, "tensorboardX", "mlflow", "wandb"}


def test_mapping_in_this_process_imports_no_compiler_and_no_cluster(atlas: Atlas, tmp_path: Path) -> None:
    options = ("--batch-key", "batch", "--epochs", "1", "--threads", "1", "--workers", "0")
    found = imported("map", atlas.model, atlas.query, "--out", tmp_path / "out", *options)
    assert "torch" in found
    assert not found & {*HEAVY}
