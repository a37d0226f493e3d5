"""The column of the published table with the attention that separates packed documents."""

from importlib import import_module

import pytest

bench = import_module("architectures")
documents = import_module("architecture_documents")

EXPECTED = {
    "llama": "packed, sdpa, eager, flash",
    "gemma2": "packed, eager, flash",
    "stablelm": "sdpa, eager",
    "nemotron": "sdpa, eager",
    "gpt_neo": "eager",
    "gemma4_text": "packed, sdpa, eager",
    "granite_swa": "packed, eager, flash 4",
    "gpt_oss": "none",
    "bloom": "none",
}


def rows():
    """model_type -> the cells of its row in the committed table."""
    lines = [line for line in bench.TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    return {row[1]: row for row in cells if row[1] not in ("model_type", "---")}


def test_every_row_lists_the_attention_that_separates_documents():
    known = {"packed", "sdpa", "eager", "flash", "flash 2", "flash 3", "flash 4", "flash 2 3", "flash 3 4"}
    for model_type, row in rows().items():
        assert len(row) == 6, row
        names, detail = row[4], row[5]
        assert names in (documents.NONE, documents.NOT_MEASURED) or set(names.split(", ")) <= known, row
        assert names == "packed, sdpa, eager, flash" or detail, f"{model_type}: no reason for what is missing"
    assert not {model_type for model_type, row in rows().items() if row[2] == bench.EQUAL} & {
        model_type for model_type, row in rows().items() if row[4] == documents.NOT_MEASURED
    }


@pytest.mark.parametrize("model_type", EXPECTED)
def test_table_matches_a_new_measurement(model_type):
    found = bench.documents_of(model_type)
    assert found.names == EXPECTED[model_type]
    row = rows()[model_type]
    assert row[4] == found.names
    assert found.missing.replace("|", "/").partition(" differ by ")[0] in row[5]


def test_each_reason_is_in_the_detail_once():
    lost = "boundaries are lost"
    obstacles = {"packed": None, "sdpa": "no", "eager": None, "flash_attention_2": lost, "flash_attention_3": lost}
    found = documents.apart_of({**obstacles, "flash_attention_4": lost})
    assert found == documents.Apart("packed, eager", f"no sdpa: no; no flash: {lost}")
    assert documents.apart_of({**obstacles, "flash_attention_4": None}).names == "packed, eager, flash 4"
    assert documents.apart_of(dict.fromkeys(obstacles, "no")).names == documents.NONE
