"""Gene programs of .gmt files: which are kept, and how genes are matched."""

from pathlib import Path

import pytest

from scarcade.dataloaders.programs import read_programs
from scarcade.engine.errors import GenesError, OpenError

GENES = ["G1", "G2", "G3", "G4", "G5", "Actb", "ENSG00000000012.3"]


def gmt(folder: Path, *lines: str, name: str = "a.gmt") -> Path:
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def test_sizes_and_order(tmp_path: Path) -> None:
    path = gmt(tmp_path, "P_ONE\turl\tG3\tG1\tG2\tG99", "", "P_TWO\tna\tG4", "P_ALL\tna\tG1\tG2\tG3\tG4\tG5")
    found = read_programs([path], GENES, min_genes=3, max_genes=4)
    assert found.programs == {"P_ONE": ("G1", "G2", "G3")}
    assert (found.n_read, found.too_small, found.too_large) == (3, 1, 1)
    assert (found.genes_found, found.genes_named) == (5, 6)
    assert str(found) == "1 of 3 programs kept, 1 too small, 1 too large; 5 of their 6 genes are in the data"


def test_case_versions_scores_and_blanks(tmp_path: Path) -> None:
    path = gmt(tmp_path, "A\t\tACTB,1.0\tg1\tENSG00000000012.9\tACTB")
    assert read_programs([path], GENES, min_genes=1).programs == {"A": ("G1", "Actb", "ENSG00000000012.3")}
    assert read_programs([gmt(tmp_path, "A url G1 G2")], GENES, min_genes=1).programs == {"A": ("G1", "G2")}


def test_genes_that_differ_by_case_are_not_mixed_up(tmp_path: Path) -> None:
    path = gmt(tmp_path, "A\t\tactb\tACTB", "B\t\taCtB\tG1")
    found = read_programs([path], ["ACTB", "Actb", "actb", "G1"], min_genes=1).programs
    assert found == {"A": ("ACTB", "actb"), "B": ("ACTB", "G1")}


def test_long_and_repeated_names_are_kept_apart(tmp_path: Path) -> None:
    name = "REACTOME_A_VERY_LONG_NAME_THAT_SCARCHES_CUTS_AT_THIRTY_LETTERS"
    first = gmt(tmp_path, f"{name}_1\t\tG1", f"{name}_2\t\tG2")
    second = gmt(tmp_path, f"{name}_1\t\tG3", name="b.gmt")
    found = read_programs([first, second], GENES, min_genes=1).programs
    assert found == {f"{name}_1": ("G1",), f"{name}_2": ("G2",), f"{name}_1_2": ("G3",)}


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    with pytest.raises(OpenError, match="cannot be read"):
        read_programs([tmp_path / "none.gmt"], GENES)
    with pytest.raises(OpenError, match="line 2"):
        read_programs([gmt(tmp_path, "A\tb\tG1", "word")], GENES)
    (tmp_path / "binary.gmt").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(OpenError, match="not text"):
        read_programs([tmp_path / "binary.gmt"], GENES)
    with pytest.raises(GenesError, match="0 of 1 programs kept, 1 too small"):
        read_programs([gmt(tmp_path, "A\tb\tG1\tG2")], GENES)
