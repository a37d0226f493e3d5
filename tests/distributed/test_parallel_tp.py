"""Tensor parallelism against the stock model in one process: hidden states and every gathered gradient."""

import dataclasses
import gc

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from kdtrain.batch import Batch
from kdtrain.distributed.collectives import copy_to_tp, reduce_from_tp
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import VocabShard
from kdtrain.errors import ParallelError
from kdtrain.models.backbone import Backbone, call_with_head
from kdtrain.models.load import enable_activation_checkpointing
from kdtrain.models.tiny import tiny_config
from kdtrain.parallel import merge_state_dict, plan_cuts, shard_model
from kdtrain.parallel.heads import HeadCut
from kdtrain.parallel.layers import VocabParallelEmbedding, sum_gradient_over_tp
from kdtrain.parallel.replace import local_parameter
from tests.support.live_bytes import LiveBytes

pytestmark = pytest.mark.dist

ROWS, VOCAB = 301, 299  # the head has two rows more than the tokenizer has tokens; tp 4 leaves a rank without any
FAMILIES = ("llama", "qwen2", "qwen3", "smollm", "gpt_neox", "gemma3")
RELATIVES = (
    {"model_type": "mistral", "sliding_window": None},
    {"model_type": "cohere", "logit_scale": 0.25},
    {"model_type": "granite", "logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 4.0, "query_pre_attn_scalar": 8},
)


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """Shaped like LossParts: a frozen, slotted dataclass in which one field carries the gradient."""

    loss: torch.Tensor
    ce: torch.Tensor


def stock_model(family, **changes):
    settings = tiny_config(family, vocab_size=ROWS, **changes)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.dtype = torch.float32
    torch.manual_seed(5)
    attention = "eager" if config.model_type == "gemma2" else "sdpa"  # Gemma 2 has no sdpa
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    for name, param in model.named_parameters():
        if "norm" in name or name.endswith(
            "bias"
        ):  # ones and zeros would hide a norm applied twice, a bias added twice
            torch.nn.init.normal_(param, mean=0.5, std=0.3)
    return model


def packed_batch(length=13):
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, VOCAB, (2, length), generator=generator)
    ids[0, 3] = ids[1, 0] = 2  # smollm's padding id
    positions = torch.tensor([[*range(5), *range(length - 5)], [*range(1), *range(1), *range(length - 2)]])
    labels = torch.randint(0, VOCAB, (2, length), generator=generator)
    mask = torch.ones(2, length)
    mask[0, 4] = 0
    return Batch(ids, labels, mask, positions, torch.arange(2))


def direction(hidden):
    return torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3), dtype=hidden.dtype)


def reference(family, changes, kind, length=13):
    """(hidden, loss, gradients by name) of the stock model, with its own head and logits."""
    model = stock_model(family, **changes).train()
    batch = packed_batch(length)
    out = model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    hidden = out.last_hidden_state.flatten(0, 1)
    if kind == "hidden":
        loss = (hidden * direction(hidden)).sum()
    else:
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits.flatten(0, 1)
        losses = F.cross_entropy(logits[:, :VOCAB], batch.labels.flatten(), reduction="none")
        loss = (losses * batch.loss_mask.flatten()).sum()
    loss.backward()
    return hidden.detach(), loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def cross_entropy_head(batch, shard, group):
    """A plain differentiable vocabulary-parallel cross-entropy, independent of kdtrain.losses."""

    def head_fn(hidden, head):
        hidden = copy_to_tp(hidden, group)
        rows = shard.valid_rows
        logits = hidden @ head.weight[:rows].T * head.logit_scale
        if head.bias is not None:
            logits = logits + head.bias[:rows]
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        labels = batch.labels.flatten() - shard.start
        mine = (labels >= 0) & (labels < rows)
        sums = reduce_from_tp(logits.exp().sum(-1), group)
        picked = F.pad(logits, (0, 1)).gather(1, labels.where(mine, rows)[:, None])[:, 0]
        losses = sums.log() - reduce_from_tp(picked * mine, group)
        return Parts((losses * batch.loss_mask.flatten()).sum(), losses.detach())

    return head_fn


def cut_backbone(family, changes, mesh, sequence=False):
    model = stock_model(family, **changes)
    shard = VocabShard.of(VOCAB, mesh.tp_rank, mesh.tp_size, total_rows=ROWS)
    cuts = plan_cuts(model, mesh.tp_size, shard.rows)
    return Backbone(shard_model(model, mesh, shard, sequence=sequence), shard, cuts)


def run_cases(rank, world_size, cases, **options):
    """For each (family, changes, kind, checkpointing): this rank's hidden states, loss and gradients as numpy."""
    mesh = Mesh.build(world_size)
    return [run_case(mesh, *case, **options) for case in cases]


