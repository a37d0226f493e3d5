"""The adapter of docs/megatron_adapter.md on a Megatron-Core GPTModel: its gradients at tp 1 and 2."""

import contextlib
import functools
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from kdtrain.distributed.collectives import gather_ranks
from kdtrain.losses import reference

pytestmark = pytest.mark.dist

PAGE = Path(__file__).resolve().parents[2] / "docs/megatron_adapter.md"
ROWS, VOCAB, WIDTH, LENGTH, BATCH = 96, 90, 32, 6, 2


def adapter_text():
    [block] = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return block


def adapter():
    """The names that the page's code defines."""
    names = {}
    exec(compile(adapter_text(), str(PAGE), "exec"), names)  # the page is part of this repository and is under test
    return names


def model(seed, *, tied):
    """A two-layer GPTModel in float32, this rank's part, the same for every seed."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    tp = dist.get_world_size()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    # dropout masks come from CUDA generators; without dropout, and without CUDA, there is nothing to fork
    tensor_parallel.random.get_cuda_rng_tracker().fork = lambda *_: contextlib.nullcontext()
    torch.manual_seed(seed)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=WIDTH,
        num_attention_heads=4,
        tensor_model_parallel_size=tp,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        pipeline_dtype=torch.float32,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=ROWS,
        max_sequence_length=LENGTH,
        share_embeddings_and_output_weights=tied,
    )


def batch():
    rng = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(VOCAB, (2, BATCH, LENGTH), generator=rng)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask, "labels": labels}


def gradients(network):
    found = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    network.zero_grad()
    return found


def assert_same(got, expected, where):
    assert set(got) == set(expected)
    assert len(expected) > 20
    for name in expected:
        error = (got[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-3)
        assert error <= 2e-5, (where, name, float(error))


def on_cpu(check):
    """Replace the current CUDA device, on which Megatron allocates buffers, by the CPU."""

    @functools.wraps(check)
    def wrapped(*arguments, **options):
        with mock.patch.object(torch.cuda, "current_device", return_value="cpu"):
            return check(*arguments, **options)

    return wrapped


@on_cpu
def check_cross_entropy(rank, world_size, tied):
    """With kd_weight 0 and no padding: equal to the model's own output layer and vocabulary-parallel cross-entropy."""
    student = model(1, tied=tied)
    inputs = batch()
    own = student(**inputs).sum()
    own.backward()
    expected = gradients(student)
    ones = torch.ones(BATCH, LENGTH)
    arguments = {"vocab_size": ROWS, "kd_weight": 0 * ones, "ce_weight": ones, "divergence": "forward_kl"}
    parts = adapter()["distillation_loss"](student, student, inputs, **arguments)
    parts.loss.backward()
    torch.testing.assert_close(parts.loss, own, rtol=1e-5, atol=0)
    assert_same(gradients(student), expected, f"tp {world_size}")


@on_cpu
def check_distillation(rank, world_size):
    """With a padded vocabulary: d(hidden) and d(head) in float64, and the model's gradients from that d(hidden)."""
    names = adapter()
    student, teacher = (model(seed, tied=False) for seed in (1, 2))
    inputs = batch()
    models = {name: inputs[name] for name in ("input_ids", "position_ids", "attention_mask")}
    rng = torch.Generator().manual_seed(3)
    weights = {name: torch.rand(BATCH, LENGTH, generator=rng) for name in ("kd_weight", "ce_weight")}
    sides = []
    for network in (student, teacher):
        hidden, head = names["hidden_and_head"](network, **models)
        whole = gather_ranks(head.weight.detach(), dist.group.WORLD).flatten(0, 1)[:VOCAB].double()
        sides.append((hidden, whole))
    (hidden, head), (hidden_t, head_t) = sides
    leaves = hidden.detach().double().requires_grad_(), head.requires_grad_()
    flat = {name: weight.flatten() for name, weight in weights.items()}
    settings = {"divergence": "jsd", "temperature": 2.0}
    teacher_logits = hidden_t.detach().double() @ head_t.T
    loss = reference.total_loss(leaves[0] @ leaves[1].T, teacher_logits, inputs["labels"].flatten(), **flat, **settings)
    d_hidden, d_head = torch.autograd.grad(loss, leaves)
    hidden.backward(d_hidden.float())
    student.output_layer.weight.grad = padded(d_head)[rank]
    expected = gradients(student)
    parts = names["distillation_loss"](student, teacher, inputs, vocab_size=VOCAB, **weights, **settings)
    parts.loss.backward()
    torch.testing.assert_close(parts.loss.double(), loss.detach(), rtol=1e-5, atol=0)
    assert_same(gradients(student), expected, f"tp {world_size}")


