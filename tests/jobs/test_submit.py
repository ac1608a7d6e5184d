"""Submitting: one job a run, attempts, exit codes, what is told; over HTTP to a small dashboard."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from scarcade.engine.errors import BusyError, ClusterError, UsageError
from scarcade.jobs.cli import main
from scarcade.jobs.jobs_api import JobsApi
from scarcade.jobs.submit import Wanted, attempts_of, connected, follow, found, stopped, submit
from scarcade.jobs.submitted_command import understood
from tests.jobs.dashboard import Dashboard, dashboard

MADE = ("simulate", "/shared/made.zarr", "--cells", "100")


def quiet(_: str) -> None:
    pass


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def ray() -> Iterator[Dashboard]:
    with dashboard() as server:
        yield server


def test_a_run_is_submitted_joined_and_continued(ray: Dashboard) -> None:
    api, notes = JobsApi(ray.url), list[str]()
    first = submit(api, understood(MADE), Wanted(), notes.append)
    assert not first.joined
    assert first.id.startswith("simulate-made-zarr-")
    assert submit(api, understood(MADE), Wanted(), notes.append).joined
    assert "is running already" in notes[-1]
    with pytest.raises(BusyError, match="other options"):
        submit(api, understood([*MADE, "--seed", "1"]), Wanted(), quiet)
    for status in ("SUCCEEDED", "FAILED", "STOPPED") * 4:
        ray.end(attempts_of(api.jobs(), first.id)[-1].id, status, 0)
        submit(api, understood([*MADE, "--seed", "1"]), Wanted(), quiet)
    ids = [job.id for job in attempts_of(api.jobs(), first.id)]
    assert ids == [first.id, *(f"{first.id}-{n}" for n in range(2, 14))]
    assert found(api, first.id).id == ids[-1]
    assert found(api, ids[3]).id == ids[3]
    assert ray.uploads == 1  # one package, however often it is needed
    with pytest.raises(UsageError, match="no such job"):
        found(api, "other")


def test_two_at_once_are_one_job(ray: Dashboard) -> None:
    line = understood(MADE)
    ids: list[str] = []
    threads = [
        threading.Thread(target=lambda: ids.append(submit(JobsApi(ray.url), line, Wanted(), quiet).id))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 8
    assert len(ray.jobs) == len(set(ids)) == 1


def test_what_is_asked_of_the_cluster(ray: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("train.toml").write_text("epochs = 3\n")
    wanted = Wanted(cpus=2, gpus=1, memory="8GB", env={"A": "b"}, python="/opt/python")
    argv = ["train", "--data", "s3://bucket/atlas.zarr", "--out", "s3://bucket/run", "--config", "train.toml"]
    notes: list[str] = []
    ray.no_agent = 1
    job = submit(JobsApi(ray.url), understood(argv), wanted, notes.append, name="mine")
    asked = ray.jobs[job.id]
    assert job.id == "mine"
    assert asked["entrypoint"].startswith("exec /opt/python -m scarcade.jobs.job_entry train --data s3://bucket/")
    assert (asked["entrypoint_num_cpus"], asked["entrypoint_num_gpus"], asked["entrypoint_memory"]) == (2, 1, 8e9)
    environment = asked["runtime_env"]
    assert environment["env_vars"] == {"A": "b", "RAY_JOB_STOP_WAIT_TIME_S": "120"}
    assert environment["working_dir"].startswith("gcs://_ray_pkg_")
    assert len(environment["py_modules"]) == 1
    assert not any("every node" in note for note in notes)
    job = submit(JobsApi(ray.url), understood(MADE), Wanted(installed=True), notes.append)
    assert set(ray.jobs[job.id]["runtime_env"]) == {"env_vars"}


def test_secrets_are_kept_out_or_warned_of(ray: Dashboard) -> None:
    api, notes = JobsApi(ray.url), list[str]()
    with pytest.raises(UsageError, match="RAY_AUTH_TOKEN"):
        submit(api, understood(MADE), Wanted(env={"RAY_AUTH_TOKEN": "x"}), quiet)
    submit(api, understood(MADE), Wanted(env={"AWS_SECRET_ACCESS_KEY": "sesame"}), notes.append)
    assert any("AWS_SECRET_ACCESS_KEY" in note for note in notes)
    assert not any("sesame" in note for note in notes)
    line = understood(["map", "/shared/model", "s3://key:sesame@bucket/a.h5ad", "--out", "/shared/mapped"])
    job = submit(api, line, Wanted(), notes.append)
    assert any("a URL carries a key" in note for note in notes)
    assert "sesame" not in json.dumps(ray.jobs[job.id]["metadata"])


@pytest.mark.parametrize("name", ["", "a b", "../x", "x" * 101])
def test_a_name_that_is_none(ray: Dashboard, name: str) -> None:
    with pytest.raises(UsageError, match="--name"):
        submit(JobsApi(ray.url), understood(MADE), Wanted(), quiet, name=name)


def test_the_token_is_sent_and_a_cluster_without_one_is_named(
    ray: Dashboard, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    notes: list[str] = []
    connected(ray.url, notes.append)
    assert "asks for no token" in notes[0]
    with dashboard("sesame") as asking:
        with pytest.raises(ClusterError, match="none was sent"):
            connected(asking.url, quiet)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
        with pytest.raises(ClusterError, match="does not take"):
            connected(asking.url, quiet)
        monkeypatch.setenv("RAY_AUTH_TOKEN", "sesame")
        (tmp_path / ".netrc").write_text("default login other password other\n")
        notes.clear()
        assert connected(asking.url, notes.append).ray_version() == "2.60.0"
        assert notes == []


def test_an_old_cluster_and_a_stranger() -> None:
    with dashboard(ray="2.9.3") as old, pytest.raises(ClusterError, match=r"runs Ray 2\.9\.3"):
        connected(old.url, quiet)
    with dashboard() as stranger:
        stranger.ray = ""  # no Ray
        with pytest.raises(ClusterError):
            connected(f"{stranger.url}/elsewhere", quiet)
    with pytest.raises(ClusterError, match="no Ray dashboard answers"):
        connected("http://127.0.0.1:9", quiet)
    for wrong in ("ray://head:10001", "http://", "head:port", "http://user:secret@head"):
        with pytest.raises(UsageError, match="--address"):
            connected(wrong, quiet)


def run_to_its_end(ray: Dashboard, ident: str, end: Callable[[], None], notes: list[str]) -> int:
    threading.Timer(0.3, end).start()
    return follow(JobsApi(ray.url), ident, notes.append, patience_s=5)


@pytest.mark.parametrize(
    ("status", "code", "expected", "told"),
    [
        ("SUCCEEDED", 0, 0, "is done"),
        ("FAILED", 3, 3, "exit code 3"),
        ("FAILED", 4, 4, "cluster's nodes"),
        ("FAILED", 127, 127, "--python"),
        ("FAILED", -9, 137, "killed"),
        ("STOPPED", None, 143, "continues"),
    ],
)
def test_exit_codes_come_back(
    ray: Dashboard, status: str, code: int | None, expected: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    notes: list[str] = []
    job = submit(JobsApi(ray.url), understood(MADE), Wanted(), quiet)
    ray.logs[job.id] = "first\n"

    def end() -> None:
        ray.logs[job.id] += "last\n"
        ray.end(job.id, status, code)

    assert run_to_its_end(ray, job.id, end, notes) == expected
    assert capsys.readouterr().out == "first\nlast\n"
    assert told in notes[-1]


def test_a_job_that_ray_cannot_run(ray: Dashboard) -> None:
    job = submit(JobsApi(ray.url), understood(MADE), Wanted(), quiet)
    ray.end(job.id, "FAILED", None, "Traceback\n  File x\nRuntimeEnvSetupError: no disk\n")
    with pytest.raises(ClusterError, match="RuntimeEnvSetupError: no disk"):
        follow(JobsApi(ray.url), job.id, quiet)


def test_a_head_that_is_away_for_a_moment_and_for_good(ray: Dashboard) -> None:
    notes: list[str] = []
    job = submit(JobsApi(ray.url), understood(MADE), Wanted(), quiet)
    ray.broken = 3
    assert run_to_its_end(ray, job.id, lambda: ray.end(job.id, "SUCCEEDED", 0), notes) == 0
    ray.broken = 1_000
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"in trouble.*continues"):
        follow(JobsApi(ray.url), job.id, quiet, patience_s=0.5)
    assert time.monotonic() - began < 10
    ray.broken = 0
    with pytest.raises(ClusterError, match="no more"):
        follow(JobsApi(ray.url), "other", quiet)


def test_ctrl_c_leaves_the_job_alone(ray: Dashboard) -> None:
    job = submit(JobsApi(ray.url), understood(MADE), Wanted(), quiet)
    api = JobsApi(ray.url)
    logs = api.logs

    def enough(ident: str) -> str:
        logs(ident)
        raise KeyboardInterrupt

    api.logs = enough  # type: ignore[method-assign]  # where the signal would come
    with pytest.raises(KeyboardInterrupt, match=f"{job.id} goes on.*jobs logs.*jobs stop"):
        follow(api, job.id, quiet)
    assert ray.jobs[job.id]["status"] == "RUNNING"


def test_the_commands(ray: Dashboard, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["jobs", "list"]) == 2
    assert "--address" in capsys.readouterr().err
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", ray.url)
    assert main(["submit", "--env", "A=1", "--", *MADE]) == 0
    (ident,) = capsys.readouterr().out.split()
    assert main(["submit", "--env", "A", "--", *MADE]) == 2
    assert main(["submit"]) == 2
    assert "after --" in capsys.readouterr().err
    ray.logs[ident] = "hello\n"
    assert main(["jobs", "logs", ident]) == 0
    assert capsys.readouterr().out == "hello\n"
    assert main(["jobs", "stop", ident]) == 0
    assert "is stopped" in capsys.readouterr().err
    assert main(["jobs", "stop", ident]) == 0
    assert "ended before" in capsys.readouterr().err
    assert main(["jobs", "logs", ident, "--follow"]) == 143
    ray.jobs["other"] = {"submission_id": "other", "status": "PENDING", "entrypoint": "python x.py"}
    notes: list[str] = []
    stopped(JobsApi(ray.url), "other", notes.append, patience_s=0)
    assert "has not begun" in notes[0]
    assert main(["jobs", "list"]) == 0
    text = capsys.readouterr().out
    assert "stopped" in text
    assert "not of scarcade" in text
    assert main(["jobs", "list", "--json"]) == 0
    assert [job["id"] for job in json.loads(capsys.readouterr().out)] == ["other", ident]
    assert main(["jobs", "logs", "nobody"]) == 2
