"""Keys of sequences: their 64-bit form, its decoding, collisions, and the fingerprint of a packing in them."""

import json
from dataclasses import dataclass, fields, replace

import pytest

from kdtrain.data.packing import FIRST_FIELDS, PackingSpec
from kdtrain.errors import StoreMismatch
from kdtrain.stores.keys import HASH_BITS, NUMBER_BITS, KeySpace, SequenceKeys, first_difference

STORE = "ab" * 32
PACKING = "948e3db2df1f595bb5c86773ab181ae15be556dffd23377f712de1bb31510837"


def test_key_is_a_non_negative_int64_of_hash_and_number():
    keys = SequenceKeys(STORE, PACKING)
    assert NUMBER_BITS + HASH_BITS == 63
    last = (1 << NUMBER_BITS) - 1
    for number in (0, 1, 77, last):
        assert 0 <= keys.key(number) < 1 << 63
        assert keys.key(number) - keys.key(0) == number
    for number in (-1, last + 1):
        with pytest.raises(ValueError, match=r"is not in \[0, 2\^40\)"):
            keys.key(number)


def test_keys_do_not_change_between_versions():
    """Records on disk hold them."""
    assert PackingSpec(1024).fingerprint == PACKING
    assert (
        PackingSpec(16, False, (1, 2)).fingerprint == "754a00824d45c08daea66c1decb314c97c7813ace7ff8c4c2cb4d8bc7f74df11"
    )
    assert SequenceKeys(STORE, PACKING).key(5) == 1269542304918536197


def test_hash_takes_both_fingerprints():
    bases = {
        SequenceKeys(store, spec).base for store in (STORE, "cd" * 32) for spec in (PACKING, PackingSpec(8).fingerprint)
    }
    assert len(bases) == 4
    many = [SequenceKeys(f"{n:064x}", PACKING).base >> NUMBER_BITS for n in range(4096)]
    for bit in range(HASH_BITS):  # 4096 coins: standard deviation 32; 5 of them
        assert abs(sum(value >> bit & 1 for value in many) - 2048) < 5 * 32


def test_key_space_decodes_keys_to_store_and_number():
    one, two = SequenceKeys(STORE, PACKING), SequenceKeys("cd" * 32, PACKING)
    space = KeySpace([("one", one), ("two", two)])
    assert space.decode(two.key(7)) == ("two", 7)
    found = space.by_store([one.key(9), two.key(7), one.key(3)])
    assert found == {"one": [9, 3], "two": [7]}
    assert list(found) == ["one", "two"]
    with pytest.raises(KeyError):
        space.decode(SequenceKeys("ef" * 32, PACKING).key(7))


def test_collision_of_hashes_is_refused_with_both_names():
    seen: dict[int, str] = {}
    for number in range(1 << 20):  # two of a few thousand collide
        keys = SequenceKeys(f"{number:064x}", PACKING)
        if keys.base in seen:
            break
        seen[keys.base] = keys.store
    other = SequenceKeys(seen[keys.base], PACKING)
    KeySpace([("one", keys), ("two", SequenceKeys(STORE, PACKING))])
    with pytest.raises(StoreMismatch, match=r"(?s)^left and right have the same keys.*fix: leave one of them out"):
        KeySpace([("left", keys), ("right", other)])


@dataclass(frozen=True, slots=True)
class Later(PackingSpec):
    """A packing with a field that was added later."""

    sentences: bool = False
    domains: tuple[str, ...] = ()


def test_field_added_later_changes_no_fingerprint_at_its_default():
    for values in ((16,), (16, False, (1, 2))):
        assert Later(*values).fingerprint == PackingSpec(*values).fingerprint
    changed = {Later(16, sentences=True).fingerprint, Later(16, domains=("a",)).fingerprint, Later(16).fingerprint}
    assert len(changed) == 3
    assert Later(16).difference(PackingSpec(16).as_json()) is None
    assert Later(16, sentences=True).difference(PackingSpec(16).as_json()) == ("data.sentences", False, True)
    assert PackingSpec(16).difference(Later(16, sentences=True).as_json()) == ("data.sentences", True, None)


OTHER = {"seq_len": 9, "reset_positions": False, "sequence_prefix": (7,), "version": 2}


@pytest.mark.parametrize("field", [field.name for field in fields(PackingSpec)])
def test_every_field_of_the_packing_changes_fingerprint_and_is_compared(field):
    assert field in OTHER, "give each new field another value here"
    one, other = PackingSpec(8), replace(PackingSpec(8), **{field: OTHER[field]})
    assert other.fingerprint != one.fingerprint
    name, there, here = other.difference(json.loads(json.dumps(one.as_json())))
    assert field in name.replace("packing rule", "version")
    assert (there, here) == (one.as_json()[field], other.as_json()[field])
    assert one.difference(json.loads(json.dumps(one.as_json()))) is None
    default = field not in ("seq_len",)
    lacking = {name: value for name, value in one.as_json().items() if name != field}
    assert (one.difference(lacking) is None) == default


def test_first_fields_are_those_of_the_first_fingerprints():
    assert set(FIRST_FIELDS) == {"seq_len", "reset_positions", "sequence_prefix", "version"}
    assert set(PackingSpec(16).as_json()) == set(FIRST_FIELDS)


def test_first_difference_names_a_field_and_both_values():
    assert first_difference({"a": 1, "b": [2]}, {"a": 1, "b": [2]}) is None
    assert first_difference({"a": 1, "b": 2}, {"b": 3, "a": 4}) == ("b", 2, 3)
    assert first_difference({"a": 1, "b": 2}, {"a": 1}) == ("b", 2, None)
    assert first_difference({"a": 1}, {"a": 1, "b": 2}) == ("b", None, 2)
