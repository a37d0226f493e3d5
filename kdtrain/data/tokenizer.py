"""A tokenizer folder (tokenizer.json, Hugging Face `tokenizers`): identity, size, document prefix."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from kdtrain.errors import ConfigError, DataError
from kdtrain.stores.checksums import sha256_of_json

_ADDED_TOKEN = ("id", "content", "special", "single_word", "lstrip", "rstrip", "normalized")


def tokenizer_file(folder: str | Path) -> Path:
    """<folder>/tokenizer.json. Raises ConfigError if it is not there."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist\n  why: token stores and models are matched by their tokenizer\n"
            "  fix: put the tokenizer.json of the model there (tokenizer.save_pretrained writes it)"
        )
    return path


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in `folder`, without the truncation and padding that its file may set.

    Raises ConfigError if there is none, DataError if it cannot be parsed.
    """
    path = tokenizer_file(folder)
    try:
        with _LibraryErrors(path):
            tokenizer = Tokenizer.from_file(str(path))
    except DataError:
        _json(path)  # what is not JSON, or not a tokenizer, gets a message of its own; parsed only here, as it is large
        raise
    # The file may contain truncation and padding for a model's inputs; documents must be encoded whole.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class _LibraryErrors:
    """Turns errors of `tokenizers` into a DataError: it raises plain `Exception`; subclasses are other errors."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is Exception:
            raise DataError(
                f"{self._path} is not a tokenizer that the tokenizers library reads: {error}\n"
                "  fix: copy it again from the model it belongs to, or install a newer tokenizers"
            ) from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} if it holds another kind of value. Raises DataError if it is not JSON."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, numbers or nesting beyond what Python reads
        raise DataError(f"{path} is damaged: {error}\n  fix: copy it again from the model it belongs to") from error
    return found if isinstance(found, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    found = read_object(path)
    if not isinstance(found.get("model"), dict):
        raise DataError(f"{path} is not a tokenizer: it has no key 'model'\n  fix: use a Hugging Face tokenizer.json")
    return found


def fingerprint(folder: str | Path) -> str:
    """sha256 over what decides ids: vocabulary, merges, normaliser, pre-tokenizer and added tokens."""
    found = _json(tokenizer_file(folder))
    settings = {key: value for key, value in found["model"].items() if key not in ("vocab", "merges") and value}
    added = sorted(([t.get(key) for key in _ADDED_TOKEN] for t in found.get("added_tokens") or []), key=lambda t: t[0])
    return sha256_of_json({"model": settings, "added_tokens": added, **_vocabulary(found)})


def first_fingerprint(folder: str | Path) -> str:
    """`fingerprint` by the rule of the first token stores: of the model's settings only its type was part of it."""
    found = _json(tokenizer_file(folder))
    added = sorted([t["id"], t["content"], t.get("special", False)] for t in found.get("added_tokens") or [])
    return sha256_of_json({"type": found["model"].get("type"), "added_tokens": added, **_vocabulary(found)})


def _vocabulary(found: Mapping[str, Any]) -> dict[str, Any]:
    """What both rules have in common."""
    vocab, merges = found["model"].get("vocab", {}), found["model"].get("merges") or []
    return {
        "vocab": sorted(vocab.items()) if isinstance(vocab, dict) else vocab,
        "merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
        "normalizer": found.get("normalizer"),
        "pre_tokenizer": found.get("pre_tokenizer"),
    }


def vocab_size(folder: str | Path) -> int:
    """The largest id plus one; a model's head may have more rows, as padding. Raises as above."""
    return size_of(load_tokenizer(folder), tokenizer_file(folder))


def size_of(tokenizer: Tokenizer, path: Path) -> int:
    """`vocab_size` of a tokenizer that was loaded from the file `path`."""
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    if not ids:
        raise DataError(f"{path} has no tokens\n  fix: copy it again from the model it belongs to")
    return int(max(ids)) + 1


def trained_ids(folder: str | Path) -> set[int]:
    """Ids of the vocabulary that the tokenizer was trained with, added tokens left out. Raises as above."""
    tokenizer = load_tokenizer(folder)
    return set(tokenizer.get_vocab(with_added_tokens=False).values()) - tokenizer.get_added_tokens_decoder().keys()


def document_prefix(folder: str | Path) -> list[int]:
    """Ids that the tokenizer's post-processor puts before a single text, most often its <bos>; [] if none.

    What it would put after a text is left out: documents end with the separator. Raises as `load_tokenizer`, DataError
    if no text has tokens.
    """
    return prefix_of(load_tokenizer(folder), tokenizer_file(folder))


def prefix_of(tokenizer: Tokenizer, path: Path) -> list[int]:
    """`document_prefix` of a tokenizer that was loaded from the file `path`."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    for text in sorted(vocabulary, key=lambda name: vocabulary[name]):
        try:
            with _LibraryErrors(path):
                known = len(tokenizer.encode(text, add_special_tokens=False).ids) > 0
        except DataError:
            continue  # a vocabulary without an unknown token cannot encode all of its own names
        if known:
            found = tokenizer.encode(text, add_special_tokens=True)
            marked = zip(found.ids, found.special_tokens_mask, strict=True)
            return [int(token) for token, _ in takewhile(lambda pair: pair[1] == 1, marked)]
    raise DataError(f"{path}: no text has tokens\n  fix: copy it again from the model it belongs to")
