"""The tree of our exceptions and the exit codes that a command ends with.

::

    ScarcadeError                      1   a bug of ours, if it ever reaches a user bare
    ├── UsageError                     2   wrong usage or configuration
    ├── PartialError                   3   some queries failed and the rest are done
    ├── InputError                     4   input that cannot be used
    │   ├── OpenError                      not a file of that kind, truncated, unreadable
    │   ├── CorruptError                   the manifest's or the codec's checksum disagrees
    │   │   └── MissingChunkError          a chunk or a shard is not there (never zeros)
    │   ├── CountsError                    NaN, negative or fractional where counts were wanted
    │   ├── CsrError                       indptr or column indices out of range or order
    │   ├── GenesError                     duplicate genes, no gene in common
    │   ├── CategoryError                  a batch or label that is missing or not known
    │   ├── ModelFileError                 a model folder that is no model, or was changed
    │   │   └── UnsafeFileError            a file that could run code when it is read
    │   ├── DataChangedError               the data are not those that the run began with
    │   ├── LimitError                     sizes beyond what any real file has (a bomb)
    │   └── NonFiniteError                 a loss that is not finite; nothing was updated
    └── SurroundingsError              5   storage, cluster, disk or memory failed
        ├── StorageError
        ├── ClusterError
        ├── MemoryLimitError               needs more memory than there is, or than it may have
        ├── CheckpointError
        └── BusyError                      another process writes there now

A message for a user stands alone: what was given, what was wanted, which option to change.
"""

from typing import ClassVar


class ScarcadeError(Exception):
    """The root. ``exit_code`` is what the command line ends with, ``code`` a stable short name."""

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "E_BUG"


class UsageError(ScarcadeError):
    """An option, a configuration file or a combination of them that cannot be meant."""

    exit_code = 2
    code = "E_USAGE"


class PartialError(ScarcadeError):
    """Some queries failed; the others are done and their results are in place."""

    exit_code = 3
    code = "E_PARTIAL"


class InputError(ScarcadeError):
    """Input that cannot be used: broken, wrong, or not matching."""

    exit_code = 4
    code = "E_INPUT"


class OpenError(InputError):
    """A path that cannot be opened as what it should be."""

    code = "E_OPEN"


class CorruptError(InputError):
    """Bytes on disk that are not those that were written."""

    code = "E_CORRUPT"


class MissingChunkError(CorruptError):
    """A chunk or shard that is not there. Zarr would read it as zeros; we do not."""

    code = "E_MISSING_CHUNK"


class CountsError(InputError):
    """Values that are not counts where the likelihood needs counts."""

    code = "E_COUNTS"


class CsrError(InputError):
    """A sparse matrix whose structure would make compiled code read out of bounds."""

    code = "E_CSR"


class GenesError(InputError):
    """Gene names that are ambiguous, or have nothing in common with the reference's."""

    code = "E_GENES"


class CategoryError(InputError):
    """A batch, covariate or label value that is missing or that the model does not know."""

    code = "E_CATEGORY"


class ModelFileError(InputError):
    """A model folder that is not one, or whose hash differs from its manifest."""

    code = "E_MODEL"


class UnsafeFileError(ModelFileError):
    """A file that could run code when it is read (a pickle)."""

    code = "E_UNSAFE"


class DataChangedError(InputError):
    """The data under a run are not those that it began with."""

    code = "E_DATA_CHANGED"


class LimitError(InputError):
    """Sizes in a file's metadata beyond what any real file has."""

    code = "E_LIMIT"


class NonFiniteError(InputError):
    """A loss or gradient that is not finite; the step was not taken."""

    code = "E_NONFINITE"


class SurroundingsError(ScarcadeError):
    """Storage, cluster, disk or memory failed; the same command may succeed later."""

    exit_code = 5
    code = "E_SURROUNDINGS"


class StorageError(SurroundingsError):
    """A file system or object store that did not answer, or is full."""

    code = "E_STORE"


class ClusterError(SurroundingsError):
    """Ray could not be reached, or could not give what was asked for."""

    code = "E_CLUSTER"


class MemoryLimitError(SurroundingsError):
    """More memory is needed than there is, or than a worker may have."""

    code = "E_MEMORY"


class CheckpointError(SurroundingsError):
    """No checkpoint could be written, or none of those that are there is intact."""

    code = "E_CKPT"


class BusyError(SurroundingsError):
    """Another process is writing to the same place."""

    code = "E_BUSY"
