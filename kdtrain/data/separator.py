"""The token that ends a document: the one named by the user, or one chosen from the tokenizer's files.

An instruct model's eos_token often ends a turn of a conversation. A model trained on documents that end with it would
end its turn after every document.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from kdtrain.data.tokenizer import load_tokenizer, prefix_of, read_object, tokenizer_file
from kdtrain.errors import ConfigError
from kdtrain.log import LOGGER

DEFAULT_SEPARATOR = "<|endoftext|>"
_DOCUMENT_END = re.compile(
    r"</s>|(?<![a-z])eo[sd](?![a-z])|end[^a-z]?of[^a-z]?(text|sentence|document|doc)(?![a-z])", re.IGNORECASE
)
"""Names that tokenizers give to the end of a text, as a whole word: </s>, <eos>, <EOS_TOKEN>, <|end_of_text|>, ..."""
_TURN_END = re.compile(
    r"(?<![a-z])(eot|eom|im_end|call|user|assistant)(?![a-z])|end[^a-z]?of[^a-z]?message|turn",
    re.IGNORECASE,
)
"""Names that tokenizers give to the end of a turn: <|eot_id|>, <|im_end|>, <end_of_turn>, ..."""


@dataclass(frozen=True, slots=True)
class Separator:
    """The token after every document. why: the reason for the choice, for the log."""

    id: int
    token: str
    why: str


def choose_separator(folder: str | Path, name: str | None = None, tokenizer: Tokenizer | None = None) -> Separator:
    """The token to write after every document. tokenizer: that of `folder`, if it is loaded.

    `name`; else <|endoftext|> if the vocabulary has it; else eos_token, unless it ends a turn (by its name, or because
    it is in the chat template) and not a document (by its name); then the vocabulary's special token that by its name
    ends a document, or the one that generation_config.json or config.json list beside the turn end.
    Raises ConfigError if there is none.
    """
    path, tokenizer = Path(folder), load_tokenizer(folder) if tokenizer is None else tokenizer
    if name is not None:
        return _named(path, tokenizer, name)
    found = tokenizer.token_to_id(DEFAULT_SEPARATOR)
    if found is not None:
        return Separator(found, DEFAULT_SEPARATOR, "the usual document end is in the vocabulary")
    eos = _configured_eos(path)
    candidates = list(_document_ends(path))
    eos_id = None if eos is None else tokenizer.token_to_id(eos)
    if eos is None or eos_id is None:
        raise _none(path, [DEFAULT_SEPARATOR, *([eos] if eos else [])], candidates)
    if _DOCUMENT_END.search(eos):
        return Separator(eos_id, eos, "the tokenizer's eos_token")
    turn = _turn_evidence(path, eos)
    if turn is None:
        return Separator(eos_id, eos, "the tokenizer's eos_token")
    for token in [*candidates, *_listed_ends(path, tokenizer, eos)]:
        found = tokenizer.token_to_id(token)
        if found is not None:
            return Separator(found, token, f"the document end; eos_token {eos} ends a turn ({turn})")
    raise ConfigError(
        f"{path}: no token ends a document: eos_token {eos!r} ends a turn ({turn}), and no other is known\n"
        "  why: a model would learn to end its turn after every text\n"
        f"  fix: name one with --separator TOKEN (--separator {eos!r} takes the turn end)"
    )


def separator_id(folder: str | Path, name: str | None = None) -> int:
    """Id of the token written after every document, as `choose_separator` has it."""
    return choose_separator(folder, name).id


def document_borders(
    folder: str | Path, tokenizer: Tokenizer, name: str | None, bos: str
) -> tuple[Separator, list[int]]:
    """(separator, prefix) of every document; logs both.

    bos: "auto" for what the tokenizer's post-processor puts before a text, "never" for nothing, or a token. Raises
    ConfigError as `choose_separator`, for an unknown `bos`, and where the tokenizer's files contradict each other.
    """
    separator = choose_separator(folder, name, tokenizer)
    LOGGER.info("prepare  each document ends with %s (token %d): %s", separator.token, separator.id, separator.why)
    prefix, why = _beginning(Path(folder), tokenizer, bos)
    if prefix:
        names = " ".join(str(tokenizer.id_to_token(token)) for token in prefix)
        LOGGER.info("prepare  each document begins with %s (tokens %s), %s", names, prefix, why)
    return separator, prefix


def _beginning(folder: Path, tokenizer: Tokenizer, bos: str) -> tuple[list[int], str]:
    """The ids before every document, and why these."""
    if bos == "never":
        return [], ""
    if bos != "auto":
        found = tokenizer.token_to_id(bos)
        if found is None:
            raise ConfigError(f"bos = {bos!r} is not a token of {folder}\n  fix: name one of its tokens, auto or never")
        return [found], "named by --bos"
    prefix = prefix_of(tokenizer, tokenizer_file(folder))
    token = None if prefix else _promised_bos(folder)
    if token is not None and tokenizer.token_to_id(token) is not None:
        raise ConfigError(
            f"{folder}: tokenizer_config.json sets add_bos_token = true, and the post-processor of tokenizer.json puts "
            "nothing before a text\n"
            f"  why: transformers 4 put {token} there for Llama's and other classes of tokenizers, transformers 5 does "
            "not; a model that was trained with it predicts badly without\n"
            f"  fix: --bos {token!r} puts it before every document, --bos never puts nothing there"
        )
    return prefix, "as in the tokenizer's post-processor; --bos never leaves it out"


def _promised_bos(folder: Path) -> str | None:
    """bos_token of tokenizer_config.json if the file sets add_bos_token."""
    path = folder / "tokenizer_config.json"
    settings = read_object(path) if path.is_file() else {}
    bos = settings.get("bos_token")
    bos = bos.get("content") if isinstance(bos, dict) else bos
    return bos if settings.get("add_bos_token") is True and isinstance(bos, str) else None


def _named(path: Path, tokenizer: Tokenizer, name: str) -> Separator:
    found = tokenizer.token_to_id(name)
    if found is None:
        raise _none(path, [name], list(_document_ends(path)))
    return Separator(found, name, "named by --separator")


def _none(path: Path, tried: list[str], candidates: list[str]) -> ConfigError:
    has = f" (the vocabulary has {', '.join(candidates)})" if candidates else ""
    return ConfigError(
        f"{path}: no token to separate documents (tried {', '.join(map(repr, tried))})\n"
        f"  why: packed documents must end with a token of their own\n  fix: name one with --separator TOKEN{has}"
    )


def _document_ends(path: Path) -> Iterator[str]:
    """Special tokens that by their name end a document: those with "text" in their name first, then by id."""
    added = [t for t in read_object(tokenizer_file(path)).get("added_tokens") or [] if t.get("special")]
    named = sorted((t["id"], t["content"]) for t in added if _DOCUMENT_END.search(t["content"]))
    yield from (token for _, token in sorted(named, key=lambda t: ("text" not in t[1].lower(), t[0])))


def _turn_evidence(path: Path, token: str) -> str | None:
    """Why `token` ends a turn; None without evidence."""
    if _TURN_END.search(token):
        return "by its name"
    if any(token in template for template in _chat_templates(path)):
        return "it is in the chat template"
    return None


def _chat_templates(path: Path) -> Iterator[str]:
    file = path / "chat_template.jinja"
    if file.is_file():
        yield file.read_text(encoding="utf-8", errors="replace")
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (path / name).is_file():
            # one template, or several by name: as text they are searched alike
            yield json.dumps(read_object(path / name).get("chat_template"), ensure_ascii=False)


def _listed_ends(path: Path, tokenizer: Tokenizer, eos: str) -> Iterator[str]:
    """Other ends of generation that the model's files list, without evidence that they end a turn."""
    for name in ("generation_config.json", "config.json"):
        found = read_object(path / name).get("eos_token_id") if (path / name).is_file() else None
        for token_id in found if isinstance(found, list) else [found]:
            token = tokenizer.id_to_token(token_id) if type(token_id) is int and token_id >= 0 else None
            if token is not None and token != eos and _turn_evidence(path, token) is None:
                yield token


def _configured_eos(folder: Path) -> str | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        eos: Any = read_object(folder / name).get("eos_token") if (folder / name).is_file() else None
        found = eos.get("content") if isinstance(eos, dict) else eos
        if isinstance(found, str):
            return found
    return None
