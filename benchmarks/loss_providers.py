"""Losses of one language-model head by several implementations, under one signature, for the benchmarks.

A provider computes one task's sum over tokens from (hidden_s [T, D], head_s [V, D], hidden_t [T, E], head_t [V, E],
labels [T]) at temperature 1; gradients of the first two are what is timed. Tasks:

kl_ce   forward KL plus cross-entropy
kl      forward KL
jsd     Jensen-Shannon divergence with equal shares, as `losses.reference.jsd` normalises it
ce      cross-entropy; the teacher is not read

Peers are called as their packages provide them, never copied. Where they return a mean or another multiple, a factor
converts it to the sum. One that cannot run is reported with the reason. `exact_value` False: the peer omits the
teacher's entropy, a constant, so only its gradients are compared.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kdtrain.distributed.vocab import VocabShard
from kdtrain.losses import linear_cross_entropy, linear_kd_loss, reference

TASKS = ("kl_ce", "kl", "jsd", "ce")
CHUNKS = 8


@dataclass(frozen=True, slots=True)
class Provider:
    """needs: modules to import; packages: whose versions to report; device: cuda, cpu or any.

    is_compiled: whether it uses torch.compile, which takes half a minute on the first call. note: a caveat on its
    numbers.
    """

    name: str
    task: str
    loss: Callable[..., Tensor]
    needs: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    device: str = "any"
    exact_value: bool = True
    is_compiled: bool = False
    note: str = ""

    def absent(self, device: str) -> str:
        """The reason why it cannot run on `device`, in one line; empty if it can."""
        if self.device not in ("any", device):
            return f"needs {self.device}"
        for name in self.needs:
            try:
                importlib.import_module(name)
            except (ImportError, RuntimeError) as error:
                return " ".join(f"{type(error).__name__}: {error}".split())
        return ""

    def versions(self) -> str:
        """Python, torch and the provider's packages."""
        packages = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", *self.packages))
        return f"python {platform.python_version()} {packages}"


def streamed(task: str, slab_bytes: int, backend: str = "auto") -> Callable[..., Tensor]:
    """kdtrain's loss of a task."""

    def loss(hidden_s, head_s, hidden_t, head_t, labels):
        shard, ones = VocabShard.of(len(head_s), multiple=1), torch.ones(len(labels), device=labels.device)
        if task == "ce":
            return linear_cross_entropy(
                hidden_s, head_s, labels, weight=ones, shard=shard, slab_bytes=slab_bytes, backend=backend
            ).loss
        return linear_kd_loss(
            hidden_s,
            head_s,
            hidden_t,
            head_t,
            labels,
            divergence="jsd" if task == "jsd" else "forward_kl",
            kd_weight=ones,
            ce_weight=ones if task == "kl_ce" else 0 * ones,
            shard=shard,
            slab_bytes=slab_bytes,
            backend=backend,
        ).loss

    return loss


def naive(task: str) -> Callable[..., Tensor]:
    """Both models' [T, V] logits in float32 and autograd, written without needless copies."""

    def loss(hidden_s, head_s, hidden_t, head_t, labels):
        log_q = F.log_softmax((hidden_s @ head_s.T).float(), -1)
        if task == "ce":
            return F.nll_loss(log_q, labels, reduction="sum")
        with torch.no_grad():
            log_p = F.log_softmax((hidden_t @ head_t.T).float(), -1)
        if task == "jsd":
            log_m = torch.logaddexp(log_q, log_p) - math.log(2)
            parts = [F.kl_div(log_m, x, reduction="sum", log_target=True) for x in (log_p, log_q)]
            return 2 * (parts[0] + parts[1])
        kl = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        return kl + F.nll_loss(log_q, labels, reduction="sum") if task == "kl_ce" else kl

    return loss


def chunked(task: str) -> Callable[..., Tensor]:
    """The naive formula on eighths of the tokens in turn, summed, one backward, as trainers chunk in torch."""
    whole = naive(task)

    def loss(hidden_s, head_s, hidden_t, head_t, labels):
        parts = zip(hidden_s.chunk(CHUNKS), hidden_t.chunk(CHUNKS), labels.chunk(CHUNKS), strict=True)
        return sum(whole(h_s, head_s, h_t, head_t, label) for h_s, h_t, label in parts)

    return loss


