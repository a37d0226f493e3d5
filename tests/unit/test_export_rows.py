"""An export holds the rows of the run's softmax and the student's tokenizer files, and names no code it lacks."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import ConfigError
from kdtrain.jobs.export_hf import _generation_text, write_model_files
from kdtrain.models.export import export_hf
from kdtrain.models.load import ModelSpec, build_config, load_backbone
from kdtrain.models.tiny import tiny_config
from kdtrain.training.run_files import MODEL
from tests.support.tiny_data import write_tokenizer

ROWS, TOKENS = 304, 300
GEMMA3N = {
    **tiny_config("llama", tie_word_embeddings=True, head_dim=8, sliding_window=16),
    "model_type": "gemma3n_text",
    "activation_sparsity_pattern": [0.0, 0.0],
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
PHI = {**tiny_config("llama"), "model_type": "phi", "resid_pdrop": 0.0}  # its head has a bias
KINDS = {
    "untied": tiny_config("llama"),
    "tied": tiny_config("llama", tie_word_embeddings=True),
    "gemma3": tiny_config("gemma3", tie_word_embeddings=True),
    "gpt2": tiny_config("gpt2", tie_word_embeddings=True),
    "bias": PHI,
    "fewer rows per layer": {**GEMMA3N, "vocab_size_per_layer_input": 290},
    "as many rows per layer": {**GEMMA3N, "vocab_size_per_layer_input": ROWS},
}


def stock(settings, **changes):
    settings = {**settings, "vocab_size": ROWS, **changes}
    torch.manual_seed(3)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.02)  # biases begin as zeros
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [TOKENS, ROWS])
def test_export_computes_the_softmax_over_the_ids_of_the_run(tmp_path, kind, vocab_size):
    model = stock(KINDS[kind])
    out = export_hf(
        model.named_parameters(), model.config, tmp_path / "out", dtype=torch.float32, vocab_size=vocab_size
    )
    exported = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert exported.config.vocab_size == exported.get_output_embeddings().weight.shape[0] == vocab_size
    ids = torch.randint(0, TOKENS, (2, 9))
    with torch.no_grad():
        expected, found = model(input_ids=ids).logits[..., :vocab_size], exported(input_ids=ids).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        sampled = exported.generate(ids, max_new_tokens=20, do_sample=True, temperature=5.0, pad_token_id=0)
    assert int(sampled.max()) < vocab_size


def test_export_without_padded_rows_keeps_its_bits(tmp_path):
    model = stock(KINDS["untied"], eos_token_id=7)
    one, two = (
        export_hf(model.named_parameters(), model.config, tmp_path / name, vocab_size=size)
        for name, size in (("one", ROWS), ("two", None))
    )
    files = sorted(path.name for path in one.iterdir())
    assert files == ["config.json", "generation_config.json", "model.safetensors"]
    for name in files:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_export_can_be_loaded_as_a_student(tmp_path):
    model = stock(KINDS["untied"])
    out = export_hf(model.named_parameters(), model.config, tmp_path / "out", dtype=torch.float32, vocab_size=TOKENS)
    spec = ModelSpec(weights=str(out), dtype="float32")
    for trainable, rows in ((True, None), (False, ROWS)):
        again = load_backbone(spec, Mesh(), vocab_size=TOKENS, total_rows=rows, trainable=trainable)
        assert torch.equal(again.lm_head_shard.weight[:TOKENS], model.lm_head.weight[:TOKENS])
        assert not again.lm_head_shard.weight[TOKENS:].any()


def test_special_ids_without_a_row_are_left_out(tmp_path):
    model = stock(KINDS["untied"], pad_token_id=ROWS - 1, eos_token_id=[9, TOKENS + 1], bos_token_id=TOKENS)
    out = export_hf(model.named_parameters(), model.config, tmp_path / "out", vocab_size=TOKENS)
    config = AutoConfig.from_pretrained(out)
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (None, [9], None)
    assert GenerationConfig.from_pretrained(out).eos_token_id == [9]
    whole = AutoConfig.from_pretrained(export_hf(model.named_parameters(), model.config, tmp_path / "whole"))
    assert (whole.pad_token_id, whole.eos_token_id, whole.bos_token_id) == (ROWS - 1, [9, TOKENS + 1], TOKENS)


def test_new_model_leaves_out_special_tokens_without_a_row(tmp_path):
    write_tokenizer(tmp_path / "tokenizer", more=["<s>", "<pad>"])
    names = {"eos_token": "<|endoftext|>", "bos_token": "<s>", "pad_token": "<pad>"}
    (tmp_path / "tokenizer/tokenizer_config.json").write_text(json.dumps(names))
    model = stock(KINDS["untied"], vocab_size=258)
    out = export_hf(
        model.named_parameters(), model.config, tmp_path / "out", tokenizer_dir=tmp_path / "tokenizer", vocab_size=258
    )
    config = AutoConfig.from_pretrained(out)
    assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == (0, 257, None)
    AutoModelForCausalLM.from_pretrained(out)


def test_student_from_weights_keeps_its_own_tokenizer_files(tmp_path):
    """A base student under an instruct teacher of one vocabulary, the corpus prepared with the teacher's tokenizer."""
    teacher, student = tmp_path / "store/tokenizer", tmp_path / "student"
    for folder, eos in ((teacher, "<|im_end|>"), (student, "<|endoftext|>")):
        write_tokenizer(folder, more=["<|im_end|>"], eos=eos)
    (teacher / "chat_template.jinja").write_text("{{ messages }}")
    (student / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    run = tmp_path / "run"
    run.mkdir()
    write_model_files(run, teacher, None)
    assert (run / MODEL / "chat_template.jinja").is_file()
    write_model_files(run, teacher, str(student))
    kept = {path.name: path.read_bytes() for path in (run / MODEL).iterdir()}
    assert kept == {path.name: path.read_bytes() for path in student.iterdir()}
    model = stock(KINDS["untied"], vocab_size=258)
    out = export_hf(model.named_parameters(), model.config, tmp_path / "out", tokenizer_dir=run / MODEL, vocab_size=258)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("<|endoftext|>", None)
    assert AutoConfig.from_pretrained(out).eos_token_id == 0


def test_student_folder_without_tokenizer_json_gets_the_tokenizer_of_the_data(tmp_path):
    store = write_tokenizer(tmp_path / "store", eos="<|endoftext|>")
    (tmp_path / "student").mkdir()
    (tmp_path / "student/generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    write_model_files(tmp_path, store, str(tmp_path / "student"))
    names = {path.name for path in (tmp_path / MODEL).iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}


def test_files_that_break_the_export_are_refused_before_training(tmp_path):
    store = write_tokenizer(tmp_path / "store", eos="<|endoftext|>")
    (tmp_path / "student").mkdir()
    (tmp_path / "student/generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"student/generation_config\.json is not valid JSON"):
        write_model_files(tmp_path, store, str(tmp_path / "student"))


@pytest.mark.parametrize(("eos", "kept"), [([0, 301], [0]), (301, None), (0, 0)])
def test_generation_config_loses_only_ids_without_a_row(tmp_path, eos, kept):
    text = json.dumps({"eos_token_id": eos, "temperature": 0.6})
    (tmp_path / "generation_config.json").write_text(text)
    found = _generation_text(tmp_path / "generation_config.json", TOKENS)
    assert json.loads(found) == {"eos_token_id": kept, "temperature": 0.6}
    assert (found == text) == (eos == kept)


def test_export_of_a_model_with_code_loads_with_trust_remote_code(tmp_path):
    source, written = tmp_path / "source", stock(KINDS["untied"], vocab_size=258)
    written.save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    code = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    config |= {"auto_map": code, "_name_or_path": "someone/else", "quantization_config": None}
    config |= {"custom_pipelines": {"x": {"impl": "pipe.X"}}, "torch_dtype": "float16"}
    config.pop("dtype")
    (source / "config.json").write_text(json.dumps(config))
    write_tokenizer(source, more=["<|im_end|>"])
    named = {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}, "eos_token": "<|im_end|>"}
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "XTokenizer", **named}))
    built = build_config(ModelSpec(weights=str(source)), 258)
    for name, given in (("built", built), ("older checkpoint", config)):
        out = export_hf(written.named_parameters(), given, tmp_path / name, dtype=torch.bfloat16, tokenizer_dir=source)
        found = json.loads((out / "config.json").read_text())
        assert (
            not {"auto_map", "custom_pipelines", "_name_or_path", "quantization_config", "torch_dtype"} & found.keys()
        )
        assert (found["dtype"], found["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])
        again = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
        assert torch.equal(again.lm_head.weight, written.lm_head.weight.bfloat16())
        assert AutoTokenizer.from_pretrained(out, trust_remote_code=True).eos_token_id == 257
    assert load_file(out / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
