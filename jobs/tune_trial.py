"""What is known of one trial of a search: the record that is kept, told and drawn."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

State = Literal["waiting", "running", "done", "stopped", "failed"]
"""`stopped`: by the scheduler, before its last epoch, because others were better."""


@dataclass(frozen=True)
class Trial:
    """One sampled configuration and what came of it."""

    name: str  # "trial-0007", in the order of sampling
    parameters: dict[str, Any]  # field of the configuration ("optim.lr") -> value
    state: State = "waiting"
    epochs: int = 0  # that it was trained for
    curve: list[tuple[int, float]] = field(default_factory=list)  # (epoch, objective)
    metrics: dict[str, float] = field(default_factory=dict)  # the last of each
    seconds: float = 0.0  # of training, without start and waiting
    reason: str | None = None  # of a failure

    def best(self, mode: Literal["min", "max"]) -> float | None:
        """The best objective that it reached; None before its first."""
        values = [value for _, value in self.curve]
        return (min(values) if mode == "min" else max(values)) if values else None

    def record(self) -> dict[str, Any]:
        """Plain values, as they are written to JSON."""
        return asdict(self)
