"""Tensor parallelism against the stock model in one process: hidden states and every gathered gradient."""

import gc

import pytest
import torch

from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import VocabShard
from kdtrain.errors import ParallelError
from kdtrain.models.backbone import call_with_head
from kdtrain.models.load import enable_activation_checkpointing
from kdtrain.parallel import merge_state_dict, plan_shards
from kdtrain.parallel.heads import HeadSharding
from kdtrain.parallel.layers import VocabParallelEmbedding, sum_gradient_over_tp
from kdtrain.parallel.replace import local_parameter
from tests.support.live_bytes import LiveBytes
from tests.support.tp_models import (
    ROWS,
    VOCAB,
    Parts,
    cross_entropy_head,
    direction,
    packed_batch,
    reference,
    relative_error,
    sharded_backbone,
    stock_model,
)

pytestmark = pytest.mark.dist

FAMILIES = ("llama", "qwen2", "qwen3", "smollm", "gpt_neox", "gemma3")
RELATIVES = (
    {"model_type": "mistral", "sliding_window": None},
    {"model_type": "cohere", "logit_scale": 0.25},
    {"model_type": "granite", "logits_scaling": 8.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
    {"model_type": "gemma2", "head_dim": 8, "final_logit_softcapping": 4.0, "query_pre_attn_scalar": 8},
)


def run_cases(rank, world_size, cases, **options):
    """For each (family, changes, kind, checkpointing): this rank's hidden states, loss and gradients as numpy."""
    mesh = Mesh.build(world_size)
    return [run_case(mesh, *case, **options) for case in cases]


def run_case(mesh, family, changes, kind, checkpointing, *, length=13, sequence=False):
    backbone = sharded_backbone(family, changes, mesh, sequence).train()
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
    owned = {n for n, spec in backbone.cuts.items() if not spec.is_replica(mesh.tp_rank)}
    assert marked == {n for n, _ in backbone.hf_parameters()} & owned
    return hidden.detach().numpy(), float(loss.detach()), grads


def compare(case, answers, tp, length=13):
    family, changes, kind, _ = case
    hidden, loss, grads = reference(family, changes, kind, length)
    shard = VocabShard.of(VOCAB, 0, tp, total_rows=ROWS)
    specs = plan_shards(stock_model(family, **changes), tp, shard.rows)
    for rank, (got_hidden, got_loss, _) in enumerate(answers):
        assert relative_error(torch.from_numpy(got_hidden), hidden) < 1e-5, (case, rank)
        assert got_loss == pytest.approx(float(loss), rel=1e-5), (case, rank)
    local = [{n: torch.from_numpy(g) for n, g in answer[2].items()} for answer in answers]
    for name in local[0]:
        if name not in specs:  # replicated: every rank must hold the whole gradient, bit for bit
            assert all(torch.equal(state[name], local[0][name]) for state in local), (case, name)
    for rank, state in enumerate(local):
        for name, spec in specs.items():
            if spec.padded is not None and name in state:
                start, stop = spec.shards[rank]
                assert not state[name][stop - start :].any(), f"{case}: padding rows of {name} got a gradient"
    merged = merge_state_dict(local, specs)
    assert set(merged) == set(grads)
    errors = {name: relative_error(merged[name], grads[name]) for name in grads}
    worst = max(errors, key=errors.get)
    assert errors[worst] < 1e-5, (case, worst, errors[worst])


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_hidden_states_loss_and_gradients_equal_the_stock_model(rank_pool, tp):
    cases = [
        (family, {"tie_word_embeddings": tied}, kind, False)
        for family in FAMILIES
        for tied, kind in ((False, "hidden"), (False, "ce"), (True, "ce"))
    ]
    answers = rank_pool(tp).run(run_cases, cases=cases)
    for index, case in enumerate(cases):
        compare(case, [answer[index] for answer in answers], tp)


def test_scaled_embeddings_and_logits_equal_the_stock_model(rank_pool):
    cases = [("llama", changes, "ce", False) for changes in RELATIVES]
    answers = rank_pool(2).run(run_cases, cases=cases)
    for index, case in enumerate(cases):
        compare(case, [answer[index] for answer in answers], 2)


SHARED = (
    (
        "qwen3",
        {"num_key_value_heads": 2},
        False,
    ),  # k_norm: partial gradients, also with shared heads
    ("qwen2", {"num_key_value_heads": 1}, True),  # biases
    ("gemma3", {"num_key_value_heads": 2}, False),
    ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2}, False),
)


