"""A byte-level tokenizer and token stores small enough to verify by hand."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from kdtrain.data.token_store import SHARD_TOKENS, TokenStore, TokenStoreWriter

SEPARATOR, SEPARATOR_ID = "<|endoftext|>", 0


def write_tokenizer(folder: Path, *, more: Sequence[str] = (), eos: str | None = None, lowercase: bool = False) -> Path:
    """One token per byte: id 0 is the separator, byte b is 1 + its place in the byte-level alphabet, then `more`.

    eos: written to tokenizer_config.json. lowercase: another rule with the same vocabulary.
    """
    from tokenizers import normalizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {SEPARATOR: SEPARATOR_ID} | {token: 1 + place for place, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in (SEPARATOR, *more)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if eos is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}), encoding="utf-8")
    return folder


def write_store(
    folder: Path,
    documents: Sequence[Sequence[int]],
    tokenizer_dir: Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
    prefix: Sequence[int] = (),
) -> TokenStore:
    """A store of these ids; every document gets the prefix and the separator."""
    how: dict[str, Any] = {"source": "hand-made", "shard_tokens": shard_tokens, "document_prefix": prefix}
    with TokenStoreWriter(folder, tokenizer_dir, SEPARATOR_ID, **how) as writer:
        for ids in documents:
            writer.add(list(ids), text_bytes=len(ids))
        writer.commit()
    return TokenStore.open(folder)


def random_documents(count: int, *, seed: int, longest: int = 40) -> list[list[int]]:
    """Documents of 1 to `longest` byte tokens."""
    random = np.random.default_rng(seed)
    return [random.integers(1, 257, size=random.integers(1, longest + 1)).tolist() for _ in range(count)]


def write_pair(
    prefix: Path, sequences: Sequence[Sequence[int]], documents: Sequence[int] | None = None, dtype: str = "uint16"
) -> Path:
    """A Megatron pair, field by field from the format's description. documents: its document index (None: one each)."""
    codes = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}
    sizes = [len(sequence) for sequence in sequences]
    index = range(len(sizes) + 1) if documents is None else documents
    flat = np.array([token for sequence in sequences for token in sequence], dtype=dtype)
    pointers = (np.cumsum([0, *sizes])[:-1] * flat.itemsize).astype("<i8")
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, codes[dtype], len(sizes), len(index))
    tail = np.array(sizes, dtype="<i4").tobytes() + pointers.tobytes() + np.array(index, dtype="<i8").tobytes()
    prefix.with_name(prefix.name + ".idx").write_bytes(head + tail)
    flat.tofile(prefix.with_name(prefix.name + ".bin"))
    return prefix
