"""Consistency of the stores of a run: mismatches are refused with both paths and a fix."""

import json
from dataclasses import replace

import pytest

from kdtrain.config.load import load_run
from kdtrain.data import packing
from kdtrain.data.import_megatron import MegatronSettings, import_megatron
from kdtrain.data.token_store import TokenStore, TokenStoreWriter
from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import StoreMismatch
from kdtrain.jobs.build.batches import build_loader, evaluation_batches
from kdtrain.jobs.inputs import open_inputs
from kdtrain.models.load import ModelSpec
from kdtrain.models.tiny import tiny_config
from kdtrain.stores.keys import SequenceKeys
from tests.support.tiny_data import random_documents, write_pair, write_tokenizer


@pytest.fixture
def world(tmp_path):
    """Makes stores by name and opens them as a run would."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    architecture = tmp_path / "student.json"
    architecture.write_text(json.dumps(tiny_config("qwen3", vocab_size=257)))

    class World:
        @staticmethod
        def store(name, *, seed=0, separator=0, prefix=()):
            folder = tmp_path / name
            with TokenStoreWriter(folder, tokenizer, separator, source="x", document_prefix=prefix) as writer:
                for ids in random_documents(9, seed=seed):
                    writer.add(ids, len(ids))
                writer.commit()
            return folder

        @staticmethod
        def configured(train, validation=None):
            words = [f"student.architecture={architecture}", f"data.train=[{','.join(map(str, train))}]"]
            words += [] if validation is None else [f"data.validation={validation}"]
            config = tmp_path / "run.yaml"
            config.write_text("run: {name: x}\ntrain: {total_tokens: 1024}\n")
            return load_run([str(config), *words]).config

        @staticmethod
        def open(train, validation=None):
            return open_inputs(World.configured(train, validation), [ModelSpec(architecture=str(architecture))])

    return World


def refused(world, train, validation=None):
    with pytest.raises(StoreMismatch) as caught:
        world.open(train, validation)
    message = str(caught.value)
    assert "\n  fix: " in message
    return message


def test_keys_of_training_and_validation_are_apart(world, monkeypatch):
    train, validation = [world.store("a", seed=1), world.store("b", seed=2)], world.store("v", seed=3)
    cfg, inputs = world.configured(train, validation), world.open(train, validation)
    cfg = replace(cfg, data=replace(cfg.data, seq_len=8, tokens_per_step=64, sequences_per_micro_batch=2))
    loader = build_loader(cfg, inputs, Mesh())
    drawn = {int(key) for _ in range(9) for batch in next(loader) for key in batch.sample_ids}
    held_out = {int(key) for batch in evaluation_batches(cfg, inputs, Mesh()) for key in batch.sample_ids}
    loader.close()
    assert len(held_out) > 9
    assert drawn.isdisjoint(held_out)

    class Collides(SequenceKeys):
        def __post_init__(self):
            super().__post_init__()
            if self.store in (inputs.train[1].manifest.fingerprint, inputs.validation.manifest.fingerprint):
                object.__setattr__(self, "base", 5 << 40)

    monkeypatch.setattr(packing, "SequenceKeys", Collides)
    with pytest.raises(StoreMismatch, match=f"{train[1]} and {validation} have the same keys"):
        build_loader(cfg, inputs, Mesh())


def test_matching_stores_are_opened(world):
    train, validation = [world.store("a", seed=1), world.store("b", seed=2)], world.store("v", seed=3)
    inputs = world.open(train, validation)
    assert [s.path for s in inputs.train] == train
    assert inputs.validation.path == validation
    assert (inputs.vocab_size, inputs.total_rows) == (257, 257)
    assert inputs.tokenizer_dir == train[0] / "tokenizer"


@pytest.mark.parametrize("twin", ["b", "copy_of_b"])
def test_validation_on_training_store_is_refused_with_both_paths(world, twin):
    train = [world.store("a", seed=1), world.store("b", seed=2)]
    validation = train[1] if twin == "b" else world.store("copy_of_b", seed=2)
    message = refused(world, train, validation)
    assert f"data.validation = {validation} holds the tokens of {train[1]}" in message
    assert "--validation-share" in message


def test_validation_on_one_of_several_training_pairs_is_refused(world, tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    pairs = [write_pair(tmp_path / name, [[first, 6, 0], [7, 8, 0]]) for name, first in (("a", 4), ("b", 5), ("c", 6))]
    for name, used in (("train", pairs[:2]), ("twin", pairs[1:2]), ("other", pairs[2:])):
        import_megatron(used, tokenizer, tmp_path / name, MegatronSettings(in_place=True))
    train, twin, other = (tmp_path / name / "train" for name in ("train", "twin", "other"))
    message = refused(world, [train], twin)
    assert f"data.validation = {twin} holds the tokens of {train}" in message
    assert "shard_00000.bin and shard_00001.bin have the sha256" in message
    assert len(world.open([train], other).validation) == 2


def test_same_store_twice_is_refused_in_favour_of_weights(world):
    a, b, copy = world.store("a", seed=1), world.store("b", seed=2), world.store("copy", seed=1)
    for second in (a, copy):
        message = refused(world, [a, b, second])
        assert f"{a} and {second} have the fingerprint {TokenStore.open(a).manifest.fingerprint[:16]}" in message
        assert "use data.train_weights" in message


@pytest.mark.parametrize(
    ("other", "name", "values"),
    [({"separator": 5}, "separator_id", "0 and 5"), ({"prefix": [7]}, "document_prefix", "[] and [7]")],
)
def test_stores_with_different_document_borders_are_refused(world, other, name, values):
    a, b, c = world.store("a", seed=1), world.store("b", seed=2), world.store("c", seed=3, **other)
    for train, validation in (([a, c], None), ([a, b], c)):
        message = refused(world, train, validation)
        assert f"{a} and {c} differ in {name}: {values}" in message
