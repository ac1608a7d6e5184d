import pandas as pd
import pytest

from scarcade.dataloaders.gene_names import GeneNames, align, common_names, looks_like, unversioned
from scarcade.engine.errors import GenesError

IDS = [f"ENSG{i:011d}" for i in range(1, 6)]
SYMBOLS = ["CD3E", "CD19", "MS4A1", "NKG7", "LYZ"]


def test_versions_are_left_out_of_ensembl_ids_alone() -> None:
    names = ["ENSG00000000012.3", "ENSMUSG00000000012.11", "AC012345.6", "ENSG00000000012.3_PAR_Y"]
    assert unversioned(names) == ["ENSG00000000012", "ENSMUSG00000000012", "AC012345.6", "ENSG00000000012.3_PAR_Y"]
    assert looks_like(names[:2]) == "Ensembl ids"
    assert looks_like(SYMBOLS) == "gene symbols"


def test_align_by_index_in_any_order_with_versions_and_extra_genes() -> None:
    found = align([f"{IDS[3]}.7", "extra", IDS[0]], IDS)
    assert found.columns.tolist() == [3, -1, 0]
    assert (found.found, found.missing) == (2, (IDS[1], IDS[2], IDS[4]))
    assert found.share == pytest.approx(0.4)
    assert align(IDS[::-1], [f"{one}.2" for one in IDS]).columns.tolist() == [4, 3, 2, 1, 0]


def test_align_by_a_column_where_the_index_does_not_match() -> None:
    names = GeneNames.of(pd.DataFrame({"feature_name": SYMBOLS}, index=IDS), "q")
    found = align(names, SYMBOLS[::-1])
    assert found.columns.tolist() == [4, 3, 2, 1, 0]
    assert "feature_name" in found.how
    back = GeneNames.of(pd.DataFrame({"gene_ids": [f"{one}.1" for one in IDS]}, index=SYMBOLS), "q")
    assert align(back, IDS).found == 5


def test_a_symbol_of_two_genes_finds_neither() -> None:
    names = GeneNames.of(pd.DataFrame({"feature_name": ["A", "A", "B", "C", "D"]}, index=IDS), "q")
    found = align(names, ["A", "B", "C"])
    assert found.columns.tolist() == [-1, -1, 1, 2, -1]
    assert found.missing == ("A",)
    assert "1 names that stand for several genes" in found.how


def test_duplicates_are_named() -> None:
    with pytest.raises(GenesError, match=r"q: 1 gene names stand more than once: CD3E"):
        GeneNames.of(pd.DataFrame(index=["CD3E", "CD19", "CD3E"]), "q")
    with pytest.raises(GenesError, match="more than once"):
        align(["ENSG00000000012.1", "ENSG00000000012.2"], IDS)


def test_nothing_in_common_says_what_both_look_like() -> None:
    with pytest.raises(GenesError, match=r"Its names look like gene symbols .*wanted are Ensembl ids.*gene_ids"):
        align(SYMBOLS, IDS)
    with pytest.raises(GenesError, match="upper and lower case"):
        align([name.lower() for name in SYMBOLS], SYMBOLS)


def test_files_with_ids_and_files_with_symbols_meet_through_their_columns() -> None:
    by_id = GeneNames.of(pd.DataFrame({"feature_name": SYMBOLS}, index=IDS), "a")
    by_symbol = GeneNames.of(pd.DataFrame(index=SYMBOLS), "b")
    names, how = common_names([("a", by_id), ("b", by_symbol)])
    assert names == [tuple(SYMBOLS), tuple(SYMBOLS)]
    assert "symbols" in how
    both = GeneNames.of(pd.DataFrame({"gene_ids": IDS}, index=SYMBOLS), "c")
    assert common_names([("a", by_id), ("c", both)])[0] == [tuple(IDS), tuple(IDS)]
    with pytest.raises(GenesError, match="no var column translates"):
        common_names([("a", GeneNames(tuple(IDS))), ("b", by_symbol)])


def test_ambiguous_symbols_keep_their_id() -> None:
    by_id = GeneNames.of(pd.DataFrame({"feature_name": ["A", "A", "B", "", "D"]}, index=IDS), "a")
    names, _ = common_names([("a", by_id), ("b", GeneNames.of(pd.DataFrame(index=["A", "B"]), "b"))])
    assert names[0] == (IDS[0], IDS[1], "B", IDS[3], "D")
