"""Runs a command as a job of a Ray cluster, once: a second submit of the same run joins the first.

The id of a job comes from what its command writes. While one is running, submitting it again follows it; after its
end, however it ended, a new attempt (``ID-2``) continues the run, as the same command does anywhere. What the job ends
with is what `submit --wait` ends with.
"""

import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scarcade import __version__
from scarcade.engine.errors import BusyError, ClusterError, UsageError
from scarcade.engine.memory import bytes_of
from scarcade.jobs.cluster_token import MODE, TOKEN, TOKEN_PATH, token_of
from scarcade.jobs.jobs_api import JobInfo, JobsApi
from scarcade.jobs.shipped import package_name, small_files, wheel
from scarcade.jobs.submitted_command import JobCommand

RUN, COMMAND, PACKAGE = "scarcade_run", "scarcade_command", "scarcade_package"
_ENTRY = "scarcade.jobs.job_entry"
_RAY = (2, 60)
_PENDING_S = 30.0  # after so long it is told what a job waits for
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|_KEY$", re.IGNORECASE)

Note = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """What a job is given by the cluster.

    `cpus`, `gpus` and `memory` are reserved for the command itself; what its workers take comes on top.
    """

    cpus: float | None = None
    gpus: float | None = None
    memory: str | None = None
    env: Mapping[str, str] | None = None
    python: str = "python"
    installed: bool = False  # the cluster's image has the package: nothing is sent
    stop_seconds: int = 120  # between being asked to stop and being killed


@dataclass(frozen=True)
class Submitted:
    """A job of the cluster: a new one, or one that was running already."""

    id: str
    joined: bool


def connected(address: str, note: Note) -> JobsApi:
    """The cluster at `address`, with the token of the environment; what is not safe there is told.

    Raises:
        ClusterError: nothing answers, or it does not take the token. UsageError: no address, or not a dashboard's.
    """
    token, warnings = token_of()
    for warning in warnings:
        note(f"warning: {warning}")
    api = JobsApi(address, token)
    if api.open_to_all():
        note(
            f"warning: {api.url}: the cluster asks for no token: whoever reaches its ports can run code there; start "
            f"it with {MODE}=token (docs/cluster.md)"
        )
    version = api.ray_version()
    if _numbers(version) < _RAY:
        wanted = ".".join(map(str, _RAY))
        raise ClusterError(f"--address {api.url}: the cluster runs Ray {version}, and {wanted} or newer is wanted")
    return api


def submit(api: JobsApi, command: JobCommand, wanted: Wanted, note: Note, *, name: str | None = None) -> Submitted:
    """Start the command as a job, or find the one that is running it.

    Raises:
        UsageError: `name` or an option cannot be meant. BusyError: another command is writing there.
        ClusterError: the cluster takes no jobs.
    """
    run = command.ident if name is None else _checked_name(name)
    package = None if wanted.installed else wheel()
    request = _request(command, run, wanted, package)
    _tell(command, wanted, note)
    while True:
        attempts = attempts_of(api.jobs(), run)
        if attempts and not attempts[-1].over:
            return _joined(attempts[-1], request["metadata"], note)
        ident = run if not attempts else f"{run}-{_number(attempts[-1].id, run) + 1}"
        environment = request["runtime_env"]
        if package is not None:
            environment["py_modules"] = [api.upload(package_name(package), package)]
        if command.sent:
            files = small_files(command.sent)
            environment["working_dir"] = api.upload(package_name(files), files)
        if api.submit({**request, "submission_id": ident}):
            return Submitted(ident, joined=False)
        time.sleep(0.5)  # somebody else was faster: theirs is joined


def attempts_of(jobs: Sequence[JobInfo], run: str) -> list[JobInfo]:
    """The jobs of one run, the first attempt first."""
    mine = [job for job in jobs if job.id == run or re.fullmatch(rf"{re.escape(run)}-\d+", job.id)]
    return sorted(mine, key=lambda job: _number(job.id, run))


def found(api: JobsApi, ident: str) -> JobInfo:
    """The job of this id; of a run its latest attempt.

    Raises:
        UsageError: there is none.
    """
    jobs = api.jobs()
    attempts = attempts_of(jobs, ident)
    if attempts:
        return attempts[-1]
    known = ", ".join(job.id for job in jobs[-5:]) or "none"
    raise UsageError(f"{ident}: the cluster has no such job; its latest are {known}")


def _number(ident: str, run: str) -> int:
    return 1 if ident == run else int(ident.removeprefix(f"{run}-"))


def _request(command: JobCommand, run: str, wanted: Wanted, package: bytes | None) -> dict[str, Any]:
    """What Ray is asked for, but for the id and what is uploaded first."""
    env = dict(wanted.env or {})
    for key in env:
        if key in (MODE, TOKEN, TOKEN_PATH):
            raise UsageError(
                f"--env {key}: the cluster's nodes have it already, and whoever sees its jobs could read it"
            )
    env.setdefault("RAY_JOB_STOP_WAIT_TIME_S", str(wanted.stop_seconds))
    request: dict[str, Any] = {
        # exec: signals reach the command itself, and its exit code is the job's
        "entrypoint": f"exec {shlex.join([wanted.python, '-m', _ENTRY, *command.argv])}",
        "runtime_env": {"env_vars": env},
        "metadata": {
            RUN: run,
            COMMAND: command.text,
            PACKAGE: package_name(package) if package else f"{__version__}, installed there",
        },
    }
    if wanted.cpus is not None:
        request["entrypoint_num_cpus"] = wanted.cpus
    if wanted.gpus is not None:
        request["entrypoint_num_gpus"] = wanted.gpus
    if wanted.memory is not None:
        request["entrypoint_memory"] = bytes_of(wanted.memory)
    return request