def run_case(mesh, family, changes, kind, checkpointing, *, length=13, sequence=False):
    backbone = cut_backbone(family, changes, mesh, sequence).train()
    if checkpointing:
        enable_activation_checkpointing(backbone.model)
    batch = packed_batch(length)
    if kind == "hidden":
        hidden = backbone.hidden_states(batch)
        loss = (hidden * direction(hidden)).sum()
    else:
        hidden = backbone.hidden_states(batch).detach()
        parts = call_with_head(backbone, batch, cross_entropy_head(batch, backbone.shard, mesh.tp_group))
        assert isinstance(parts, Parts)
        loss = parts.loss
    loss.backward()
    grads = {n: p.grad.numpy() for n, p in backbone.hf_parameters() if p.grad is not None}
    marked = {n for n, p in backbone.hf_parameters() if getattr(p, "tensor_model_parallel", False)}
    own = {n for n, cut in backbone.cuts.items() if not cut.is_copy(mesh.tp_rank)}
    assert marked == {n for n, _ in backbone.hf_parameters()} & own
    return hidden.detach().numpy(), float(loss.detach()), grads


def relative_error(got, want):
    """Largest deviation over the largest entry."""
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-12))


def compare(case, answers, tp, length=13):
    family, changes, kind, _ = case
    hidden, loss, grads = reference(family, changes, kind, length)
    shard = VocabShard.of(VOCAB, 0, tp, total_rows=ROWS)
    cuts = plan_cuts(stock_model(family, **changes), tp, shard.rows)
    for rank, (got_hidden, got_loss, _) in enumerate(answers):
        assert relative_error(torch.from_numpy(got_hidden), hidden) < 1e-5, (case, rank)
        assert got_loss == pytest.approx(float(loss), rel=1e-5), (case, rank)
    local = [{n: torch.from_numpy(g) for n, g in answer[2].items()} for answer in answers]
    for name in local[0]:
        if name not in cuts:  # replicated: every rank must hold the whole gradient, bit for bit
            assert all(torch.equal(state[name], local[0][name]) for state in local), (case, name)
    for rank, state in enumerate(local):
        for name, cut in cuts.items():
            if cut.padded is not None and name in state:
                start, stop = cut.pieces[rank]
                assert not state[name][stop - start :].any(), f"{case}: padding rows of {name} got a gradient"
    merged = merge_state_dict(local, cuts)
    assert set(merged) == set(grads)
    errors = {name: relative_error(merged[name], grads[name]) for name in grads}
    worst = max(errors, key=errors.get)
    assert errors[worst] < 1e-5, (case, worst, errors[worst])


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_every_gradient_equals_that_of_the_stock_model(rank_pool, tp):
    cases = [
        (family, {"tie_word_embeddings": tied}, kind, False)
        for family in FAMILIES
        for tied, kind in ((False, "hidden"), (False, "ce"), (True, "ce"))
    ]
    answers = rank_pool(tp).run(run_cases, cases=cases)
    for index, case in enumerate(cases):
        compare(case, [answer[index] for answer in answers], tp)


def test_relatives_with_scaled_embeddings_and_logits_agree_too(rank_pool):
    cases = [("llama", changes, "ce", False) for changes in RELATIVES]
    answers = rank_pool(2).run(run_cases, cases=cases)
    for index, case in enumerate(cases):
        compare(case, [answer[index] for answer in answers], 2)


SHARED = (
    ("qwen3", {"num_key_value_heads": 2}, False),  # k_norm's gradient is a share on every rank, heads shared or not
    ("qwen2", {"num_key_value_heads": 1}, True),  # biases
    ("gemma3", {"num_key_value_heads": 2}, False),
    ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2}, False),
)


def test_ranks_share_key_and_value_heads(rank_pool):
    cases = [(family, changes, "ce", checkpointing) for family, changes, checkpointing in SHARED]
    answers = rank_pool(4).run(run_cases, cases=cases)
    for index, case in enumerate(cases):
        compare(case, [answer[index] for answer in answers], 4)
        keys = [answer[index][2]["model.layers.1.self_attn.k_proj.weight"] for answer in answers]
        assert (keys[0] == keys[1]).all(), "ranks with the same head have the same gradient, bit for bit"


def shares_of_a_key_projection(rank, world_size):
    """This rank's share of the gradient of a piece that all hold, in bfloat16, and what the piece gets."""
    cut = HeadCut.of(4, 1, world_size).key_value_cut(0, 32)
    full = torch.nn.Parameter(torch.ones(32, 16, dtype=torch.bfloat16))
    mine = local_parameter(full, cut, Mesh.build(world_size))
    share = torch.randn(32, 16, generator=torch.Generator().manual_seed(rank)).bfloat16()
    (mine * share).sum().backward()
    return share.double().numpy(), mine.grad.double().numpy()