def test_shared_key_value_heads_equal_the_stock_model(rank_pool):
    cases = [(family, changes, "ce", checkpointing) for family, changes, checkpointing in SHARED]
    answers = rank_pool(4).run(run_cases, cases=cases)
    for index, case in enumerate(cases):
        compare(case, [answer[index] for answer in answers], 4)
        keys = [answer[index][2]["model.layers.1.self_attn.k_proj.weight"] for answer in answers]
        assert (keys[0] == keys[1]).all(), "ranks with the same head have the same gradient, bit for bit"


def partial_gradient_of_a_shared_projection(rank, world_size):
    """This rank's partial gradient, in bfloat16, of a shard that all ranks hold, and the gradient after the hook."""
    spec = HeadSharding.of(4, 1, world_size).key_value_spec(0, 32)
    full = torch.nn.Parameter(torch.ones(32, 16, dtype=torch.bfloat16))
    mine = local_parameter(full, spec, Mesh.build(world_size))
    share = torch.randn(32, 16, generator=torch.Generator().manual_seed(rank)).bfloat16()
    (mine * share).sum().backward()
    return share.double().numpy(), mine.grad.double().numpy()


def test_gradients_of_a_shared_shard_are_summed_in_float32(rank_pool):
    shares, found = zip(*rank_pool(4).run(partial_gradient_of_a_shared_projection), strict=True)
    want = torch.from_numpy(sum(shares)).bfloat16().double().numpy()
    for grad in found:
        assert (grad == want).all(), "rounded more than once"


def test_activation_checkpointing_changes_no_gradient(rank_pool):
    cases = [(family, {"tie_word_embeddings": True}, "ce", True) for family in ("qwen3", "gpt_neox", "smollm")]
    answers = rank_pool(2).run(run_cases, cases=cases)
    for index, case in enumerate(cases):
        compare(case, [answer[index] for answer in answers], 2)


@pytest.mark.parametrize("tp", [2, 3, 4])
def test_sequence_parallelism_changes_no_gradient(rank_pool, tp):
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
    backbone = sharded_backbone(family, {}, mesh, sequence).train()
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
        # backward recomputes the forward of each layer, but not the layer's last sum, which is not needed
        ("llama", True, 1 + 2 * 2, 2 * 2 + 2 * 1),
    ],
)
def test_a_layer_costs_two_all_reduces_forward_and_two_backward(rank_pool, family, checkpointing, forward, backward):
    answers = rank_pool(2).run(count_collectives, family=family, checkpointing=checkpointing)
    assert answers == [[(forward,), (backward,)]] * 2


def test_sequence_parallelism_replaces_each_all_reduce_by_gather_and_scatter(rank_pool):
    answers = rank_pool(2).run(count_collectives, family="llama", checkpointing=False, sequence=True)
    # two of each per layer and direction; one gather to join the tokens at the end, one for the gradient at the start
    assert answers == [[(2 * 2 + 1, 2 * 2), (2 * 2 + 1, 2 * 2)]] * 2


def gradient_without_norm_hook(rank, world_size, name):
    """The gradient of a parameter applied to this rank's tokens, without the hook that sums it."""
    backbone = sharded_backbone("gpt_neox", {}, Mesh.build(world_size), sequence=True).train()
    param = dict(backbone.hf_parameters())[name]
    param._backward_hooks.clear()
    hidden = backbone.hidden_states(packed_batch(12))
    (hidden * direction(hidden)).sum().backward()
    return param.grad.numpy()


@pytest.mark.parametrize("name", ["input_layernorm.weight", "attention.dense.bias", "mlp.dense_4h_to_h.bias"])
def test_token_wise_parameters_have_partial_gradients_without_their_hook(rank_pool, name):
    name = f"gpt_neox.layers.0.{name}"
    shares = [torch.from_numpy(share) for share in rank_pool(2).run(gradient_without_norm_hook, name=name)]
    want = reference("gpt_neox", {}, "hidden", 12)[2][name]
    for share in shares:
        assert relative_error(share, want) > 0.05, "the test could not notice a missing hook"
    assert relative_error(sum(shares), want) < 1e-5


