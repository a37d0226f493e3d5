"""Documents packed into one row, by every attention implementation on this machine: leaks, memory, kernels.

Two documents share a row of two, in bfloat16 on a GPU. Changing the first must not change any bit of the second, a loss
on the second must have no gradient at the first, and the second must equal its result alone. Peak memory of a forward
and a backward and the names of the attention kernels stand in the last row of each. On the CPU rows are short.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from gpu_common import Setting, attempt, check, guarded, not_checked
from torch import Tensor

from kdtrain.batch import Batch
from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import ConfigError
from kdtrain.models.attention import IMPLEMENTATIONS, PACKED, resolve_attention
from kdtrain.models.backbone import Backbone
from kdtrain.models.load import ModelSpec, load_backbone

VOCAB, ROWS = 999, 2
SIZES = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}
SEQ_LEN, LAYERS, CPU_SEQ_LEN, CPU_LAYERS = 4096, 8, 96, 2
ALONE_BOUND, CPU_ALONE_BOUND = 2e-2, 1e-5
"""Kernels may round differently for a document of another length."""
KERNEL_WORDS = ("fmha", "flash", "attention", "cudnn", "cutlass", "softmax")


def packed(setting: Setting) -> Iterator[dict]:
    """Every implementation's rows, or why it cannot run here."""
    dtype = "float32" if setting.is_cpu else "bfloat16"
    where = {"device_type": setting.device.type, "dtype": dtype}
    chosen, reason = resolve_attention("auto", **where)
    yield not_checked("packed auto", "", f"takes {chosen}: {reason}", "ok")
    for implementation in sorted(IMPLEMENTATIONS, key=lambda name: name != PACKED):  # kdtrain's first
        name = f"packed {implementation}"
        try:
            resolve_attention(implementation, **where)
        except ConfigError as error:
            yield not_checked(name, "", str(error).splitlines()[0])
            continue
        backbone, reason = attempt(lambda wanted=implementation: model_of(setting, wanted, dtype))
        if backbone is None:
            yield not_checked(name, "", reason, "FAIL")
        else:
            failed = partial(not_checked, name, "", verdict="FAIL")
            yield from guarded(examined(setting, name, backbone), failed)


def model_of(setting: Setting, implementation: str, dtype: str) -> Backbone:
    """A random Llama, the same for every implementation."""
    layers, length = (CPU_LAYERS, CPU_SEQ_LEN) if setting.is_cpu else (LAYERS, SEQ_LEN)
    sizes = {"num_hidden_layers": layers, "max_position_embeddings": length, "initializer_range": 0.1}
    config = {"model_type": "llama", "vocab_size": VOCAB, **SIZES, **sizes}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        spec = ModelSpec(architecture=str(path), dtype=dtype, attention=implementation)
        return load_backbone(spec, Mesh(), vocab_size=VOCAB, device=setting.device, trainable=True)


def examined(setting: Setting, name: str, backbone: Backbone) -> Iterator[dict]:
    """The rows of one implementation."""
    length = CPU_SEQ_LEN if setting.is_cpu else SEQ_LEN
    cut, half, shape = length // 3, VOCAB // 2, f"B={ROWS} S={length} documents of {length // 3} and the rest"
    rng = torch.Generator(setting.device).manual_seed(0)
    first = torch.randint(4, half, (ROWS, cut), generator=rng, device=setting.device)
    other = torch.randint(4, half, (ROWS, cut), generator=rng, device=setting.device)
    second = torch.randint(half, VOCAB, (ROWS, length - cut), generator=rng, device=setting.device)
    with torch.no_grad():
        one, two = (hidden(backbone, head, second)[:, cut:] for head in (first, other))
        alone = hidden(backbone, second)
    changed = float((one - two).abs().max())
    yield check(f"{name} leak", shape, changed, 0.0, "of the second document, if the first changes")
    off = float((one.float() - alone.float()).norm() / alone.float().norm())
    yield check(f"{name} alone", shape, off, CPU_ALONE_BOUND if setting.is_cpu else ALONE_BOUND)
    loss = hidden(backbone, first, second)[:, cut:].float().square().sum()
    gradient = torch.autograd.grad(loss, backbone.model.get_input_embeddings().weight)[0]
    yield check(f"{name} gradient", shape, float(gradient[:half].abs().max()), 0.0, "at ids of the first document")
    yield memory_row(setting, name, shape, backbone, (first, second))


def hidden(backbone: Backbone, *documents: Tensor) -> Tensor:
    """[B, S, D] of rows that hold these documents one after the other."""
    ids = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(part.shape[1], device=ids.device) for part in documents]).repeat(len(ids), 1)
    mask = torch.ones(ids.shape, device=ids.device)
    batch = Batch(ids, ids, mask, positions, torch.arange(len(ids), device=ids.device))
    return backbone.hidden_states(batch).view(*ids.shape, -1)


def memory_row(setting: Setting, name: str, shape: str, backbone: Backbone, documents: tuple[Tensor, ...]) -> dict:
    """MiB of a forward and a backward beyond what is held before, and the names of the attention kernels."""

    def step() -> None:
        backbone.zero_grad(set_to_none=True)
        hidden(backbone, *documents).float().sum().backward()

    step()
    peak = setting.peak_bytes(step) / 2**20
    kernels, reason = attempt(lambda: kernels_of(setting, step))  # the profiler needs CUPTI
    return check(f"{name} MiB", shape, peak, float("inf"), f"kernels: {reason if kernels is None else kernels}")


def kernels_of(setting: Setting, step) -> str:
    """Names of the device's attention kernels, shortened; on the CPU none are recorded."""
    if setting.is_cpu:
        return "not recorded on the CPU"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    names = {event.key for event in seen.key_averages() if any(word in event.key.lower() for word in KERNEL_WORDS)}
    return "; ".join(sorted(name[:70] for name in names)[:6])