def test_shares_of_a_piece_that_ranks_hold_in_common_are_added_in_float32(rank_pool):
    shares, found = zip(*rank_pool(4).run(shares_of_a_key_projection), strict=True)
    want = torch.from_numpy(sum(shares)).bfloat16().double().numpy()
    for grad in found:
        assert (grad == want).all(), "rounded more than once"


def test_activation_checkpointing_changes_no_gradient(rank_pool):
    cases = [(family, {"tie_word_embeddings": True}, "ce", True) for family in ("qwen3", "gpt_neox", "smollm")]
    answers = rank_pool(2).run(run_cases, cases=cases)
    for index, case in enumerate(cases):
        compare(case, [answer[index] for answer in answers], 2)


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_dividing_activations_by_token_changes_no_gradient(rank_pool, tp):
    cases = [
        (family, {}, kind, recompute)
        for family in FAMILIES
        for kind, recompute in (("hidden", False), ("ce", True))
        if (family, tp) != ("smollm", 4)
    ]
    cases += [("llama", changes, "ce", False) for changes in RELATIVES]
    cases.append(("llama", {"attention_bias": True, "mlp_bias": True}, "ce", False))
    answers = rank_pool(tp).run(run_cases, cases=cases, length=12, sequence=True)
    for index, case in enumerate(cases):
        compare(case, [answer[index] for answer in answers], tp, length=12)


def count_collectives(rank, world_size, family, checkpointing, sequence=False):
    """Forward and backward of one hidden_states call: all-reduces, or all-gathers and reduce-scatters."""
    mesh = Mesh.build(world_size)
    backbone = cut_backbone(family, {}, mesh, sequence).train()
    if checkpointing:
        enable_activation_checkpointing(backbone.model)
    counts = []
    kinds = ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_") if sequence else ("c10d::allreduce_",)

    def count(run):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            result = run()
        counts.append(tuple(sum(e.count for e in profile.key_averages() if e.key == kind) for kind in kinds))
        return result

    hidden = count(lambda: backbone.hidden_states(packed_batch(12)))
    count(hidden.sum().backward)
    return counts


@pytest.mark.parametrize(
    ("family", "checkpointing", "forward", "backward"),
    [
        ("llama", False, 1 + 2 * 2, 2 * 2),
        ("gpt_neox", False, 1 + 2 * 2, 2 * 2),
        # two more per layer: the gradients of q_norm and k_norm, of head_dim elements each
        ("qwen3", False, 1 + 2 * 2, 2 * 2 + 2 * 2),
        # backward runs the forward of each layer again, and stops before the layer's last sum, which nobody needs
        ("llama", True, 1 + 2 * 2, 2 * 2 + 2 * 1),
    ],
)
def test_a_layer_costs_two_all_reduces_each_way(rank_pool, family, checkpointing, forward, backward):
    answers = rank_pool(2).run(count_collectives, family=family, checkpointing=checkpointing)
    assert answers == [[(forward,), (backward,)]] * 2


def test_divided_activations_cost_a_gather_and_a_scatter_for_each_all_reduce(rank_pool):
    answers = rank_pool(2).run(count_collectives, family="llama", checkpointing=False, sequence=True)
    # per layer two of each, each way; a gather to join the tokens at the end and one for its gradient at the beginning
    assert answers == [[(2 * 2 + 1, 2 * 2), (2 * 2 + 1, 2 * 2)]] * 2


def gradient_without_norm_hook(rank, world_size, name):
    """Of a parameter that sees this rank's tokens, before the hook that sums it."""
    backbone = cut_backbone("gpt_neox", {}, Mesh.build(world_size), sequence=True).train()
    param = dict(backbone.hf_parameters())[name]
    param._backward_hooks.clear()
    hidden = backbone.hidden_states(packed_batch(12))
    (hidden * direction(hidden)).sum().backward()
    return param.grad.numpy()


@pytest.mark.parametrize("name", ["input_layernorm.weight", "attention.dense.bias", "mlp.dense_4h_to_h.bias"])
def test_without_its_hook_what_sees_a_share_of_the_tokens_would_get_a_share_of_its_gradient(rank_pool, name):
    name = f"gpt_neox.layers.0.{name}"
    shares = [torch.from_numpy(share) for share in rank_pool(2).run(gradient_without_norm_hook, name=name)]
    want = reference("gpt_neox", {}, "hidden", 12)[2][name]
    for share in shares:
        assert relative_error(share, want) > 0.05, "the test could not notice a missing hook"
    assert relative_error(sum(shares), want) < 1e-5