def padded(d_head):
    """[V, D] in float64 -> every rank's rows [tp, v, D] in float32, 0 where there is no token."""
    whole = torch.zeros(ROWS, WIDTH)
    whole[:VOCAB] = d_head
    return whole.view(dist.get_world_size(), -1, WIDTH)


def test_the_adapter_is_at_most_forty_lines_of_code():
    lines = [line for line in adapter_text().splitlines() if line.strip()]
    assert 20 <= len(lines) <= 40


class OverSequence(torch.nn.Module):
    """A GPTModel under sequence parallelism as the adapter sees it: output_layer gets [s / tp, b, h] of each rank."""

    def __init__(self, part, weight):
        from types import SimpleNamespace

        super().__init__()
        self.config = SimpleNamespace(sequence_parallel=True)
        self.share_embeddings_and_output_weights = False
        self.part, self.output_layer = torch.nn.Parameter(part), torch.nn.Linear(1, 1, bias=False)
        self.output_layer.weight = torch.nn.Parameter(weight)

    def forward(self, input_ids, position_ids, attention_mask):
        return self.output_layer(self.part)[0].transpose(0, 1).contiguous()


@on_cpu
def check_sequence_parallel(rank, world_size):
    """Every rank's gradient of its part of the sequence is that part of the whole gradient, not tp times it."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)
    rng = torch.Generator().manual_seed(4)
    whole = torch.randn(LENGTH, BATCH, WIDTH, generator=rng)
    weight = torch.randn(ROWS, WIDTH, generator=rng)
    steps, rows = LENGTH // world_size, ROWS // world_size
    part = whole[rank * steps : (rank + 1) * steps]
    network = OverSequence(part, weight[rank * rows : (rank + 1) * rows])
    ones, inputs = torch.ones(BATCH, LENGTH), batch()
    arguments = {"vocab_size": VOCAB, "kd_weight": 0 * ones, "ce_weight": ones, "divergence": "forward_kl"}
    parts = adapter()["distillation_loss"](network, network, inputs, **arguments)
    parts.loss.backward()
    leaf = whole.double().requires_grad_()
    logits = leaf.transpose(0, 1).flatten(0, 1) @ weight[:VOCAB].double().T
    reference.cross_entropy(logits, inputs["labels"].flatten()).sum().backward()
    mine = leaf.grad[rank * steps : (rank + 1) * steps]
    torch.testing.assert_close(network.part.grad.double(), mine, rtol=1e-5, atol=1e-5)
    assert "forward" not in vars(network.output_layer)


@pytest.mark.parametrize(("world_size", "tied"), [(1, False), (2, False), (2, True)])
def test_cross_entropy_gradients_equal_those_of_the_model(rank_pool, world_size, tied):
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    rank_pool(world_size).run(check_cross_entropy, tied=tied)


@pytest.mark.parametrize("world_size", [1, 2])
def test_distillation_gradients_equal_float64(rank_pool, world_size):
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    rank_pool(world_size).run(check_distillation)


def test_sequence_parallel_hidden_states_get_the_gradient_of_their_tokens(rank_pool):
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    rank_pool(2).run(check_sequence_parallel)
