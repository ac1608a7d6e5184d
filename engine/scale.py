"""How many workers there are, and what each of them is given."""

from pydantic import Field, model_validator

from scarcade.engine.config import Section
from scarcade.engine.cores import granted


class Scale(Section):
    """How many workers train, and what each of them is given."""

    workers: int = Field(0, ge=0, description="Ray Train workers; 0: train in this process, without Ray.")
    min_workers: int | None = Field(
        None, ge=1, description="On a cluster: go on with as few as this when nodes are lost."
    )
    threads: int | None = Field(None, ge=1, description="Threads of each worker; default: its cores.")
    cpus_per_worker: float | None = Field(None, gt=0, description="Cores reserved for each worker; default: its share.")
    gpus: bool = Field(False, description="One GPU for each worker (nccl); without workers: use the GPU.")
    address: str | None = Field(None, description="Running Ray cluster; default: RAY_ADDRESS, else a private session.")
    max_failures: int = Field(3, ge=-1, description="Restarts after a worker was lost; -1: no limit.")
    start_seconds: float = Field(120, gt=0, description="How long to wait for the cluster to give the workers.")

    @model_validator(mode="after")
    def _sensible(self) -> "Scale":
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers ({self.min_workers}) is more than workers ({self.workers})")
        return self

    def grant(self, *, private: bool) -> tuple[float, int]:
        """(cores reserved, threads) of each worker."""
        return granted(self.workers, self.threads, self.cpus_per_worker, private=private)