def compiled(task: str) -> Callable[..., Tensor]:
    """torch.compile of the naive formula."""
    return torch.compile(naive(task))


def torchtune_kl(hidden_s, head_s, hidden_t, head_t, labels):
    """torchtune's chunked forward KL on lists of logits; a mean over tokens, without the teacher's entropy."""
    from torchtune.modules.loss import ForwardKLWithChunkedOutputLoss

    student = [part[None] @ head_s.T for part in hidden_s.chunk(CHUNKS)]
    with torch.no_grad():
        teacher = [part[None] @ head_t.T for part in hidden_t.chunk(CHUNKS)]
    return ForwardKLWithChunkedOutputLoss(CHUNKS)(student, teacher, labels[None]) * len(labels)


def modelopt_kl(hidden_s, head_s, hidden_t, head_t, labels):
    """nvidia-modelopt's LogitsKLLoss at tp 1."""
    from types import SimpleNamespace

    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    config = SimpleNamespace(tensor_model_parallel_size=1, sequence_parallel=False)
    with torch.no_grad():
        teacher = hidden_t @ head_t.T
    return LogitsKLLoss(config)((hidden_s @ head_s.T)[:, None], teacher[:, None])[0].sum()


def trl_jsd(hidden_s, head_s, hidden_t, head_t, labels):
    """TRL's GKD formula with beta 0.5, a quarter of the reference's normalisation."""
    from trl.experimental.gkd import GKDTrainer

    with torch.no_grad():
        teacher = hidden_t @ head_t.T
    return 4 * GKDTrainer.generalized_jsd_loss(hidden_s @ head_s.T, teacher, beta=0.5, reduction="sum")


def liger_jsd(hidden_s, head_s, hidden_t, head_t, labels):
    """Liger's fused linear JSD (Triton): a mean over tokens, a quarter of the reference's normalisation."""
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    return 4 * len(labels) * liger_fused_linear_jsd(hidden_s, head_s, hidden_t, head_t, labels, jsd_beta=0.5)


def liger_kl(hidden_s, head_s, hidden_t, head_t, labels):
    """The same with beta 0, which is forward KL."""
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    return len(labels) * liger_fused_linear_jsd(hidden_s, head_s, hidden_t, head_t, labels, jsd_beta=0.0)


def liger_chunked_jsd(hidden_s, head_s, hidden_t, head_t, labels):
    """Liger's chunked JSD (torch.compile, chunks of 1024 tokens), soft loss only."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)
    found = loss(hidden_s, head_s, hidden_t, head_t, labels)
    return 4 * len(labels) * (found[0] if isinstance(found, tuple) else found)


def liger_ce(hidden_s, head_s, hidden_t, head_t, labels):
    """Liger's fused linear cross-entropy (Triton)."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden_s, head_s, labels, reduction="sum")


def torch_ce(hidden_s, head_s, hidden_t, head_t, labels):
    """torch's own F.linear_cross_entropy, in chunks; without options (the default) it would form all logits."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden_s, head_s, labels, reduction="sum", options=options)


def cut_ce(impl: str) -> Callable[..., Tensor]:
    """Apple's cut cross-entropy; impl cce filters gradients by default, torch_compile runs anywhere."""

    def loss(hidden_s, head_s, hidden_t, head_t, labels):
        from cut_cross_entropy import linear_cross_entropy as cut

        return cut(hidden_s, head_s, labels, reduction="sum", impl=impl)

    return loss


