"""The token that ends a document, for the special tokens of published tokenizers: not the end of a turn."""

import json
from pathlib import Path

import pytest

from kdtrain.config.cli import run_script
from kdtrain.data.prepare import PrepareSettings, prepare_corpus
from kdtrain.data.separator import choose_separator, separator_id
from kdtrain.data.token_store import TokenStore
from kdtrain.data.tokenizer import load_tokenizer
from kdtrain.errors import EXIT_CONFIG, ConfigError
from kdtrain.testing.ranks import load_file
from tests.support.tiny_data import write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
DEEPSEEK_END = "<\uff5cend\u2581of\u2581sentence\uff5c>"


def tokenizer_of(folder, special, eos, *, template=None, **files):
    """A tokenizer with these special tokens and no other <|endoftext|>; files: further JSON files, by stem."""
    write_tokenizer(folder, more=special)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["vocab"]["<unused>"] = content["model"]["vocab"].pop("<|endoftext|>")
    content["added_tokens"] = [t for t in content["added_tokens"] if t["id"]]
    if "<|endoftext|>" in special:
        added = {"id": 300, "content": "<|endoftext|>", "special": True}
        content["added_tokens"].append({**content["added_tokens"][0], **added})
    path.write_text(json.dumps(content), encoding="utf-8")
    config = {"eos_token": eos} | ({"chat_template": template} if template else {})
    for stem, value in {"tokenizer_config": config, **files}.items():
        (folder / f"{stem}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("special", "eos", "end"),
    [
        (["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"], "<|eot_id|>", "<|end_of_text|>"),
        (["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"], "<|end_of_text|>", "<|end_of_text|>"),
        (["<|begin_of_text|>", "<|end_of_text|>", "<|eom|>", "<|eot|>"], "<|eot|>", "<|end_of_text|>"),  # Llama 4
        (["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], "<eos>", "<eos>"),  # Gemma
        (["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], "<end_of_turn>", "<eos>"),
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", "<|endoftext|>"),  # Qwen, SmolLM2-Instruct
        (["<unk>", "<s>", "</s>", "<|endoftext|>", "<|end|>"], "<|endoftext|>", "<|endoftext|>"),  # Phi-3
        (["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], "</s>", "</s>"),  # Mistral
        (["<s>", "</s>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", "</s>"),  # EuroLLM, InternLM2
        ([DEEPSEEK_END, "<|EOT|>"], "<|EOT|>", DEEPSEEK_END),  # DeepSeek-Coder-Instruct
        ([DEEPSEEK_END, "<|EOT|>"], DEEPSEEK_END, DEEPSEEK_END),
        (["<|endoftext|>", "[MASK]", "<|user|>", "<|assistant|>"], "<|user|>", "<|endoftext|>"),  # GLM-4
        (["<BOS_TOKEN>", "<EOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"], "<|END_OF_TURN_TOKEN|>", "<EOS_TOKEN>"),  # Command-R
        (["<|startoftext|>", "<|endoftext|>", "<|return|>", "<|end|>"], "<|return|>", "<|endoftext|>"),  # gpt-oss
        (["<seed:bos>", "<seed:eos>"], "<seed:eos>", "<seed:eos>"),
        (["[CLS]", "[SEP]"], "[SEP]", "[SEP]"),
    ],
)
def test_separator_is_document_end_not_turn_end(tmp_path, special, eos, end):
    folder = tokenizer_of(tmp_path, special, eos)
    found = choose_separator(folder)
    assert found.token == end
    assert found.id == separator_id(folder) == load_tokenizer(folder).token_to_id(end)
    assert choose_separator(folder, eos).token == eos  # a choice is a choice


def test_token_in_chat_template_ends_a_turn(tmp_path):
    template = "{% for m in messages %}{{ m.content }}<|stop|>{% endfor %}"
    special = ["</s>", "<|stop|>"]
    assert choose_separator(tokenizer_of(tmp_path / "plain", special, "<|stop|>")).token == "<|stop|>"
    found = choose_separator(tokenizer_of(tmp_path / "chat", special, "<|stop|>", template=template))
    assert found.token == "</s>"
    assert found.why == "the document end; eos_token <|stop|> ends a turn (it is in the chat template)"
    file = tokenizer_of(tmp_path / "file", special, "<|stop|>")
    (file / "chat_template.jinja").write_text(template)
    assert choose_separator(file).token == "</s>"


@pytest.mark.parametrize("file", ["generation_config", "config"])
def test_a_document_end_of_any_name_is_found_where_the_model_lists_it(tmp_path, file):
    special = ["<|done|>", "<|eom_id|>", "<|eot_id|>"]
    ids = [257, 258, 259]
    folder = tokenizer_of(tmp_path, special, "<|eot_id|>", **{file: {"eos_token_id": ids}})
    assert [load_tokenizer(folder).token_to_id(name) for name in special] == ids
    assert choose_separator(folder).token == "<|done|>"


def test_turn_end_alone_is_refused_unless_named(tmp_path, capsys):
    folder = tokenizer_of(tmp_path / "tokenizer", ["<|im_end|>"], "<|im_end|>")
    (tmp_path / "a.txt").write_text("text")
    script = load_file(ROOT / "launch/prepare_corpus.py")
    words = ["--tokenizer", str(folder), "--output", str(tmp_path / "out"), "--workers", "1", str(tmp_path / "a.txt")]
    assert run_script(script.main, words) == EXIT_CONFIG
    message = capsys.readouterr().err
    assert "no token ends a document: eos_token '<|im_end|>' ends a turn (by its name)" in message
    assert "--separator '<|im_end|>' takes the turn end" in message
    assert run_script(script.main, [*words, "--separator", "<|im_end|>"]) == 0
    assert TokenStore.open(tmp_path / "out/train").manifest.separator_id == 257


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            None,
            "<|end_of_text|> (token 257): the document end; eos_token <|eot_id|> ends a turn (by its name)",
        ),
        ("<|eot_id|>", "<|eot_id|> (token 258): named by --separator"),
    ],
)
def test_separator_and_reason_are_logged_in_one_line(tmp_path, logged, name, line):
    folder = tokenizer_of(tmp_path / "tokenizer", ["<|end_of_text|>", "<|eot_id|>"], "<|eot_id|>")
    (tmp_path / "a.txt").write_text("text")
    prepare_corpus([tmp_path / "a.txt"], folder, tmp_path / "out", PrepareSettings(workers=1, separator=name))
    assert sum(line in record.getMessage() for record in logged.records) == 1
    store = TokenStore.open(tmp_path / "out/train")
    assert store[0].tolist()[-1] == store.manifest.separator_id == (258 if name else 257)


def test_named_separator_precedes_endoftext_and_eos(tmp_path):
    a = write_tokenizer(tmp_path / "a", more=["<|im_end|>"], eos="<|im_end|>")
    assert separator_id(a) == 0
    assert separator_id(a, "<|im_end|>") == 257
    b = tokenizer_of(tmp_path / "b", ["</s>"], "</s>")
    assert separator_id(b) == 257
    (b / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert separator_id(b) == 257
    (b / "tokenizer_config.json").rename(b / "special_tokens_map.json")
    assert separator_id(b) == 257
    (b / "special_tokens_map.json").unlink()
    with pytest.raises(ConfigError, match=r"--separator TOKEN \(the vocabulary has </s>\)"):
        separator_id(b)
    with pytest.raises(ConfigError, match="tried '<nope>'"):
        separator_id(a, "<nope>")
