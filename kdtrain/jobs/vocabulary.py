"""The ids of a run's softmax: those that stores, teacher and student share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from kdtrain.data.token_store import TOKENIZER, TokenStore
from kdtrain.data.tokenizer import fingerprint, load_tokenizer, vocab_size
from kdtrain.data.tokenizer_compare import compare_tokenizers
from kdtrain.errors import StoreMismatch
from kdtrain.log import LOGGER


class SharedVocabulary:
    """The vocabulary of the first store, without the ids that further stores or models lack.

    size: the softmax has the ids in [0, size), those of the smallest tokenizer and the smallest model. Rows that belong
    to no tokenizer were never trained, and the student may only produce ids of its own tokenizer. Ids that the data
    must not hold are kept with the reason; `check` searches the stores for them.
    """

    def __init__(self, first: TokenStore) -> None:
        self._first = first
        self.size = first.manifest.vocab_size
        self._excluded: dict[int, str] = {}

    @property
    def _tokenizer(self) -> Path:
        return self._first.path / TOKENIZER

    def add_store(self, other: TokenStore) -> None:
        """Raises StoreMismatch if the tokenizer of `other` maps shared ids to other tokens than the first store's."""
        if self._first.manifest.tokenizer_fingerprint == other.manifest.tokenizer_fingerprint:
            return
        found = compare_tokenizers(self._tokenizer, other.path / TOKENIZER)
        if found.difference is not None:
            raise StoreMismatch(
                f"{self._first.path} and {other.path} were made with different tokenizers: {found.difference}\n"
                "  why: one token id must mean one thing\n  fix: prepare both with the same tokenizer"
            )
        self._exclude(found.unshared, f"the tokenizer of {other.path}")
        self.size = min(self.size, other.manifest.vocab_size)

    def add_tokenizers(self, models: Mapping[str, Path]) -> None:
        """models: role -> model folder. Raises StoreMismatch if a model's tokenizer has other tokens for shared ids."""
        for role, folder in models.items():
            _require_tokenizer(self._first, role, folder)
        for role, folder in models.items():
            found = compare_tokenizers(self._tokenizer, folder)
            if found.difference is not None:
                raise StoreMismatch(
                    f"{self._first.path} was made with another tokenizer than the {role}'s ({folder}): "
                    f"{found.difference}\n  fingerprints: {self._first.manifest.tokenizer_fingerprint[:16]} and "
                    f"{fingerprint(folder)[:16]}\n  fix: {_tokenizer_fix(role, models)}"
                )
            self._exclude(found.unshared, f"the tokenizer of {role}.weights = {folder}")
            if found.unshared:
                self.size = min(self.size, vocab_size(folder))

    def add_rows(self, rows: int, source: str) -> None:
        """rows: of a model's embedding and head. source: the model's name for messages."""
        for number in range(rows, self._first.manifest.vocab_size):
            self._excluded.setdefault(number, f"{source} has rows for the ids below {rows:,} only")
        self.size = min(self.size, rows)

    @property
    def unshared(self) -> dict[int, str]:
        """Ids with different tokens in different tokenizers, or without a row in a model, with the reason."""
        return dict(self._excluded)

    def check(self, stores: Sequence[TokenStore]) -> None:
        """Raise StoreMismatch if a store holds an id that is not shared. Reads tokens if the manifest lacks them."""
        for store in stores:
            if found := store.occurring_ids({*self._excluded, *range(self.size, store.manifest.vocab_size)}):
                raise self._not_shared(store, found)

    def report(self, stores: Sequence[TokenStore], exported: Path) -> None:
        """Log the ids that are not in the softmax, if any. exported: folder of the tokenizer that the student keeps."""
        if not self._excluded:
            return
        whole = max(store.manifest.vocab_size for store in stores)
        if self.size < whole:
            why = "the others, which the data does not hold, are not in every model"
            LOGGER.info("data     the softmax has %d of the tokenizer's %d ids: %s", self.size, whole, why)
        vocabulary = load_tokenizer(exported).get_vocab(with_added_tokens=True)
        lost = sorted((number, name) for name, number in vocabulary.items() if number >= self.size)
        if lost:
            listed = ", ".join(f"{number} ({name!r})" for number, name in lost[:8]) + (", ..." if lost[8:] else "")
            what = "the student will be exported without rows for these tokens of its tokenizer, which the run does not"
            LOGGER.warning("%s train: %s; text that holds them cannot be given to it", what, listed)

    def _exclude(self, unshared: Mapping[int, tuple[str | None, str | None]], where: str) -> None:
        for number, (mine, theirs) in unshared.items():
            reason = f"{where} does not have it" if theirs is None else f"{where} calls it {theirs!r}"
            if mine is None:
                reason = f"the tokenizer of {self._first.path} does not have it"
            self._excluded.setdefault(number, reason)

    def _not_shared(self, store: TokenStore, found: list[int]) -> StoreMismatch:
        tokenizer = load_tokenizer(store.path / TOKENIZER)
        listed = ", ".join(f"{number} ({tokenizer.id_to_token(number)!r})" for number in found[:5])
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        return StoreMismatch(
            f"{store.path} holds the ids {listed}{more}; {self._excluded.get(found[0], 'no tokenizer has that id')}\n"
            "  why: an id must mean one token in all data and have a row in every model\n"
            "  fix: leave out the texts that hold these tokens, prepare the corpus with a tokenizer that does not have "
            "them, or use a model that does"
        )


def _require_tokenizer(store: TokenStore, role: str, folder: Path) -> None:
    if not (folder / "tokenizer.json").is_file():
        raise StoreMismatch(
            f"{role}.weights = {folder} has no tokenizer.json to compare with {store.path}'s\n"
            "  why: the student would be trained on ids of other tokens without any error\n"
            "  fix: put the model's tokenizer.json there, or convert it with tokenizer.save_pretrained"
        )


def _tokenizer_fix(role: str, models: Mapping[str, Path]) -> str:
    """The fix for a store with another tokenizer than the model `role`; no store fits two models that differ."""
    for other, folder in models.items():
        found = compare_tokenizers(models[role], folder) if other != role else None
        if found is not None and found.difference is not None:
            return (
                f"use a {role} and a {other} of one tokenizer; these differ, so no corpus serves both: "
                f"{found.difference}"
            )
    return f"prepare the corpus with that model's tokenizer (launch/prepare_corpus.py --tokenizer {models[role]})"
