"""attention=packed in stock models of every family: hidden states and gradients of the masked path."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdtrain.batch import Batch
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import VocabShard
from kdtrain.documents import Documents
from kdtrain.models.backbone import Backbone
from kdtrain.models.context import Context
from kdtrain.models.load import enable_activation_checkpointing
from kdtrain.models.packed_layout import PackedDocuments
from kdtrain.models.tiny import TINY, tiny_config
from kdtrain.models.tiny_mixtures import MIXTURES, mixture_config
from kdtrain.parallel import plan_shards, shard_model

OTHERS = {
    "gemma2": {"head_dim": 8, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, "sliding_window": 7},
    "mistral": {"sliding_window": 5},
    "cohere": {"logit_scale": 0.25},
    "granite": {"attention_multiplier": 0.3},
}
EAGER = {"gemma2", "gpt_oss", "mimo_v2_flash"}
"""Soft-capped logits and sinks, which sdpa does not compute."""

QUIET = {"phimoe": {"router_jitter_noise": 0.0}}
LEAKS = {"gpt_oss"}
"""Stock models that join the documents of a sequence: their documents are run one by one instead."""

LENGTHS = [[21, 1, 18], [40], [3, 2, 1, 4, 9, 1, 1, 5, 14]]
FAMILIES = [*sorted(TINY), *OTHERS, *sorted(MIXTURES)]


def config_of(name):
    if name in MIXTURES:
        return mixture_config(name, **QUIET.get(name, {}))
    return tiny_config(name) if name in TINY else {**tiny_config("llama"), "model_type": name, **OTHERS[name]}


def stock(name):
    settings = config_of(name)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(2)
    attention = "eager" if name in EAGER else "sdpa"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def batches(alone):
    """The packed sequences, or their documents one by one."""
    ids = torch.randint(0, 101, (3, 40), generator=torch.Generator().manual_seed(4))
    rows = [torch.cat([torch.arange(length) for length in row])[None] for row in LENGTHS]
    pairs = [(ids, torch.cat(rows))]
    if alone:
        lengths = [length for row in LENGTHS for length in row]
        pairs = [(part[None], torch.arange(len(part))[None]) for part in ids.flatten().split(lengths)]
    for one, positions in pairs:
        yield Batch(one, one, torch.ones(one.shape), positions, torch.arange(len(one)))


def step(model, attention, *, recompute=False, alone=False):
    """(hidden states, gradients by name) of a copy of `model`."""
    model = copy.deepcopy(model).train()
    if attention is not None:
        model.config._attn_implementation = attention
    if recompute:
        enable_activation_checkpointing(model)
    shard = VocabShard.of(101, total_rows=101)
    cuts = plan_shards(model, 1, shard.rows)
    backbone = Backbone(shard_model(model, Mesh(), shard), shard, cuts)
    hidden = torch.cat([backbone.hidden_states(batch) for batch in batches(alone)])
    (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    return hidden.detach(), {name: p.grad for name, p in backbone.hf_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_and_gradients_match_the_masked_path(name):
    model = stock(name)
    want, want_grads = step(model, None, alone=name in LEAKS)
    for recompute in (False, True):
        if recompute and not model.supports_gradient_checkpointing:
            continue
        found, grads = step(model, "packed", recompute=recompute)
        assert (found - want).abs().max() <= 2e-5 * want.abs().max()
        assert grads.keys() == want_grads.keys()
        whole = max(float(grad.norm()) for grad in want_grads.values())
        for parameter, grad in want_grads.items():
            error = float((grads[parameter] - grad).norm()) / max(float(grad.norm()), 0.01 * whole)
            assert error <= 1e-4, f"{parameter}: {error:.1e}"


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_comparison_detects_joined_documents(name, monkeypatch):
    model = stock(name)
    want, _ = step(model, None, alone=name in LEAKS)
    rows = PackedDocuments(Documents.of(torch.arange(40).expand(3, -1)))
    monkeypatch.setattr(Context, "packing", rows)
    found, _ = step(model, "packed")
    assert (found - want).abs().max() > 1e-3


def test_stock_gpt_oss_joins_documents_and_packed_does_not():
    model = stock("gpt_oss")
    want, _ = step(model, None, alone=True)
    assert (step(model, None)[0] - want).abs().max() > 1e-3
    assert (step(model, "packed")[0] - want).abs().max() < 1e-4