def refuse(rank, world_size, family, length):
    backbone = sharded_backbone(family, {}, Mesh.build(world_size), sequence=True)
    with pytest.raises(ParallelError) as refused:
        backbone.hidden_states(packed_batch(length))
    return str(refused.value)


def test_a_length_that_tp_does_not_divide_is_refused(rank_pool):
    for message in rank_pool(2).run(refuse, family="llama", length=13):
        assert "cannot divide the tokens of activations [B, S, D] = [2, 13, " in message
        assert "make data.seq_len a multiple of parallel.tp" in message


def live_bytes(rank, world_size, sequence, recompute):
    """Bytes that forward saves for backward."""
    mesh = Mesh.build(world_size)
    backbone = sharded_backbone("llama", {"num_hidden_layers": 12}, mesh, sequence).train()
    if recompute:
        enable_activation_checkpointing(backbone.model)
    batch = packed_batch(256)
    with LiveBytes() as live:
        hidden = backbone.hidden_states(batch)
        gc.collect()  # buffers of the collectives
        kept = live.now
    del hidden
    return kept


@pytest.mark.parametrize("recompute", [False, True])
def test_sequence_parallelism_saves_memory(rank_pool, recompute):
    whole, divided = (
        rank_pool(2).run(live_bytes, sequence=sequence, recompute=recompute)[0] for sequence in (False, True)
    )
    # with recomputation the inputs of 11 of 12 layers halve, without it the activations of norms and additions
    assert divided < (0.8 if recompute else 0.9) * whole


def gradients_without_norm_hook(rank, world_size):
    """q_norm gradients of this rank before and after the hook that sums them."""
    mesh = Mesh.build(world_size)
    backbone = sharded_backbone("qwen3", {}, mesh).train()
    seen = []
    name = "model.layers.0.self_attn.q_norm.weight"
    param = dict(backbone.hf_parameters())[name]
    param._backward_hooks.clear()
    param.register_hook(lambda grad: seen.append(grad.clone()))
    sum_gradient_over_tp(param, mesh.tp_group)
    hidden = backbone.hidden_states(packed_batch())
    (hidden * direction(hidden)).sum().backward()
    return seen[0].numpy(), param.grad.numpy()


def test_norms_inside_attention_have_partial_gradients_without_their_hook(rank_pool):
    (share_0, whole_0), (share_1, whole_1) = rank_pool(2).run(gradients_without_norm_hook)
    want = reference("qwen3", {}, "hidden")[2]["model.layers.0.self_attn.q_norm.weight"]
    whole_0, whole_1 = torch.from_numpy(whole_0), torch.from_numpy(whole_1)
    assert torch.equal(whole_0, whole_1)
    assert relative_error(whole_0, want) < 1e-5
    for share in (share_0, share_1):
        assert relative_error(torch.from_numpy(share), want) > 0.05, "the test could not notice a missing hook"
    assert relative_error(torch.from_numpy(share_0 + share_1), want) < 1e-5


def perturb_other_document(rank, world_size, family):
    """Largest change of the hidden states of the second and of the first document when the first one changes."""
    backbone = sharded_backbone(family, {}, Mesh.build(world_size)).eval()
    batch = packed_batch()
    with torch.no_grad():
        before = backbone.hidden_states(batch).view(2, 13, -1)
        batch.input_ids[0, :5] = torch.arange(20, 25)
        after = backbone.hidden_states(batch).view(2, 13, -1)
    return float((before[0, 5:] - after[0, 5:]).abs().max()), float((before[0, :5] - after[0, :5]).abs().max())


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_packed_documents_do_not_attend_to_each_other(rank_pool, family):
    for second, first in rank_pool(2).run(perturb_other_document, family=family):
        assert second == 0.0
        assert first > 0.1


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
def test_an_id_outside_the_vocabulary_is_an_error_on_every_rank(rank_pool, bad):
    for message in rank_pool(2).run(embed_bad_id, bad=bad):
        assert f"token id {bad} is not in [0, 200)" in message
