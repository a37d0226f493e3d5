"""Token stores and checkpoints that older versions wrote are read as those versions read them."""

import hashlib
import json
from pathlib import Path

import pytest

from kdtrain.data.loader import StepLoader, StepShape, sequence_prefix_of
from kdtrain.data.packing import PackingSpec
from kdtrain.data.token_store import TokenStore
from kdtrain.engine import checkpoint
from kdtrain.engine.slices import CheckpointReader

SAMPLES = Path(__file__).parents[1] / "support/samples"
NAMES = sorted(path.parent.name for path in SAMPLES.glob("*/expected.json"))
CHECKPOINT = "step_000002"


def expected(name):
    return json.loads((SAMPLES / name / "expected.json").read_text(encoding="utf-8"))


def words_of(count, seed):
    """The ids of a store, by the rule of write_sample.py."""
    value, documents = seed, []
    for _ in range(count):
        ids = []
        for _ in range(30):
            value = (value * 1103515245 + 12345) % (1 << 31)
            ids.append(1 + (value >> 16) % 64)
        documents.append([*ids, 0])
    return documents


def test_there_is_a_sample_of_every_version():
    versions = {json.loads((SAMPLES / n / CHECKPOINT / "checkpoint.json").read_text())["version"] for n in NAMES}
    assert versions == {1, 2}
    assert NAMES == ["2026_11_30", "checkpoint_1", "checkpoint_2", "first"]


@pytest.mark.parametrize("name", NAMES)
def test_old_token_stores_open_and_verify_and_hold_their_tokens(name):
    for number, letter in enumerate("ab"):
        store = TokenStore.open(SAMPLES / name / letter)
        store.verify()
        documents = words_of(20 + 4 * number, 1 + number)
        assert [store[place].tolist() for place in range(len(store))] == documents
        assert store.tokens(0, store.num_tokens).tolist() == [token for ids in documents for token in ids]


@pytest.mark.parametrize("name", NAMES)
def test_old_checkpoints_open_and_verify_and_hold_their_weights(name):
    folder = SAMPLES / name / CHECKPOINT
    assert checkpoint.is_complete(folder)
    with CheckpointReader(folder) as reader:
        reader.verify()
    found = {n: hashlib.sha256(w.numpy().tobytes()).hexdigest() for n, w in checkpoint.read_full_parameters(folder)}
    assert found == expected(name)["weights"]
    assert checkpoint.step_of(folder) == 2
    assert checkpoint.read_dtype(folder) == "float32"


@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize("name", NAMES)
def test_loader_continues_from_an_old_checkpoint_with_its_numbers_of_stores(name, order):
    state = checkpoint.read_state(SAMPLES / name / CHECKPOINT)["loader"]
    assert state["stores"] != sorted(state["stores"]), "else the order of the list would not matter"
    assert sequence_prefix_of(state) == ()
    stores = [TokenStore.open(SAMPLES / name / letter) for letter in order]
    weights = [dict(zip(expected(name)["listed"], state["weights"], strict=True))[letter] for letter in order]
    loader = StepLoader(stores, weights, packing=PackingSpec(16), shape=StepShape(8, 4), seed=3, prefetch=0)
    loader.load_state_dict(state)
    drawn = [loader.keys.decode(int(key)) for _ in range(2) for batch in next(loader) for key in batch.sample_ids]
    assert "".join(f" {Path(path).name}{number}" for path, number in drawn) == DRAWN
    assert loader.state_dict() == {**state_of_today(state), "sequences": 32}


DRAWN = " b0 a21 a0 b44 a25 a7 b29 a11 a10 b12 a15 a30 b38 a9 a3 b2"
"""Sequences of steps 3 and 4, as 091fe40 drew them."""


def state_of_today(state):
    kept = {name: state[name] for name in ("seed", "stores", "weights")}
    return {**kept, "packing": PackingSpec(16).as_json()}
