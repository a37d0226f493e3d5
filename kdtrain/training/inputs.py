"""What a run reads, opened and compared before any weight is loaded: stores, tokenizers, vocabulary sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdtrain.config.schema import RunConfig
from kdtrain.data.token_store import TokenStore
from kdtrain.data.tokenizer import document_prefix, explain_difference, fingerprint
from kdtrain.errors import StoreMismatch
from kdtrain.log import LOGGER
from kdtrain.models.load import ModelSpec, model_rows


@dataclass(frozen=True, slots=True)
class Inputs:
    """Stores that agree on one tokenizer and on what borders documents, and the vocabulary both models must cover.

    vocab_size: the tokenizer's true size; total_rows: rows of the larger of the two models' heads.
    """

    train: tuple[TokenStore, ...]
    validation: TokenStore | None
    vocab_size: int
    total_rows: int

    @property
    def tokenizer_dir(self) -> Path:
        """Folder with the tokenizer.json that made the tokens."""
        return self.train[0].path / "tokenizer"


def open_inputs(cfg: RunConfig, specs: Sequence[ModelSpec]) -> Inputs:
    """Open every store and hold them, the teacher's and the student's tokenizers against each other.

    No store may stand twice in data.train, nor in data.validation what is trained on.

    Warns of documents that do not begin as a model's tokenizer begins a text.
    Reads headers and tokenizers only; does not communicate. Raises DataError for damaged stores, StoreMismatch naming
    both values when two things do not belong together, ConfigError when a model has too few rows.
    """
    train = tuple(TokenStore.open(path) for path in cfg.data.train)
    validation = None if cfg.data.validation is None else TokenStore.open(cfg.data.validation)
    first = train[0]
    for other in (*train[1:], *(() if validation is None else (validation,))):
        _same_tokenizer(first, other)
        _same_borders(first, other)
    _all_different(train, validation)
    for role, folder in (("teacher", cfg.teacher.weights), ("student", cfg.student.weights)):
        if folder is not None:
            _model_tokenizer(first, role, Path(folder))
            _compare_prefix(first, role, Path(folder))
    vocab_size = first.manifest.vocab_size
    return Inputs(train, validation, vocab_size, max(model_rows(spec, vocab_size) for spec in specs))


def _same_tokenizer(first: TokenStore, other: TokenStore) -> None:
    if first.manifest.tokenizer_fingerprint == other.manifest.tokenizer_fingerprint:
        return
    difference = explain_difference(first.path / "tokenizer", other.path / "tokenizer")
    if difference is not None:
        raise StoreMismatch(
            f"{first.path} and {other.path} were made with different tokenizers: {difference}\n"
            "  why: one token id must mean one thing\n  fix: prepare both with the same tokenizer"
        )


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
    twin = None if validation is None else seen.get(validation.manifest.fingerprint)
    if validation is not None and twin is not None:
        raise StoreMismatch(
            f"data.validation = {validation.path} holds the tokens of {twin.path}, which is in data.train "
            f"(fingerprint {twin.manifest.fingerprint[:16]})\n"
            "  why: what was trained on says nothing of held-out text\n"
            "  fix: hold out a share with launch/prepare_corpus.py --validation-share, and name that store"
        )


def _model_tokenizer(store: TokenStore, role: str, folder: Path) -> None:
    if not (folder / "tokenizer.json").is_file():
        raise StoreMismatch(
            f"{role}.weights = {folder} has no tokenizer.json to compare with {store.path}'s\n"
            "  why: ids that mean other tokens would be learned without a word\n"
            "  fix: put the model's tokenizer.json there, or convert it with tokenizer.save_pretrained"
        )
    difference = explain_difference(store.path / "tokenizer", folder)
    if difference is not None:
        raise StoreMismatch(
            f"{store.path} was made with another tokenizer than the {role}'s ({folder}): {difference}\n"
            f"  fingerprints: {store.manifest.tokenizer_fingerprint[:16]} and {fingerprint(folder)[:16]}\n"
            "  fix: prepare the corpus with that model's tokenizer (launch/prepare_corpus.py --tokenizer)"
        )


def _compare_prefix(store: TokenStore, role: str, folder: Path) -> None:
    """Warn of text that begins otherwise than the model is used to: many a model is lost without its <bos>."""
    usual, stored = document_prefix(folder), list(store.manifest.document_prefix)
    if usual != stored:
        LOGGER.warning(
            "the tokenizer of %s.weights = %s puts the ids %s before every text, %s has %s before every document; a "
            "model that misses what it was trained with predicts badly (launch/prepare_corpus.py --bos auto puts it "
            "there)", role, folder, usual, store.path, stored,
        )  # fmt: skip
