"""GGUF import, on a small file written here in llama.cpp's layout."""

import hashlib
import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kdtrain.errors import ConfigError, DataError
from kdtrain.models.import_gguf import build_tokenizer, import_gguf
from kdtrain.models.tiny import tiny_config

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")

BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
ALPHABET = [chr(b) for b in BYTES] + [chr(256 + i) for i in range(256 - len(BYTES))]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["1 2", "Ġ a", "\u010a \u010a"]  # the first must never be used: digits stand alone
TOKENS = [*SPECIAL, *ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
FIELDS = {
    "model": "gpt2",
    "pre": "smollm",
    "tokens": TOKENS,
    "token_type": [3] * 3 + [1] * (len(TOKENS) - 3),
    "merges": MERGES,
}


def llama():
    settings = tiny_config(
        "smollm",
        vocab_size=len(TOKENS),
        hidden_size=96,
        intermediate_size=128,
        num_attention_heads=6,
        tie_word_embeddings=True,
    )
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def interleave(weight, heads):
    """Rows of q and k as llama.cpp stores them: pairs of a rotation side by side."""
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)


def write_gguf(path, model, *, quantised=False):
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types(FIELDS["token_type"])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {"token_embd": model.model.embed_tokens.weight, "output_norm": model.model.norm.weight}
    for index, layer in enumerate(model.model.layers):
        for ours, theirs in names.items():
            tensors[f"blk.{index}.{theirs}"] = layer.get_submodule(ours).weight
    for name, param in tensors.items():
        data = param.detach().numpy().astype(np.float32)
        kind = name.rpartition(".")[2]
        data = interleave(data, heads[kind]) if kind in heads else data
        if quantised and kind.startswith(("attn_q", "ffn_up")):
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(data, q8), raw_dtype=q8)
        else:
            writer.add_tensor(f"{name}.weight", np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def test_imported_model_has_the_logits_of_the_original(tmp_path):
    model = llama()
    write_gguf(tmp_path / "m.gguf", model)
    done = import_gguf(tmp_path / "m.gguf", tmp_path / "out", dtype=torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.randint(0, len(TOKENS), (2, 9))
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert done.num_parameters == sum(param.numel() for param in model.parameters())
    assert done.vocab_size == len(TOKENS)
    assert done.document_separator == ("<|endoftext|>", 0)
    assert "quantization" not in (tmp_path / "out" / "config.json").read_text()


def test_quantised_tensors_are_expanded_and_the_model_card_states_it(tmp_path):
    model = llama()
    write_gguf(tmp_path / "m.gguf", model, quantised=True)
    digest = hashlib.sha256((tmp_path / "m.gguf").read_bytes()).hexdigest()
    import_gguf(tmp_path / "m.gguf", tmp_path / "out", sha256=digest.upper(), dtype=torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    got, want = (m.model.layers[0].mlp.up_proj.weight.detach() for m in (again, model))
    assert 0 < (got - want).abs().max() < 0.01
    card = (tmp_path / "out" / "README.md").read_text()
    assert "4 tensors as Q8_0" in card
    assert "rounded" in card
    assert digest in card
    assert "<|endoftext|> (id 0)" in card


def test_digits_are_split_and_text_round_trips_in_both_tokenizer_loaders(tmp_path):
    write_gguf(tmp_path / "m.gguf", llama())
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    exact = build_tokenizer(FIELDS)
    auto = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Date: 12 a\n\n   1212 <|endoftext|>x"
    ids = exact.encode(text).ids
    assert auto(text)["input_ids"] == ids
    assert exact.decode(ids, skip_special_tokens=False) == text
    assert TOKENS.index("12") not in ids, "digits were merged"
    assert TOKENS.index("Ġa") in ids
    assert 0 in ids
    assert (auto.bos_token, auto.eos_token) == ("<|im_start|>", "<|im_end|>")
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_qwen2_tokenizer_splits_like_its_own_class():
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = build_tokenizer({**FIELDS, "pre": "qwen2"})
    pattern = json.loads(tokenizer.to_str())["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    assert pattern == PRETOKENIZE_REGEX


@pytest.mark.parametrize("pre", ["smollm", "qwen2"])
def test_user_defined_tokens_are_one_id_and_kept_when_special_ones_are_skipped(pre):
    tokens = [*TOKENS, "<think>"]
    tokenizer = build_tokenizer({**FIELDS, "pre": pre, "tokens": tokens, "token_type": [*FIELDS["token_type"], 4]})
    ids = tokenizer.encode("a<think>b<|im_end|>").ids
    assert ids == [tokens.index(token) for token in ("a", "<think>", "b", "<|im_end|>")]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>b"
    added = tokenizer.get_added_tokens_decoder()[tokens.index("<think>")]
    assert (added.special, added.normalized) == (False, False)


def test_tokenizer_with_unknown_rules_is_refused():
    with pytest.raises(ConfigError, match="pre-tokenizer 'llama-bpe'"):
        build_tokenizer({**FIELDS, "pre": "llama-bpe"})
    with pytest.raises(ConfigError, match="tokenizer model 'llama'"):
        build_tokenizer({**FIELDS, "model": "llama"})


def test_wrong_missing_and_damaged_files_are_refused_and_leave_nothing(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="does not exist"):
        import_gguf(tmp_path / "none.gguf", out)
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(DataError, match="not a GGUF file"):
        import_gguf(tmp_path / "text.gguf", out)
    write_gguf(tmp_path / "m.gguf", llama())
    with pytest.raises(DataError, match=r"has sha256(.|\n)*wanted(.|\n)*abc"):
        import_gguf(tmp_path / "m.gguf", out, sha256="abc")
    whole = (tmp_path / "m.gguf").read_bytes()
    for size in (20, 2000, len(whole) - 50_000):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"damaged|cannot load"):
            import_gguf(tmp_path / "cut.gguf", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.gguf", "m.gguf", "text.gguf"]
