"""Length-dependent rotary embeddings: a packed document equals the stock model on that document alone."""

import copy
import json
import logging

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

from kdtrain.batch import Batch
from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import ConfigError
from kdtrain.models import rotary
from kdtrain.models.export import export_hf
from kdtrain.models.load import ModelSpec, check_architecture, load_backbone
from kdtrain.models.rotary import DocumentRotary, document_lengths, use_document_lengths
from kdtrain.models.rotary_probe import check_neighbours
from kdtrain.models.tiny import TINY, save_random, tiny_config
from kdtrain.teacher.online import OnlineTeacher, Passes

ORIGINAL = 8
"""Tokens at which tables change in all models here."""

SIZES = ((5, 19), (8, 8, 5, 3), (24,), (1, 20, 3), (9, 8, 7))
"""Documents of five packed sequences: shorter than ORIGINAL, of just its length, longer by one and by much."""


def dynamic(**more):
    return {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0, **more}


def longrope(pairs, **more):
    return {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": ORIGINAL,
        "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
        "long_factor": [2.0 + 3 * i for i in range(pairs)],
        **more,
    }


def config_of(name, rope, **changes):
    return tiny_config(name, max_position_embeddings=ORIGINAL, rope_parameters=rope, **changes)


MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
KINDS = {
    "llama dynamic": config_of("llama", dynamic(), head_dim=8),
    "llama longrope": config_of("llama", longrope(4, factor=4.0), head_dim=8),
    # as Phi-3.5 and Phi-4-mini are published
    "phi3 longrope": tiny_config(
        "phi3",
        rope_theta=1e4,
        max_position_embeddings=4 * ORIGINAL,
        original_max_position_embeddings=ORIGINAL,
        rope_scaling={"type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [2.0, 5.0]},
    ),
    "gpt_neox dynamic": config_of("gpt_neox", dynamic(partial_rotary_factor=0.5), num_attention_heads=2),
    "olmo2 dynamic": config_of("olmo2", dynamic(), head_dim=8),
    "cohere dynamic": {**config_of("llama", dynamic(), head_dim=8), "model_type": "cohere"},
    "gemma3 dynamic": config_of(
        "gemma3",
        {"full_attention": dynamic(), "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        final_logit_softcapping=None,
    ),
    "gemma3 longrope": config_of(
        "gemma3",
        {"full_attention": longrope(4, factor=4.0), "sliding_attention": dynamic()},
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        final_logit_softcapping=None,
    ),
    "minicpm3 longrope": {
        **config_of("llama", longrope(4, factor=4.0)),
        **LATENT,
        "model_type": "minicpm3",
        "num_key_value_heads": 8,
    },
    "phimoe longrope": {
        **config_of("llama", longrope(2, factor=4.0, short_mscale=1.1, long_mscale=1.3), **MIXTURE),
        "model_type": "phimoe",
    },
}
"""One of each way in which stock code computes or carries these types."""

TRAINABLE = [name for name in KINDS if not name.startswith("phimoe")]


def folder_of(path, config, *, seed=3):
    return save_random(path, config, seed=seed)


def stock_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def load(folder, *, dtype="float32", trainable=True, **more):
    spec = ModelSpec(weights=str(folder), dtype=dtype, attention="sdpa")
    return load_backbone(spec, Mesh(), vocab_size=101, trainable=trainable, **more)


def batch_of(sizes=SIZES):
    """Packed sequences of 24 tokens; their ids depend on the place alone."""
    positions = torch.stack([torch.cat([torch.arange(size) for size in row]) for row in sizes])
    ids = (torch.arange(positions.numel()).view_as(positions) * 37 + 11) % 97 + 4
    return Batch(ids, ids, torch.ones(ids.shape), positions, torch.arange(len(sizes)))


def documents(batch, sizes=SIZES):
    return [part for row, lengths in zip(batch.input_ids, sizes, strict=True) for part in row.split(lengths)]


def weights_of(width):
    return torch.sin(torch.arange(width) + 1.0)


@pytest.mark.parametrize("name", KINDS)
def test_packed_document_matches_the_stock_model_on_it_alone(tmp_path, name):
    folder, trains = folder_of(tmp_path, KINDS[name]), name in TRAINABLE
    stock, backbone, batch = stock_of(folder), load(folder, trainable=trains), batch_of()
    alone = []
    for ids in documents(batch):  # the dynamic type leaves its last table behind, so each document gets a fresh model
        fresh = copy.deepcopy(stock)
        alone.append(fresh.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0])
        if trains:
            (alone[-1].square() @ weights_of(alone[-1].shape[-1])).sum().backward()
            for param, summed in zip(fresh.parameters(), stock.parameters(), strict=True):
                if param.grad is not None:
                    summed.grad = param.grad if summed.grad is None else summed.grad + param.grad
    hidden, want = backbone.hidden_states(batch), torch.cat(alone)
    torch.testing.assert_close(hidden, want, rtol=1e-4, atol=1e-5)
    packed_by_stock = stock.base_model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state
    assert (packed_by_stock.flatten(0, 1) - want).abs().max() > 1e-2, "the lengths do not matter here"
    if not trains:
        return
    (hidden.square() @ weights_of(hidden.shape[-1])).sum().backward()
    grads = {key: param.grad for key, param in stock.named_parameters()}
    compared = 0
    for key, param in backbone.hf_parameters():
        if param.grad is not None and grads[key] is not None:
            right = grads[key]
            error = (param.grad[: right.shape[0]] - right).norm() / right.norm()
            assert error < 1e-4, f"gradient of {key} is off by {error:.1e}"
            compared += 1
    assert compared > 5


@pytest.mark.parametrize("name", ["phi3 longrope", "llama dynamic"])
def test_neighbours_micro_batches_and_token_limits_change_nothing(tmp_path, name):
    backbone, batch = load(folder_of(tmp_path, KINDS[name]), trainable=False), batch_of()
    with torch.no_grad():
        whole = backbone.hidden_states(batch).view(5, 24, -1)
        for rows in ([1], [0], [2], [4], [3, 0], [1, 2], [2, 1], [1, 4, 3, 0]):
            part = batch.map(lambda values, rows=rows: values[rows])
            found = backbone.hidden_states(part).view(len(rows), 24, -1)
            torch.testing.assert_close(found, whole[rows], rtol=1e-5, atol=1e-6)
        for limit in (24, 48, 72, None):
            teacher = OnlineTeacher(backbone, Mesh(), backbone.shard, Mesh(), passes=Passes(max_tokens=limit))
            teacher.prefetch([batch])
            hidden = teacher.signal(batch).hidden_states.view(5, 24, -1)
            torch.testing.assert_close(hidden, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["phi3 longrope", "llama dynamic"])
def test_documents_without_restart_are_as_long_as_the_sequence(tmp_path, name):
    folder, batch = folder_of(tmp_path, KINDS[name]), batch_of([(24,), (24,)])
    backbone = load(folder, trainable=False, packed=False)
    with torch.no_grad():
        want = stock_of(folder).base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
        torch.testing.assert_close(backbone.hidden_states(batch), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["phi3 longrope", "llama dynamic", "gemma3 longrope"])
def test_tables_stay_in_float32_in_a_model_in_bfloat16(tmp_path, name):
    narrow = load(folder_of(tmp_path, KINDS[name]), dtype="bfloat16", trainable=False).to(torch.bfloat16)
    batch = batch_of()
    with torch.no_grad():
        narrow.hidden_states(batch)
        (found,) = [module for module in narrow.modules() if isinstance(module, DocumentRotary)]
        kinds = ("full_attention",) if name.startswith("gemma3") else ()
        for length in (5, ORIGINAL, 24):  # wide embeddings show the error of a table in bfloat16
            positions = torch.arange(length)[None]
            want = type(found.stock)(narrow.config)(torch.zeros(1), positions, *kinds)
            for table, right in zip(found(torch.zeros(1), positions, *kinds), want, strict=True):
                assert torch.equal(table, right)
            assert found(batch.input_ids.bfloat16(), positions, *kinds)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["phi3 longrope", "llama dynamic", "gemma3 longrope"])
