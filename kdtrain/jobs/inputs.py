"""Inputs of a run, opened and compared before any weight is loaded: stores, tokenizers, vocabulary sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kdtrain.config.schema import RunConfig
from kdtrain.data.token_store import TokenStore
from kdtrain.data.tokenizer import document_prefix
from kdtrain.errors import StoreMismatch
from kdtrain.jobs.vocabulary import SharedVocabulary
from kdtrain.log import LOGGER
from kdtrain.models.load import ModelSpec, model_rows


@dataclass(frozen=True, slots=True)
class Inputs:
    """Stores with one meaning of their ids and one way to separate documents, and the vocabulary of both models.

    vocab_size: ids of the softmax, which all stores and models share. total_rows: rows of the larger model's head.
    unshared: ids with different tokens in different tokenizers, or without a row, with the reason; no store holds one.
    """

    train: tuple[TokenStore, ...]
    validation: TokenStore | None
    vocab_size: int
    total_rows: int
    unshared: Mapping[int, str] = field(default_factory=dict)

    @property
    def stores(self) -> tuple[TokenStore, ...]:
        """The training stores, then the validation store."""
        return (*self.train, *(() if self.validation is None else (self.validation,)))

    @property
    def tokenizer_dir(self) -> Path:
        """Folder with the tokenizer.json that made the tokens."""
        return self.train[0].path / "tokenizer"


def open_inputs(cfg: RunConfig, specs: Sequence[ModelSpec]) -> Inputs:
    """Open every store and compare the tokenizers of stores, teacher and student.

    data.train may name a store only once, and data.validation may hold no shard of data.train. Warns of documents that
    do not begin with the ids that a model's tokenizer puts before a text.

    Reads headers and tokenizers; all tokens of a store only if a model lacks an id of its tokenizer and the manifest
    does not record whether it occurs. Does not communicate. Raises DataError for damaged stores, StoreMismatch naming
    both values for inputs that do not fit together, ConfigError for a model that is not a text model.
    """
    train = tuple(TokenStore.open(path) for path in cfg.data.train)
    validation = None if cfg.data.validation is None else TokenStore.open(cfg.data.validation)
    stores = (*train, *(() if validation is None else (validation,)))
    vocabulary = SharedVocabulary(train[0])
    for other in stores[1:]:
        vocabulary.add_store(other)
        _same_borders(train[0], other)
    _all_different(train, validation)
    named = {"teacher": cfg.teacher.weights, "student": cfg.student.weights}
    models = {role: Path(name) for role, name in named.items() if name is not None}
    vocabulary.add_tokenizers(models)
    for role, path in models.items():
        _compare_prefix(train[0], role, path)
    rows = {spec.weights: model_rows(spec, 1) for spec in specs if spec.weights is not None}
    for folder, count in rows.items():
        vocabulary.add_rows(count, f"model {folder!r}")
    vocabulary.check(stores)
    vocabulary.report(stores, models.get("student", train[0].path / "tokenizer"))
    total_rows = max([vocabulary.size, *rows.values()])
    return Inputs(train, validation, vocabulary.size, total_rows, vocabulary.unshared)


def _same_borders(first: TokenStore, other: TokenStore) -> None:
    a, b = first.manifest, other.manifest
    for name, mine, theirs, option in (
        ("separator_id", a.separator_id, b.separator_id, "--separator"),
        ("document_prefix", list(a.document_prefix), list(b.document_prefix), "--bos"),
    ):
        if mine != theirs:
            raise StoreMismatch(
                f"{first.path} and {other.path} differ in {name}: {mine} and {theirs}\n"
                "  why: the models would see documents begin or end in two ways\n"
                f"  fix: prepare both with the same {option}"
            )


def _all_different(train: Sequence[TokenStore], validation: TokenStore | None) -> None:
    seen: dict[str, TokenStore] = {}
    for store in train:
        earlier = seen.setdefault(store.manifest.fingerprint, store)
        if earlier is not store:
            raise StoreMismatch(
                f"data.train names the same tokens twice: {earlier.path} and {store.path} have the fingerprint "
                f"{store.manifest.fingerprint[:16]}\n  fix: name it once, and use data.train_weights to draw from it "
                "more often"
            )
    if validation is None:
        return
    held_out = {shard.bin_sha256: shard.name for shard in validation.manifest.shards}
    for store in train:
        for shard in store.manifest.shards:
            if shard.bin_sha256 in held_out:
                raise StoreMismatch(
                    f"data.validation = {validation.path} holds the tokens of {store.path}, which is in data.train: "
                    f"{held_out[shard.bin_sha256]}.bin and {shard.name}.bin have the sha256 {shard.bin_sha256[:16]}\n"
                    "  why: validation on text of the training data does not measure generalisation\n"
                    "  fix: hold out a share with launch/prepare_corpus.py --validation-share, and name that store"
                )


def _compare_prefix(store: TokenStore, role: str, folder: Path) -> None:
    """Warn if documents lack the ids, mostly <bos>, that the model's tokenizer puts before a text."""
    usual, stored = document_prefix(folder), list(store.manifest.document_prefix)
    if usual != stored:
        LOGGER.warning(
            "the tokenizer of %s.weights = %s puts the ids %s before every text, %s has %s before every document; a "
            "model that misses what it was trained with predicts badly (launch/prepare_corpus.py --bos auto puts it "
            "there)",
            role,
            folder,
            usual,
            store.path,
            stored,
        )
