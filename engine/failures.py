"""What went wrong on Ray, in the words of a user."""

from collections.abc import Mapping

from scarcade.engine import errors
from scarcade.engine.errors import ClusterError, ScarcadeError
from scarcade.engine.scale import Scale


def explained(error: Exception, scale: Scale, cpus: float) -> ScarcadeError:
    """Ray's failure in the words of a user: the last line of each worker's own error."""
    if getattr(error, "worker_failures", {}):
        return ClusterError(
            f"workers failed more often than --scale.max-failures {scale.max_failures} allows ({reason_of(error)}); "
            "the same command continues from the last checkpoint"
        )
    if "timed out" in str(error).lower() or "StartupTimeout" in repr(error):
        return ClusterError(not_given(scale, cpus))
    return ClusterError(f"Ray Train gave up: {reason_of(error)}")


def reason_of(error: Exception) -> str:
    """The last line of each worker's own error, or of Ray's."""
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    told = [str(one).strip().splitlines() for one in (list(failures.values()) or [error])]
    return "; ".join(sorted({said[-1].strip() for said in told if said}))[:2000] or type(error).__name__


def not_given(scale: Scale, cpus: float, *, why: str = "") -> str:
    """That the cluster gave too few workers; `why` there were more before."""
    few = scale.min_workers or scale.workers
    asked = f"{few} workers of {cpus:g} cores{' and a GPU' if scale.gpus else ''} each"
    within = f"within {scale.start_seconds:g} s"
    if not why:
        return (
            f"the cluster did not give {asked} {within}; lower --workers or --scale.cpus-per-worker, or set "
            "--scale.min-workers"
        )
    fewer = "lower" if scale.min_workers else "set"
    return (
        f"{why}, and the cluster did not give {asked} again {within}; {fewer} --scale.min-workers to go on with fewer, "
        "or raise --scale.start-seconds if nodes are to come back; the same command continues from the last checkpoint"
    )


def revived(told: Mapping[str, str]) -> ScarcadeError:
    """The error that a worker met, as the class that it was."""
    kind = getattr(errors, told["class"], ScarcadeError)
    return kind(told["message"]) if issubclass(kind, ScarcadeError) else ScarcadeError(told["message"])
