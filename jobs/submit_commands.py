"""The commands that speak to a cluster's jobs: `submit`, and `jobs list`, `jobs logs`, `jobs stop`."""

import os
import time
from collections.abc import Sequence
from json import dumps
from typing import Annotated

from cyclopts import App, Parameter

from scarcade.engine.errors import UsageError
from scarcade.jobs.console import note, seconds, table
from scarcade.jobs.options import COMMON, Common, Json, flag, repeated, told

jobs_app = App(name="jobs", help="See and stop the jobs of a Ray cluster.", help_format="plaintext")
Address = Annotated[str | None, told("The cluster's dashboard, http://HOST:8265 (default: RAY_API_SERVER_ADDRESS).")]
Ident = Annotated[str, told("Id of a job, or of a run: its latest attempt.")]


def submit(
    *command: Annotated[str, Parameter(show=False)],
    address: Address = None,
    wait: Annotated[bool, flag("Follow the log, and end with the command's exit code.")] = False,
    name: Annotated[str | None, told("Id of the run; default: made of the command and its --out.")] = None,
    env: Annotated[tuple[str, ...], repeated("NAME=VALUE for the command and its workers; no place for secrets")] = (),
    cpus: Annotated[float | None, told("Cores reserved for the command itself (default: none, on the head).")] = None,
    gpus: Annotated[float | None, told("GPUs reserved for the command itself.")] = None,
    memory: Annotated[str | None, told("Memory reserved for the command itself: 8GB, 800MB.")] = None,
    installed: Annotated[bool, flag("The cluster has scarcade installed: send no package.")] = False,
    python: Annotated[str, told("Python of the cluster's nodes.")] = "python",
    stop_seconds: Annotated[int, told("Time between being asked to stop and being killed.")] = 120,
    common: Common = COMMON,
) -> int:
    """Run a command on a Ray cluster: scarcade submit --address URL -- COMMAND...

    The package travels with it. Submitted again while it runs it is joined, after its end it is continued.
    """
    from scarcade.jobs.submit import Wanted, connected, follow
    from scarcade.jobs.submit import submit as run
    from scarcade.jobs.submitted_command import understood

    variables = dict(_pair(one) for one in env)
    line = understood(command)  # what is wrong with it is told before anybody is asked
    api = connected(_address(address), note)
    wanted = Wanted(cpus, gpus, memory, variables, python, installed, stop_seconds)
    job = run(api, line, wanted, note, name=name)
    if not wait:
        print(job.id)
        note(f"note: to see it: scarcade jobs logs --address {api.url} {job.id} --follow")
        return 0
    note(f"note: {job.id} {'is followed' if job.joined else 'was submitted'}")
    return follow(api, job.id, note)


@jobs_app.command(name="list")
def list_(*, address: Address = None, json: Json = False, common: Common = COMMON) -> None:
    """The jobs of a cluster, the oldest first."""
    from scarcade.jobs.submit import COMMAND, RUN, connected

    jobs = connected(_address(address), note).jobs()
    if json:
        rows = [
            {
                "id": job.id,
                "run": job.metadata.get(RUN),
                "state": job.status.lower(),
                "exit_code": job.exit_code,
                "began": job.began,
                "ended": job.ended,
                "command": job.metadata.get(COMMAND),
            }
            for job in jobs
        ]
        print(dumps(rows, indent=1))
        return
    lines = [
        (
            job.id,
            job.status.lower(),
            "" if job.exit_code is None else str(job.exit_code),
            "" if job.began is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.began)),
            "" if job.began is None else seconds((job.ended or time.time()) - job.began),
            job.metadata.get(COMMAND) or "(not of scarcade)",
        )
        for job in jobs
    ]
    print(table(("job", "state", "exit code", "began", "took", "command"), lines))


@jobs_app.command
def logs(
    ident: Ident,
    *,
    address: Address = None,
    follow: Annotated[bool, flag("Until it ends; then with its exit code, as submit --wait.")] = False,
    common: Common = COMMON,
) -> int:
    """What a job has written."""
    from scarcade.jobs.submit import connected, found
    from scarcade.jobs.submit import follow as followed

    api = connected(_address(address), note)
    job = found(api, ident)
    if follow:
        return followed(api, job.id, note)
    print(api.logs(job.id), end="")
    return 0


@jobs_app.command
def stop(
    ident: Ident,
    *,
    address: Address = None,
    no_wait: Annotated[bool, flag("Ask it to stop, and do not wait until it has.")] = False,
    common: Common = COMMON,
) -> int:
    """Stop a job tidily; submitting it again continues the run."""
    from scarcade.jobs.submit import connected, found, stopped

    api = connected(_address(address), note)
    job = found(api, ident)
    if job.over:
        note(f"note: {job.id} ended before: {job.status.lower()}")
        return 0
    api.stop(job.id)
    if no_wait:
        note(f"note: {job.id} was asked to stop")
        return 0
    stopped(api, job.id, note)
    return 0


def _address(given: str | None) -> str:
    address = given or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        raise UsageError("--address: wants the dashboard of the cluster's head, http://HOST:8265")
    return address


def _pair(text: str) -> tuple[str, str]:
    name, mark, value = text.partition("=")
    if not mark or not name.isidentifier():
        raise UsageError(f"--env {name}: wants NAME=VALUE")
    return name, value


__all__: Sequence[str] = ["jobs_app", "submit"]
