"""Special ids of an export: from the tokenizer for a new model, from the source for a continued one."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from kdtrain.errors import ConfigError
from kdtrain.files import TOKENIZER_FILES
from kdtrain.jobs import export_hf as export
from kdtrain.models.export import export_hf, tokenizer_files
from kdtrain.models.special_tokens import special_token_ids
from kdtrain.models.tiny import tiny_config
from tests.support.tiny_data import write_tokenizer

MORE = ("<s>", "<|im_end|>", "<pad>")
BOS, END, PAD = 257, 258, 259


def tokenizer(folder, **settings):
    write_tokenizer(folder, more=MORE)
    eos = {"__type": "AddedToken", "content": "<|im_end|>"}
    named = {"bos_token": "<s>", "eos_token": eos, "pad_token": "<pad>", **settings}
    text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named})
    (folder / "tokenizer_config.json").write_text(text)
    return folder


def model(**ids):
    settings = tiny_config("llama", vocab_size=260, **ids)
    torch.manual_seed(1)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def test_new_model_takes_special_ids_from_the_tokenizer(tmp_path):
    new = model()
    out = export_hf(
        dict(new.named_parameters()),
        new.config,
        tmp_path / "out",
        dtype=torch.float32,
        tokenizer_dir=tokenizer(tmp_path / "tokenizer"),
    )
    config = AutoConfig.from_pretrained(out)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (BOS, END, PAD)
    assert new.config.eos_token_id is None, "the caller's config was changed"
    assert GenerationConfig.from_pretrained(out).eos_token_id == [END, 0], "<|endoftext|> ends a document"
    again = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(again.lm_head.weight, new.lm_head.weight)
    with torch.no_grad():
        again.lm_head.weight.zero_()  # all logits equal: the likeliest token is the first, <|endoftext|>
        found = again.generate(torch.tensor([[5]]), max_new_tokens=9, do_sample=False, pad_token_id=PAD)
    assert found.shape[1] == 2
    assert AutoTokenizer.from_pretrained(out).eos_token_id == END


def test_model_with_special_ids_keeps_them(tmp_path):
    old = model(eos_token_id=9)
    out = export_hf(
        dict(old.named_parameters()), old.config, tmp_path / "out", tokenizer_dir=tokenizer(tmp_path / "tokenizer")
    )
    config = AutoConfig.from_pretrained(out)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, 9, None)
    assert GenerationConfig.from_pretrained(out).eos_token_id == 9


def test_padding_with_another_role_and_unknown_tokens_are_dropped(tmp_path, caplog):
    folder = tokenizer(tmp_path / "t", pad_token="<|endoftext|>", bos_token="<nosuch>")
    with caplog.at_level("WARNING", logger="kdtrain"):
        assert special_token_ids(folder) == ({"eos_token_id": END}, [END, 0])
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    assert special_token_ids(folder) == ({"eos_token_id": 0}, [0])
    (folder / "special_tokens_map.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        special_token_ids(folder)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    unigram = {"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["</s>", -1.5]]}}
    (folder / "tokenizer.json").write_text(json.dumps(unigram))
    assert special_token_ids(folder) == ({"eos_token_id": 1}, [1])
    (folder / "tokenizer.json").unlink()
    assert special_token_ids(folder) == ({}, [])


def test_every_file_of_every_kind_of_tokenizer_is_exported(tmp_path):
    names = {"vocab.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.json", "tokenizer.json"}
    for name in (*names, "model.safetensors"):
        (tmp_path / name).write_text("{}")
    assert {path.name for path in tokenizer_files(tmp_path)} == names <= set(TOKENIZER_FILES)


def test_a_student_from_weights_keeps_its_generation_config_with_every_stop_token(tmp_path, monkeypatch):
    source = model(eos_token_id=9)
    source.generation_config.eos_token_id = [9, 5]
    source.generation_config.temperature = 0.6
    source.generation_config.do_sample = True
    source.save_pretrained(tmp_path / "source")
    run = tmp_path / "run"
    run.mkdir()
    export.write_model_files(run, tokenizer(tmp_path / "tokenizer"), str(tmp_path / "source"))
    fake = SimpleNamespace(
        find_latest=lambda root: root / "step_000001",
        step_of=lambda folder: 1,
        identity=lambda folder: "1",
        read_state=lambda folder: {},
        read_full_parameters=lambda folder: ((n, p.detach()) for n, p in source.named_parameters()),
        read_config=lambda folder: source.config.to_dict(),
    )
    monkeypatch.setattr(export, "checkpoint", fake)
    out = export.export_checkpoint(run, tmp_path / "out", dtype="float32")
    assert (out / "generation_config.json").read_bytes() == (tmp_path / "source/generation_config.json").read_bytes()
    assert GenerationConfig.from_pretrained(out).eos_token_id == [9, 5]
    assert AutoConfig.from_pretrained(out).eos_token_id == 9
    export.write_model_files(run, tmp_path / "tokenizer", None)  # a student from scratch, or an older source
