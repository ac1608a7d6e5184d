"""A search of hyperparameters, ours beside scvi.autotune: the same space, trials, epochs and scheduler in one run.

    python -m benchmarks.tune --data FOLDER [--peer-python PYTHON] [--cells 20000]

Both search scVI by ASHA, two trials at a time of one thread each, on random configurations. scvi-tools 1.4.2 runs in
an environment of its own (with ray[tune] and hyperopt); its data are in memory, ours are streamed from the store. Wall
and CPU time are those of the whole command with all of its processes; memory is the largest sum over the driver and its
workers of what each holds (shared pages divided by their users). The defaults are trained for as many epochs beside.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks import environment
from benchmarks.training import make

RESULTS = Path(__file__).parent / "results" / "tune.json"
PEER = Path(__file__).parent / "peers" / "tune_scvi_tools.py"
SPACE = """
[space]
model.n_latent = {choice = [5, 10, 20, 30]}
model.n_hidden = {choice = [64, 128]}
model.n_layers = {choice = [1, 2]}
"optim.lr" = {loguniform = [1e-4, 1e-2]}

[tune]
concurrent = 2
reduction = 4.0
"""


class Watch:
    """Follows a process and all below it: CPU seconds, peak of memory, and the driver's memory over time."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process, self.began = process, time.perf_counter()
        self.cpu: dict[tuple[int, float], float] = {}
        self.peak = 0.0
        self.driver: list[float] = []

    def follow(self, every_s: float = 0.5) -> dict[str, Any]:
        while self.process.poll() is None:
            self.look()
            time.sleep(every_s)
        held = [value for value in self.driver if value > 0]  # none of one that has just ended
        return {
            "wall_s": round(time.perf_counter() - self.began, 1),
            "cpu_s": round(sum(self.cpu.values()), 1),
            "peak_mb": round(self.peak),
            "driver_mb": {"middle": round(held[len(held) // 2]), "most": round(max(held))},
        }

    def look(self) -> None:
        try:
            driver = psutil.Process(self.process.pid)
            tree = [driver, *driver.children(recursive=True)]
        except psutil.Error:
            return
        held = 0.0
        for one in tree:
            try:
                times = one.cpu_times()
                held += one.memory_full_info().pss / 1e6
                self.cpu[one.pid, one.create_time()] = times.user + times.system
                if one.pid == self.process.pid:
                    self.driver.append(one.memory_info().rss / 1e6)
            except psutil.Error:
                continue  # it ended meanwhile
        self.peak = max(self.peak, held)


def measured(command: list[str], given: dict[str, str]) -> dict[str, Any]:
    """The costs of a command, which must succeed."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, env=environment(**given), stdout=subprocess.DEVNULL, stderr=errors)
        found = Watch(process).follow()
        errors.seek(0)
        if process.returncode:
            raise SystemExit(f"{command} failed:\n{errors.read().decode(errors='replace')[-3000:]}")
    return found


def ours(store: Path, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Our search, and the defaults trained as long."""
    config = work / "tune.toml"
    config.write_text(SPACE)
    scarcade = [sys.executable, "-m", "scarcade.jobs.cli"]
    common = ["--data", str(store), "--epochs", str(options.epochs), "--threads", "1", "--seed", "0"]
    out = work / "ours"
    found = measured(
        [*scarcade, "tune", *common, "--out", str(out), "--config", str(config), "--trials", str(options.trials)], {}
    )
    record = json.loads((out / "trials.json").read_text())
    trials = record["trials"]
    found["stopped"] = sum(trial["state"] == "stopped" for trial in trials)
    found["epochs"] = sum(trial["epochs"] for trial in trials)
    found["best"] = round(min(value for trial in trials for _, value in trial["curve"]), 2)
    found["trials_s"] = round(sum(trial["seconds"] for trial in trials), 1)
    found["wall_over_share"] = round(found["wall_s"] / (found["trials_s"] / 2), 2)
    measured([*scarcade, "train", *common, "--out", str(work / "defaults")], {})
    lines = [json.loads(text) for text in (work / "defaults" / "metrics.jsonl").read_text().splitlines()]
    found["defaults"] = round(min(line["validation/elbo"] for line in lines if "validation/elbo" in line), 2)
    return found


def theirs(h5ad: Path, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The same of scvi.autotune."""
    told = work / "theirs.json"
    command = [options.peer_python, str(PEER), str(h5ad), "--out", str(told), "--logs", str(work / "theirs")]
    command += ["--trials", str(options.trials), "--epochs", str(options.epochs)]
    ray = tempfile.mkdtemp(prefix="sc-peer-", dir="/tmp")  # the paths of Ray's sockets must be short
    # it would else join any cluster that happens to run on this machine
    given = {"RAY_ADDRESS": "local", "RAY_TMPDIR": ray, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    return measured(command, given) | json.loads(told.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder for the made cells and the searches")
    parser.add_argument("--peer-python", help="interpreter of an environment with scvi-tools, ray[tune] and hyperopt")
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    store, h5ad, _ = make(options.data, options.cells, h5ad=options.peer_python is not None)
    work = Path(tempfile.mkdtemp(prefix="search-", dir=options.data))
    about = {name: getattr(options, name) for name in ("cells", "trials", "epochs")}
    rows = {"scarcade": ours(store, work, options)}
    print(json.dumps(rows, indent=1), flush=True)
    if options.peer_python:
        rows["scvi_autotune"] = theirs(h5ad, work, options)
    load = round(os.getloadavg()[0], 1)
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps({**about, "cores": os.cpu_count(), "load": load, **rows}, indent=1) + "\n")
    print("| | wall s | CPU s | peak MB | epochs | stopped early | best ELBO | defaults |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        cells = [row.get(key, "") for key in ("wall_s", "cpu_s", "peak_mb", "epochs", "stopped", "best", "defaults")]
        print(f"| {name} | " + " | ".join(str(cell) for cell in cells) + " |")
    print(f"wall / (training seconds of the trials / 2): {rows['scarcade']['wall_over_share']}")


if __name__ == "__main__":
    main()
