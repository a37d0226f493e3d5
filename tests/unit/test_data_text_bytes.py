"""The size of a text measured by looking tokens up equals that of the decoded text, broken characters included."""

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from kdtrain.data.text_bytes import TextBytes
from kdtrain.data.tokenizer import load_tokenizer
from tests.support.tiny_data import write_tokenizer

CHARACTERS = ["a", "\u00e9", "\u4e2d\u6587", "\U0001f642", " the", "\n"]


def byte_level(folder):
    """Bytes, a few longer tokens, an id without a token, and an added token outside the byte alphabet."""
    tokenizer = load_tokenizer(write_tokenizer(folder))
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    names = [alphabet.pre_tokenize_str(text)[0][0] for text in CHARACTERS]
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in names])
    tokenizer.add_tokens([AddedToken("  \u00e9 ", normalized=False)])
    return tokenizer


def sentencepiece(strip):
    """Llama-2's decoder (strip) or Gemma's, with every byte, some pieces, and an id without a token."""
    vocab = {name: place for place, name in enumerate(["<unk>", "<s>", "</s>"])}
    for name in [f"<0x{byte:02X}>" for byte in range(256)] + ["\u2581", "\u2581a", "b", "\u2581\u2581", "\u4e2d", " x"]:
        vocab[name] = len(vocab)
    vocab["c"] = len(vocab) + 1
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return tokenizer


def word_piece():
    words = ["[UNK]", "</s>", "one", "##s", ",", "two", "\u00e9"]
    tokenizer = Tokenizer(models.WordPiece({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


@pytest.mark.parametrize("prefix", [[], [1], [1, 2]])
@pytest.mark.parametrize(
    ("kind", "by_table"), [("byte level", True), ("llama", True), ("gemma", True), ("word piece", False)]
)
def test_looked_up_equals_decoded(tmp_path, kind, by_table, prefix):
    makers = {"llama": lambda: sentencepiece(True), "gemma": lambda: sentencepiece(False), "word piece": word_piece}
    tokenizer = byte_level(tmp_path) if kind == "byte level" else makers[kind]()
    prefix = prefix if kind != "byte level" else [0] * len(prefix)
    separator, size = {"byte level": 0, "word piece": 1}.get(kind, 2), max(tokenizer.get_vocab().values()) + 1
    measure = TextBytes(tokenizer, size, prefix, separator)
    assert measure.by_table == by_table
    rng = np.random.default_rng(3)
    for _ in range(200):
        contents = [rng.integers(0, size, rng.integers(0, 9)).tolist() for _ in range(rng.integers(1, 30))]
        documents = [[*prefix, *ids, separator] for ids in contents]
        texts = [tokenizer.decode(d[len(prefix) : -1], skip_special_tokens=False) for d in documents]
        tokens = np.concatenate([np.array(d, dtype=np.uint16) for d in documents])
        found = measure.measure(tokens, np.array([len(d) for d in documents]))
        assert found == sum(len(text.encode()) for text in texts), documents


def test_only_text_is_counted(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    texts = ["na\u00efve \U0001f642", "", "two"]
    documents = [[0, *tokenizer.encode(text).ids, 0] for text in texts]
    measure = TextBytes(tokenizer, 257, [0], 0)
    assert measure.measure(np.concatenate(documents), np.array([len(d) for d in documents])) == 11 + 0 + 3


def test_a_separator_that_is_a_part_of_a_character_is_measured_by_decoding(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    lead, trail = tokenizer.encode("\u00e9").ids
    measure = TextBytes(tokenizer, 257, [], trail)
    assert not measure.by_table
    assert measure.measure(np.array([lead, trail]), np.array([2])) == len("\ufffd".encode())
