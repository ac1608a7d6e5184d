"""What a run remembers between two steps, where it is kept, and how a run ends."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from torch import Tensor

from scarcade.engine.errors import UsageError
from scarcade.engine.metrics import Line
from scarcade.engine.optim import OptimConfig, Patience, lower_on_plateau, stop_early


def check_monitor(terms: Iterable[str], config: OptimConfig) -> None:
    """Refuse a term to be watched that is not among `terms`, whether or not anything watches it.

    Only the default may be missing where nothing does: a model need not have an "elbo".

    Raises:
        UsageError: the monitored term is not one of the model's.
    """
    default = OptimConfig.model_fields["monitor"].default
    asked_for = config.plateau or config.early_stopping or config.monitor != default
    if asked_for and config.monitor not in (there := tuple(terms)):
        raise UsageError(f"--optim.monitor {config.monitor}: the model has no such term; it has {', '.join(there)}")


@dataclass
class TrainingState:
    """Where a run stands between two steps; with weights and moments all that a checkpoint needs."""

    lr: float
    epoch: int = 0
    in_epoch: int = 0  # steps taken of this epoch
    step: int = 0
    cells: int = 0
    since_line: tuple[dict[str, float], int] = field(default_factory=lambda: ({}, 0))  # sums, cells
    since_epoch: tuple[dict[str, float], int] = field(default_factory=lambda: ({}, 0))
    plateau: Patience = field(default_factory=Patience)
    stopping: Patience = field(default_factory=Patience)
    stopped: str = ""  # why the run is over: "epochs", "steps" or "early"
    history: list[Line] = field(default_factory=list)  # one line for each epoch

    def watch(self, found: Mapping[str, float], config: OptimConfig) -> None:
        """Plateau and early stopping, on a validation.

        Raises:
            UsageError: the monitored term is not one of the model's.
        """
        check_monitor((key.removeprefix("validation/") for key in found), config)
        name = f"validation/{config.monitor}"
        if config.plateau:
            self.lr = lower_on_plateau(self.lr, found[name], self.plateau, config)
        if config.early_stopping and stop_early(found[name], self.stopping, config):
            self.stopped = "early"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "plateau": self.plateau.to_dict(), "stopping": self.stopping.to_dict()}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "TrainingState":
        values = dict(raw)
        for name in ("since_line", "since_epoch"):
            sums, cells = values[name]
            values[name] = (dict(sums), int(cells))
        for name in ("plateau", "stopping"):
            values[name] = Patience.from_dict(values[name])
        return cls(**values)


class Checkpointing(Protocol):
    """Where `fit` keeps its state (`engine.checkpoint.Checkpoints`)."""

    def load(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The newest intact (state, tensors), or None if there is none; asked on rank 0."""
        ...

    def due(self, step: int) -> bool:
        """Whether it is time to save; asked on rank 0 before each step."""
        ...

    def save(self, step: int, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Commit; called on every rank with the same values, written by rank 0."""
        ...


@dataclass(frozen=True)
class FitResult:
    """How a run ended. `stopped`: "epochs", "steps", "early", or "interrupted" (to be continued)."""

    history: list[Line]
    steps: int
    epochs: int
    cells: int
    stopped: str
