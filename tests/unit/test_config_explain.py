import re
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from kdtrain.config import explain, schema
from kdtrain.config.keys import all_keys, expected, suggestion
from kdtrain.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_every_key_is_documented_by_a_sentence():
    docs = explain.documented()
    assert [doc.key.name for doc in docs] == list(all_keys())
    for doc in docs:
        assert len(doc.text) > 5, doc.key.name
        assert doc.text.endswith("."), doc.key.name


def test_documentation_belongs_to_the_field_above_it():
    docs = {doc.key.name: doc for doc in explain.documented()}
    assert docs["optim.eps"].text == "AdamW epsilon."
    assert docs["eval.every_steps"].text.startswith("Steps between evaluations")
    assert docs["checkpoint.every_steps"].text.startswith("Steps between checkpoints")
    assert docs["optim"].text == "AdamW."


def test_types_and_defaults_are_described():
    docs = {doc.key.name: (doc.accepts, doc.default) for doc in explain.documented()}
    assert docs["run.name"] == ("a string", "must be set")
    assert docs["zero.stage"] == ("one of 0, 1, 2, 3", "1")
    assert docs["optim.grad_clip"] == ("a number or null", "1.0")
    assert docs["optim.betas"] == ("a list of 2 numbers", "[0.9, 0.95]")
    assert docs["data.train_weights"] == ("a list of numbers or null", "null")
    assert docs["data.reset_positions"] == ("true or false", "true")
    assert docs["zero.extra"][0] == "a mapping"
    assert expected(int | None) == "an integer or null"
    assert expected(typing.Optional[int]) == "an integer or null"  # noqa: UP045


def test_all_keys_are_the_fields_of_the_schema():
    def leaves(section, prefix=""):
        for field in fields(section):
            value = getattr(section, field.name)
            yield from leaves(value, f"{prefix}{field.name}.") if is_dataclass(value) else [f"{prefix}{field.name}"]

    assert [name for name, key in all_keys().items() if not key.section] == list(leaves(schema.RunConfig()))


def test_help_shows_everything_or_one_section_or_one_key():
    whole = explain.help_text("Train a student.")
    assert whole.startswith("Train a student.\n")
    assert all(f"{name}: " in whole or f"  {name} = " in whole for name in all_keys())
    section = explain.help_text("Train a student.", "log")
    assert "log.wandb.mode = off    (one of off, offline, online)" in section
    assert "optim.lr" not in section
    assert "Train a student" not in section
    assert explain.help_text("", "optim.lr").splitlines() == [
        "  optim.lr = 0.0003    (a number)",
        "      Peak learning rate.",
    ]


def test_help_on_an_unknown_key_suggests_a_similar_one():
    with pytest.raises(ConfigError, match=r"(?s)--help optm: there is no such section.*did you mean optim\?.*run, "):
        explain.help_text("", "optm")


@pytest.mark.parametrize("name", ["qqqqqq", "zzz.yyy", ""])
def test_no_suggestion_without_a_similar_key(name):
    assert suggestion(name, all_keys()) is None


def test_page_has_one_row_per_setting_and_well_formed_tables():
    page = explain.markdown()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [re.match(r"\| `([\w.]+)`", row)[1] for row in rows] == [n for n, k in all_keys().items() if not k.section]
    for row in rows:
        assert len(re.findall(r"(?<!\\)\|", row)) == 5, row
        assert "<" not in re.sub(r"`[^`]*`", "", row), "would vanish as an HTML tag"


def test_committed_page_is_current():
    committed = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert committed == explain.markdown(), "run: python -m kdtrain.config.explain > docs/configuration.md"