def test_exported_config_and_weights_are_unchanged(tmp_path, name):
    folder = folder_of(tmp_path / "model", KINDS[name])
    backbone, shapes = load(folder), load(folder).full_shapes()
    state = {key: param[: shapes[key][0]] for key, param in backbone.hf_parameters()}
    export_hf(state, backbone.config, tmp_path / "export", dtype=torch.float32)
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "export"))
    assert after == before
    ids = batch_of([(24,)]).input_ids
    with torch.no_grad():
        assert torch.equal(stock_of(tmp_path / "export")(ids).logits, stock_of(folder)(ids).logits)


def test_length_dependence_is_logged_only_for_such_models(tmp_path, caplog):
    logging.getLogger("kdtrain").propagate = True
    for name, kind in (("phi3 longrope", "longrope"), ("llama dynamic", "dynamic"), ("llama", None)):
        (tmp_path / "config.json").write_text(json.dumps(KINDS.get(name, TINY["llama"])))
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="kdtrain"):
            check_architecture(ModelSpec(architecture=str(tmp_path)), 101, Mesh())
        messages = [text for text in caplog.messages if "rotary" in text]
        assert len(messages) == (kind is not None)
        assert not messages or (f"of the type {kind}" in messages[0] and "of its own length" in messages[0])


def test_lengths_of_documents_are_found_in_every_row():
    positions = batch_of([(5, 19), (24,), (1, 20, 3)]).position_ids
    assert document_lengths(positions).tolist() == [[5] * 5 + [19] * 19, [24] * 24, [1] + [20] * 20 + [3] * 3]


