"""What went wrong on Ray, in the words of a user."""

from collections.abc import Mapping

from scarcade.engine import errors
from scarcade.engine.errors import ClusterError, ScarcadeError
from scarcade.engine.scale import Scale


def explained(error: Exception, scale: Scale, cpus: float) -> ScarcadeError:
    """Ray's failure in the words of a user: the last line of each worker's own error."""
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    if failures:
        told = [str(e).strip().splitlines() for e in failures.values()]
        lines = sorted({said[-1].strip() for said in told if said})
        return ClusterError(
            f"workers failed more often than --scale.max_failures {scale.max_failures} allows "
            f"({'; '.join(lines)[:2000]}); the same command continues from the last checkpoint"
        )
    if "timed out" in str(error).lower() or "StartupTimeout" in repr(error):
        return ClusterError(not_given(scale, cpus))
    reason = str(error).strip().splitlines()
    return ClusterError(f"Ray Train gave up: {reason[-1] if reason else type(error).__name__}")


def not_given(scale: Scale, cpus: float, *, lost: str = "") -> str:
    """That too few workers could be had; `lost` names nodes that were there and are not."""
    few = scale.min_workers or scale.workers
    gone = f"node {lost} is lost, and " if lost else ""
    more = " --scale.min_workers goes on with fewer; the same command continues" if lost else ""
    return (
        f"{gone}the cluster did not give {few} workers of {cpus:g} cores{' and a GPU' if scale.gpus else ''} each "
        f"within {scale.start_seconds:g} s; lower --workers or --scale.cpus_per_worker, or set --scale.min_workers"
        + (f".{more}" if more else "")
    )


def revived(told: Mapping[str, str]) -> ScarcadeError:
    """The error that a worker met, as the class that it was."""
    kind = getattr(errors, told["class"], ScarcadeError)
    return kind(told["message"]) if issubclass(kind, ScarcadeError) else ScarcadeError(told["message"])
