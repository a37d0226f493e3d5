"""Which ids begin, end and pad text, read from a tokenizer's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdtrain.errors import ConfigError
from kdtrain.log import LOGGER

END_OF_TEXT = "<|endoftext|>"
"""The separator of documents in pre-training text, if the vocabulary has it."""

_ROLES = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "pad_token_id"}


def special_token_ids(folder: str | Path) -> tuple[dict[str, int], list[int]]:
    """(settings for a model's config.json, ids after which generation stops) of the tokenizer in `folder`.

    The settings are those of bos_token_id, eos_token_id and pad_token_id that tokenizer_config.json or
    special_tokens_map.json name. pad_token_id is left out when its token has another role: transformers zeroes the
    gradient of the padding's embedding. Generation stops at the eos token and at END_OF_TEXT, which is what a model
    pre-trained on separated documents has learned to end with, even if its tokenizer's eos token ends a turn of a chat.
    Both are empty without a tokenizer.json. Raises ConfigError for files that are not JSON.
    """
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        return {}, []
    vocabulary = _vocabulary(file)
    named = {**read_json(Path(folder) / "special_tokens_map.json"), **read_json(Path(folder) / "tokenizer_config.json")}
    ids: dict[str, int] = {}
    for role, key in _ROLES.items():
        token = named.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            continue
        found = vocabulary.get(str(token))
        if found is None:
            LOGGER.warning("%s: %s is %r, which the vocabulary does not have; left out", folder, role, token)
        else:
            ids[key] = found
    end_of_text = vocabulary.get(END_OF_TEXT)
    stops = list(dict.fromkeys(i for i in (ids.get("eos_token_id"), end_of_text) if i is not None))
    if ids.get("pad_token_id") in (*stops, ids.get("bos_token_id")):
        ids.pop("pad_token_id", None)
    return ids, stops


def _vocabulary(file: Path) -> dict[str, int]:
    """token -> id: the added tokens, and the model's own if it lists them by name."""
    content = read_json(file)
    own = content.get("model", {}).get("vocab", {})
    own = own if isinstance(own, dict) else {token: i for i, (token, *_) in enumerate(own)}
    return {**own, **{added["content"]: added["id"] for added in content.get("added_tokens", [])}}


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; {} if there is none. Raises ConfigError for a file that is not JSON."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}\n  fix: restore the file from its source") from error
    return found if isinstance(found, dict) else {}
