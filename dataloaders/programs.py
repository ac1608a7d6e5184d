"""Gene programs from .gmt files, aligned with the genes of a store.

A line of a .gmt file is a program: its name, a description, its genes, separated by tabs (MSigDB, Enrichr, PanglaoDB).
Genes are matched by name, else without regard to upper and lower case where that is unambiguous; versions of Ensembl
ids are left out of the comparison. One look-up a gene: the time does not depend on how many programs there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scarcade.dataloaders.gene_names import looks_like, unversioned
from scarcade.engine.errors import GenesError, OpenError

_LIMIT = 1 << 30  # bytes of a .gmt file; all of MSigDB is 30 MB


@dataclass(frozen=True)
class ProgramsReport:
    """The programs that were kept, and what became of the rest."""

    programs: dict[str, tuple[str, ...]]  # in the order of the files; genes in the order of the store
    n_read: int
    too_small: int
    too_large: int
    genes_found: int  # different genes of all files that the store has
    genes_named: int

    def __str__(self) -> str:
        out = f"{len(self.programs)} of {self.n_read} programs kept"
        for count, word in ((self.too_small, "too small"), (self.too_large, "too large")):
            out += f", {count} {word}" if count else ""
        return f"{out}; {self.genes_found} of their {self.genes_named} genes are in the data"


def read_programs(
    paths: Sequence[str | Path],
    genes: Sequence[str],
    *,
    min_genes: int = 13,
    max_genes: int | None = None,
    option: str = "--programs",
) -> ProgramsReport:
    """The programs of all `paths` with `min_genes` to `max_genes` of the given `genes`.

    Names are kept whole; a name that comes again gets ``_2``, ``_3``, ... (scArches drops what stands before the
    first underscore, cuts at 30 letters, and mixes up what is then the same). The default size is that of its
    tutorial, which asks for more than 12. `option` is what messages name.

    Raises:
        OpenError: a file cannot be read, or is not a .gmt file. GenesError: no program is kept.
    """
    places = _places(genes)
    programs: dict[str, tuple[str, ...]] = {}
    named: set[str] = set()
    found: set[int] = set()
    n_read = too_small = too_large = 0
    for path in paths:
        for name, members in _lines(Path(path), option):
            n_read += 1
            named.update(members)
            inside = sorted({i for m in members if (i := places.get(m, places.get(m.upper(), -1))) >= 0})
            found.update(inside)
            if len(inside) < max(min_genes, 1):
                too_small += 1
            elif max_genes is not None and len(inside) > max_genes:
                too_large += 1
            else:
                programs[_unused(name, programs)] = tuple(genes[i] for i in inside)
    report = ProgramsReport(programs, n_read, too_small, too_large, len(found), len(named))
    if not programs:
        where = f"{option} {', '.join(map(str, paths))}"
        if not n_read:
            raise OpenError(f"{where}: holds no program (a line each: name, description, genes)")
        if not found:
            raise GenesError(
                f"{where}: the data have none of the {len(named)} genes of {n_read} programs; those names look like "
                f"{looks_like(sorted(named))} ({_some(sorted(named))}), the data's like {looks_like(list(genes))} "
                f"({_some(genes)})"
            )
        most = "" if max_genes is None else f", --model.max-program-genes {max_genes}"
        raise GenesError(f"{where}: {report}; wanted are --model.min-program-genes {min_genes}{most}")
    return report


def _some(names: Sequence[str]) -> str:
    return ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "")


def _places(genes: Sequence[str]) -> dict[str, int]:
    """Name -> place: as it is, without a version, and in upper case, where only one gene is called so."""
    places: dict[str, int] = {}
    for spelled in (unversioned(list(genes)), [name.upper() for name in unversioned(list(genes))]):
        own: dict[str, int] = {}
        twice: set[str] = set()
        for i, name in enumerate(spelled):
            if own.setdefault(name, i) != i:
                twice.add(name)
        for name, i in own.items():
            if name not in twice:
                places.setdefault(name, i)
    return places


def _lines(path: Path, option: str) -> list[tuple[str, list[str]]]:
    """(name, genes) of each line."""
    try:
        if path.stat().st_size > _LIMIT:
            raise OpenError(f"{option} {path}: larger than {_LIMIT} bytes: not a .gmt file")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise OpenError(f"{option} {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise OpenError(f"{option} {path}: not text, so not a .gmt file") from error
    out = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        # fields are separated by tabs; some files have blanks, as scArches reads them
        fields = [field.strip() for field in line.split("\t")] if "\t" in line else line.split()
        if len(fields) < 2 or not fields[0]:
            raise OpenError(f"{option} {path}: line {number} is not a program (name, description, genes)")
        # Enrichr writes GENE,1.0
        out.append((fields[0], unversioned([field.split(",")[0] for field in fields[2:] if field])))
    return out


def _unused(name: str, taken: dict[str, tuple[str, ...]]) -> str:
    number, candidate = 1, name
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    return candidate
