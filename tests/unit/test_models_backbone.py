"""Backbone in one process: equal to the stock model, separates documents, exact head."""

import dataclasses

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import generic

from kdtrain.batch import Batch
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import VocabShard
from kdtrain.documents import Documents
from kdtrain.errors import ConfigError, ParallelError
from kdtrain.models.backbone import Backbone, call_with_head
from kdtrain.models.tiny import TINY, tiny_config
from kdtrain.parallel import plan_shards, shard_model

OTHERS = {
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 3.0},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 4.0, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "mistral": {"sliding_window": None},
}


def stock(name, **changes):
    base = tiny_config(name) if name in TINY else {**tiny_config("llama"), "model_type": name, **OTHERS[name]}
    settings = {**base, **changes}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(2)
    attention = "eager" if name == "gemma2" else "sdpa"
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()


def backbone_of(model, vocab_size=101):
    shard = VocabShard.of(vocab_size, total_rows=101)
    cuts = plan_shards(model, 1, shard.rows)
    return Backbone(shard_model(model, Mesh(), shard), shard, cuts)


def batch_of(ids, positions=None):
    positions = torch.arange(ids.shape[1]).expand(ids.shape) if positions is None else positions
    return Batch(ids, ids, torch.ones(ids.shape), positions, torch.arange(ids.shape[0]))


def random_ids(rows=2, length=17):
    return torch.randint(0, 101, (rows, length), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("name", [*sorted(TINY), *OTHERS])
@torch.no_grad()
def test_head_shard_and_hidden_states_give_the_logits_of_the_stock_model(name):
    ids = random_ids()
    want = stock(name)(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    backbone = backbone_of(stock(name))
    head = backbone.lm_head_shard
    logits = head.logit_scale * (backbone.hidden_states(batch_of(ids)) @ head.weight.T)
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    torch.testing.assert_close(logits[:, :101], want, rtol=1e-5, atol=1e-5)
    assert not logits[:, 101:].any()


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen3"])
@torch.no_grad()
def test_packed_document_has_the_hidden_states_of_the_document_alone(name):
    backbone = backbone_of(stock(name))
    ids = random_ids(1, 12)
    packed = backbone.hidden_states(batch_of(ids, torch.tensor([[*range(5), *range(1), *range(6)]])))
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        alone = backbone.hidden_states(batch_of(ids[:, start:stop]))
        torch.testing.assert_close(packed[start:stop], alone, rtol=1e-5, atol=1e-5)
    joined = backbone.hidden_states(batch_of(ids))
    assert (joined[6:] - packed[6:]).abs().max() > 0.01, "the documents would look alike in any case"


def test_document_boundaries_are_found_in_every_row():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1], [3, 4, 0, 1, 2, 3]])
    boundaries = Documents.of(positions).offsets
    assert boundaries.dtype == torch.int32
    assert boundaries.tolist() == [0, 3, 4, 6, 8, 12]


def test_flash_attention_receives_the_document_boundaries():
    backbone = backbone_of(stock("llama"))
    backbone.config._attn_implementation_internal = "flash_attention_2"
    batch = batch_of(random_ids(1, 6), torch.tensor([[0, 1, 0, 1, 2, 0]]))
    arguments = backbone._attention_arguments(batch)
    assert arguments["cu_seq_lens_q"].tolist() == arguments["cu_seq_lens_k"].tolist() == [0, 2, 5, 6]
    assert arguments["max_length_q"] == arguments["max_length_k"] == 3


def test_positions_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="position_ids"):
        backbone_of(stock("llama")).hidden_states(batch_of(random_ids(2, 6), torch.arange(6)[None]))


def test_names_and_shapes_are_those_of_the_stock_model_with_tied_weights_once():
    for tied in (False, True):
        backbone = backbone_of(stock("llama", tie_word_embeddings=tied))
        want = {name: tuple(param.shape) for name, param in stock("llama", tie_word_embeddings=tied).named_parameters()}
        assert backbone.full_shapes() == want
        assert [name for name, _ in backbone.hf_parameters()] == list(want)
        assert backbone.num_parameters() == sum(
            p.numel() for p in stock("llama", tie_word_embeddings=tied).parameters()
        )


def test_rope_frequencies_stay_float32_after_a_cast_of_the_model():
    backbone = backbone_of(stock("llama"))
    before = backbone.model.model.rotary_emb.inv_freq.clone()
    backbone.to(torch.bfloat16)
    assert torch.equal(backbone.model.model.rotary_emb.inv_freq, before)
    assert backbone.lm_head_shard.weight.dtype == torch.bfloat16


def test_head_without_its_weight_under_zero3_is_refused():
    backbone = backbone_of(stock("llama"))
    backbone.lm_head_module.weight.data = torch.empty(0)  # what ZeRO-3 does
    with pytest.raises(ParallelError, match="head_fn"):
        _ = backbone.lm_head_shard


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    loss: torch.Tensor
    note: str
    detached: torch.Tensor


def test_only_plain_tensors_with_gradients_leave_modules():
    backbone = backbone_of(stock("llama"))
    passed = []
    backbone.lm_head_module.register_forward_hook(lambda module, args, output: passed.append(output))

    def head_fn(hidden, head):
        loss = (hidden @ head.weight.T).logsumexp(-1).sum()
        return Answer(loss, "kept", loss.detach())

    answer = call_with_head(backbone, batch_of(random_ids()), head_fn)
    assert isinstance(answer, Answer)
    assert answer.note == "kept"
    assert [len(output) for output in passed] == [1]
    assert passed[0][0].requires_grad
    answer.loss.backward()
    assert backbone.lm_head_module.weight.grad.abs().max() > 0
    assert call_with_head(backbone, batch_of(random_ids()), lambda hidden, head: hidden.shape[0]) == 34


def test_model_that_returns_a_cache_is_refused(monkeypatch):
    backbone = backbone_of(stock("llama"))
    base = backbone.model.base_model

    def with_cache(**arguments):
        return type(base).forward(base, **{**arguments, "use_cache": True})

    monkeypatch.setattr(base, "forward", with_cache)
    with pytest.raises(ConfigError, match="returns a cache although use_cache is False"):
        backbone.hidden_states(batch_of(random_ids()))


def test_cache_lookup_triggers_no_deprecation_warning(monkeypatch):
    messages = []
    monkeypatch.setattr(generic.logger, "warning_once", lambda message, *_: messages.append(message))
    backbone_of(stock("llama")).hidden_states(batch_of(random_ids()))
    assert messages == []


@pytest.mark.parametrize("bad", [-1, 99, 101, 127, 128])
def test_id_outside_the_vocabulary_is_an_error(bad):
    """The model has 101 rows, padded to 128, of which the tokenizer uses 99."""
    backbone = backbone_of(stock("llama"), vocab_size=99)
    ids = torch.tensor([[1, bad, 98]])
    with pytest.raises(IndexError, match=rf"token id {bad} is not in \[0, 99\)"):
        backbone.hidden_states(batch_of(ids))