@pytest.mark.parametrize("name", ["phi3 longrope", "llama dynamic"])
def test_unknown_length_dependent_type_is_refused_with_the_measurement(tmp_path, monkeypatch, name):
    (tmp_path / "config.json").write_text(json.dumps(KINDS[name]))
    spec = ModelSpec(architecture=str(tmp_path), dtype="float32")
    monkeypatch.setattr(rotary, "LENGTH_DEPENDENT", ())
    kind = name.split()[1]
    match = rf"type {kind}: hidden states of short documents change by [\d.e-]+ of their size when a long document"
    with pytest.raises(ConfigError, match=match):
        load_backbone(spec, Mesh(), vocab_size=101, trainable=False)
    with pytest.raises(ConfigError, match=match):
        check_architecture(spec, 101, Mesh())
    check_architecture(spec, 101, Mesh(), packed=False)  # all documents are as long as the sequence
    with pytest.raises(ConfigError, match=match):  # but a rank would see its part of it alone
        check_architecture(spec, 101, Mesh(world_size=2, cp_size=2), packed=False)


def test_a_model_that_cannot_be_packed_may_depend_on_the_length_of_its_one_document():
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "layer_types": ["full_attention"] * 2}
    settings = {**config_of("llama", dynamic()), **experts, "model_type": "gpt_oss"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    with pytest.raises(ConfigError, match=r"type dynamic, which depends on length.*packed documents differ"):
        check_neighbours(model, "it")  # not for its rotary embeddings: it does not separate packed documents
    check_neighbours(model, "it", packed=False)


@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3"])
def test_other_rope_types_are_unchanged(tmp_path, kind):
    rope = {
        "default": {},
        "linear": {"factor": 4.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
        "llama3": {
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    }[kind]
    config = tiny_config("llama", rope_parameters={"rope_type": kind, "rope_theta": 1e4, **rope})
    backbone = load(folder_of(tmp_path, config))
    assert not any(isinstance(module, DocumentRotary) for module in backbone.modules())


def test_model_that_declares_a_rope_type_without_a_module_is_refused(tmp_path):
    rope = {"type": "dynamic", "factor": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("gpt2", rope_scaling=rope)))
    with pytest.raises(ConfigError, match=r"declares rotary.*type dynamic, and GPT2LMHeadModel has no module"):
        check_architecture(ModelSpec(architecture=str(tmp_path)), 101, Mesh())


def test_shared_module_is_replaced_by_one_shared_replacement():
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**KINDS["gpt_neox dynamic"]), attn_implementation="sdpa"
    )
    model.gpt_neox.second = model.gpt_neox.rotary_emb
    assert use_document_lengths(model, "it") == ["dynamic"]
    assert model.gpt_neox.second is model.gpt_neox.rotary_emb
    assert isinstance(model.gpt_neox.rotary_emb.stock, GPTNeoXRotaryEmbedding)
    assert model.gpt_neox.rotary_emb.original_max_seq_len == ORIGINAL