def refuse(rank, world_size, family, length):
    backbone = cut_backbone(family, {}, Mesh.build(world_size), sequence=True)
    with pytest.raises(ParallelError) as refused:
        backbone.hidden_states(packed_batch(length))
    return str(refused.value)


def test_a_length_that_ranks_cannot_share_is_refused(rank_pool):
    for message in rank_pool(2).run(refuse, family="llama", length=13):
        assert "cannot share the tokens of activations [B, S, D] = [2, 13, " in message
        assert "make data.seq_len a multiple of parallel.tp" in message


def live_bytes(rank, world_size, sequence, recompute):
    """What forward leaves for backward, in bytes."""
    mesh = Mesh.build(world_size)
    backbone = cut_backbone("llama", {"num_hidden_layers": 12}, mesh, sequence).train()
    if recompute:
        enable_activation_checkpointing(backbone.model)
    batch = packed_batch(256)
    with LiveBytes() as live:
        hidden = backbone.hidden_states(batch)
        gc.collect()  # the collectives' own buffers
        kept = live.now
    del hidden
    return kept


@pytest.mark.parametrize("recompute", [False, True])
def test_divided_activations_take_less_memory(rank_pool, recompute):
    whole, divided = (
        rank_pool(2).run(live_bytes, sequence=sequence, recompute=recompute)[0] for sequence in (False, True)
    )
    # with recomputation: of 12 layers' inputs all but the first layer's halve; else norms and sums do
    assert divided < (0.8 if recompute else 0.9) * whole


def gradients_without_norm_hook(rank, world_size):
    """q_norm gradients of this rank before and after the hook that sums them."""
    mesh = Mesh.build(world_size)
    backbone = cut_backbone("qwen3", {}, mesh).train()
    seen = []
    name = "model.layers.0.self_attn.q_norm.weight"
    param = dict(backbone.hf_parameters())[name]
    param._backward_hooks.clear()
    param.register_hook(lambda grad: seen.append(grad.clone()))
    sum_gradient_over_tp(param, mesh.tp_group)
    hidden = backbone.hidden_states(packed_batch())
    (hidden * direction(hidden)).sum().backward()
    return seen[0].numpy(), param.grad.numpy()


def test_without_its_hook_a_norm_inside_attention_would_get_a_share_of_its_gradient(rank_pool):
    (share_0, whole_0), (share_1, whole_1) = rank_pool(2).run(gradients_without_norm_hook)
    want = reference("qwen3", {}, "hidden")[2]["model.layers.0.self_attn.q_norm.weight"]
    whole_0, whole_1 = torch.from_numpy(whole_0), torch.from_numpy(whole_1)
    assert torch.equal(whole_0, whole_1)
    assert relative_error(whole_0, want) < 1e-5
    for share in (share_0, share_1):
        assert relative_error(torch.from_numpy(share), want) > 0.05, "the test could not notice a missing hook"
    assert relative_error(torch.from_numpy(share_0 + share_1), want) < 1e-5


def perturb_other_document(rank, world_size, family):
    """Largest change of the second document's hidden states when the first document changes."""
    backbone = cut_backbone(family, {}, Mesh.build(world_size)).eval()
    batch = packed_batch()
    with torch.no_grad():
        before = backbone.hidden_states(batch).view(2, 13, -1)
        batch.input_ids[0, :5] = torch.arange(20, 25)
        after = backbone.hidden_states(batch).view(2, 13, -1)
    return float((before[0, 5:] - after[0, 5:]).abs().max()), float((before[0, :5] - after[0, :5]).abs().max())


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_packed_documents_do_not_see_each_other(rank_pool, family):
    for other, own in rank_pool(2).run(perturb_other_document, family=family):
        assert other == 0.0
        assert own > 0.1


def embed_bad_id(rank, world_size, bad):
    """The error's text. Every rank must raise, or the others would wait in the all-reduce."""
    mesh = Mesh.build(world_size)
    shard = VocabShard.of(200, mesh.tp_rank, mesh.tp_size)
    weight = torch.nn.Parameter(torch.ones(shard.rows, 4))
    embedding = VocabParallelEmbedding(weight, shard, mesh.tp_group)
    try:
        embedding(torch.tensor([[0, 199, bad]]))
    except IndexError as error:
        return str(error)
    return None


@pytest.mark.parametrize("bad", [-1, 200, 255, 256, 1000])
def test_an_id_past_every_shard_is_an_error_on_every_rank(rank_pool, bad):
    for message in rank_pool(2).run(embed_bad_id, bad=bad):
        assert f"token id {bad} is not in [0, 200)" in message