_LIGER = {"packages": ("liger-kernel",)}
_PEERS = (
    Provider("torchtune", "kl", torchtune_kl, ("torchtune.modules.loss",), ("torchtune",), exact_value=False),
    Provider("modelopt", "kl", modelopt_kl, ("modelopt.torch.distill.plugins.megatron",), ("nvidia-modelopt",)),
    Provider("liger", "kl", liger_kl, ("liger_kernel.transformers.functional",), device="cuda", **_LIGER),
    Provider("trl", "jsd", trl_jsd, ("trl.experimental.gkd",), ("trl",)),
    Provider("liger-chunked", "jsd", liger_chunked_jsd, ("liger_kernel.chunked_loss",), is_compiled=True, **_LIGER),
    Provider("liger", "jsd", liger_jsd, ("liger_kernel.transformers.functional",), device="cuda", **_LIGER),
    Provider(
        "torch-linear-ce",
        "ce",
        torch_ce,
        ("torch.nn.modules.linear_cross_entropy_options",),
        note="no oracle in bfloat16: in torch 2.13.0 the chunked sum is 1 to 10 % off, the head's gradient up to 2 %",
    ),
    Provider(
        "cut-ce-compile",
        "ce",
        cut_ce("torch_compile"),
        ("cut_cross_entropy",),
        ("cut-cross-entropy",),
        is_compiled=True,
    ),
    Provider("cut-ce", "ce", cut_ce("cce"), ("cut_cross_entropy",), ("cut-cross-entropy",), device="cuda"),
    Provider("liger", "ce", liger_ce, ("liger_kernel.transformers.functional",), device="cuda", **_LIGER),
)
SLABS = {"128MiB": 1 << 27, "1GiB": 1 << 30, "5GiB": 5 << 30}


def providers(task: str) -> list[Provider]:
    """kdtrain's with every slab size, the naive formula in three forms, then the task's peers."""
    if task not in TASKS:
        raise ValueError(f"task = {task!r}, need one of {', '.join(TASKS)}")
    ours = [Provider(f"streamed-{name}", task, streamed(task, size)) for name, size in SLABS.items()]
    forms = [("naive", naive), ("chunked", chunked), ("compiled", compiled)]
    return [
        *ours,
        *(Provider(name, task, form(task), is_compiled=name == "compiled") for name, form in forms),
        *(p for p in _PEERS if p.task == task),
    ]


def find(task: str, name: str) -> Provider:
    """One provider of a task. KeyError lists the available ones."""
    named = {provider.name: provider for provider in providers(task)}
    if name not in named:
        raise KeyError(f"no provider {name!r} of {task}; there are {', '.join(named)}")
    return named[name]


def float64_answer(task: str, tensors: tuple[Tensor, ...], chunk: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, d hidden_s, d head_s) in float64 by `losses.reference` and autograd, `chunk` tokens at a time."""
    hidden_s, head_s, hidden_t, head_t, labels = (x.detach() for x in tensors)
    head = head_s.double().requires_grad_()
    teacher_head = head_t.double()
    total, gradients = torch.zeros((), dtype=torch.float64, device=head.device), []
    grad_head = torch.zeros_like(head, requires_grad=False)
    for rows in range(0, len(labels), chunk):
        part = slice(rows, rows + chunk)
        hidden = hidden_s[part].double().requires_grad_()
        student, teacher = hidden @ head.T, hidden_t[part].double() @ teacher_head.T
        loss = torch.zeros((), dtype=torch.float64, device=head.device)
        if task != "ce":
            loss = loss + reference.DIVERGENCES["jsd" if task == "jsd" else "forward_kl"](student, teacher).sum()
        if task in ("ce", "kl_ce"):
            loss = loss + reference.cross_entropy(student, labels[part]).sum()
        grad_hidden, grad = torch.autograd.grad(loss, (hidden, head))
        grad_head += grad
        gradients.append(grad_hidden)
        total += loss.detach()
    return total, torch.cat(gradients), grad_head


def errors_of(
    provider: Provider, loss: Tensor, gradients: list[Tensor], expected: tuple[Tensor, Tensor, Tensor]
) -> dict[str, float]:
    """Relative errors of the value (0 where it is not comparable) and, worst of those given, of the gradients."""
    value = float((loss.detach().double() - expected[0]).abs() / expected[0].abs()) if provider.exact_value else 0.0
    pairs = zip(gradients, expected[1:], strict=True)
    worst = [float((got.double() - want).norm() / want.norm()) for got, want in pairs]
    return {"value_error": value, "gradient_error": max(worst, default=0.0)}