def _tell(command: JobCommand, wanted: Wanted, note: Note) -> None:
    if command.places:
        note(f"note: must lie on storage that every node of the cluster sees: {', '.join(command.places)}")
    if command.sent:
        note(f"note: sent with the job: {', '.join(map(str, command.sent.values()))}")
    if command.secrets:
        note("warning: a URL carries a key or a signature, which whoever sees the cluster's jobs can read")
    for key in wanted.env or {}:
        if _SECRET.search(key):
            note(
                f"warning: --env {key}: whoever sees the cluster's jobs can read it; better a role of the nodes, or a "
                "secret that they are started with"
            )


def _joined(job: JobInfo, metadata: Mapping[str, str], note: Note) -> Submitted:
    if job.metadata.get(COMMAND, metadata[COMMAND]) != metadata[COMMAND]:
        raise BusyError(
            f"{job.id}: this job is {job.status.lower()} with other options ({job.metadata[COMMAND]}); wait for it, or "
            f"stop it with `scarcade jobs stop {job.id}`"
        )
    note(f"note: {job.id} is {job.status.lower()} already, and is joined")
    if job.metadata.get(PACKAGE) != metadata[PACKAGE]:
        note("warning: it runs another version of scarcade's files than those that are here")
    return Submitted(job.id, joined=True)


def _checked_name(name: str) -> str:
    if not _ID.fullmatch(name):
        raise UsageError(f"--name {name}: wants letters, digits, - _ and . only, a hundred at most")
    return name


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


# following


def follow(api: JobsApi, ident: str, note: Note, *, patience_s: float = 120.0) -> int:
    """Print what a job writes until it ends; the exit code of its command.

    Raises:
        ClusterError: the cluster went away for longer than `patience_s`, or Ray could not run the job.
        KeyboardInterrupt: the user has seen enough; the job goes on.
    """
    try:
        return _followed(api, ident, note, patience_s)
    except KeyboardInterrupt as error:
        at = f"--address {api.url} {ident}"
        told = f"{ident} goes on; to see it: scarcade jobs logs {at} --follow; to stop it: scarcade jobs stop {at}"
        raise type(error)(told) from None


def _followed(api: JobsApi, ident: str, note: Note, patience_s: float) -> int:
    printed, waits = 0, time.monotonic() + _PENDING_S
    answered = time.monotonic()
    while True:
        began = time.monotonic()
        try:
            job = api.job(ident)
            answered = time.monotonic()
        except ClusterError as error:
            if time.monotonic() - answered > patience_s:
                raise ClusterError(f"{error}; when it is back, submitting {ident} again continues the run") from error
            time.sleep(min(5.0, patience_s / 10))
            continue
        if job is None:
            raise ClusterError(f"{ident}: the cluster knows it no more; submitting it again continues the run")
        try:
            printed += _print(api.logs(ident)[printed:])
        except ClusterError as error:  # as when the node that it ran on is gone
            if job.over:
                note(f"warning: the end of its log cannot be had ({error})")
        if job.over:
            return ended(job, note)
        if job.status == "PENDING" and time.monotonic() > waits:
            note(f"note: {ident} waits: {' '.join(job.message.split())}")
            waits = float("inf")
        # a log is sent whole each time: a long one less often
        time.sleep(min(max(0.5, 10 * (time.monotonic() - began)), 30.0))


def stopped(api: JobsApi, ident: str, note: Note, *, patience_s: float = 5.0) -> None:
    """Wait until a job that was asked to stop has ended; for one that has not begun, only `patience_s`."""
    asked = time.monotonic()
    while True:
        job = api.job(ident)
        if job is not None and job.status == "PENDING" and time.monotonic() - asked > patience_s:
            note(
                f"note: {ident} has not begun ({' '.join(job.message.split())}); it will be stopped as soon as it does"
            )
            return
        if job is None or job.over:
            note(f"note: {ident} is {job.status.lower() if job else 'gone'}; submitting it again continues the run")
            return
        time.sleep(0.5)


def ended(job: JobInfo, note: Note) -> int:
    """Exit code of a job's command, and a word on how it ended.

    Raises:
        ClusterError: Ray could not run it.
    """
    if job.status == "SUCCEEDED":
        note(f"note: {job.id} is done")
        return 0
    if job.status == "STOPPED":
        note(f"note: {job.id} was stopped; submitting it again continues the run")
        return 143
    if job.exit_code is None:
        raise ClusterError(f"{job.id}: Ray could not run it: {_gist(job.message)}")
    code = job.exit_code if job.exit_code >= 0 else 128 - job.exit_code  # ended by a signal, as a shell tells it
    hint = {
        4: "; its paths are those of the cluster's nodes",
        127: "; the node has no such Python: --python says which",
        137: "; it was killed from outside, as when memory runs out: --memory reserves it; submitting again continues",
    }
    note(f"note: {job.id} ended with exit code {code}{hint.get(code, '')}")
    return code


def _print(text: str) -> int:
    sys.stdout.write(text)
    sys.stdout.flush()
    return len(text)


def _gist(message: str) -> str:
    """The telling line of a message of Ray, which may be a long traceback."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Timeout)\b", line)]
    return (telling or lines or ["Ray gives no reason"])[-1][:500]
