"""One rank of benchmarks/bench_memory.py: steps of a run without a teacher, with every live tensor attributed to a
part.

Tensors are counted as operations make them (`tests.support.live_bytes`) and attributed to the part named by the Python
frames of the operation. The engine's tensors are attributed by kind once it is built. A parameter's gradient is
attributed once backward has accumulated it. All other tensors are activations or gradients of activations.
"""

from __future__ import annotations

import gc
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import measuring as common
from step_rank import configuration, device_name, random_inputs
from torch import Tensor, UntypedStorage

from tests.support.live_bytes import LiveBytes

PARTS = ("weights", "gathered", "gradients", "optimizer", "buckets", "step", "activations", "masks", "loss")
BY_FUNCTION = {
    "buckets": ("setup_buckets", "allreduce_bucket", "reduce_scatter_coalesced", "gradient_reduction_w_predivide"),
    "step": (
        *("get_grad_norm_direct", "get_global_norm_of_tensors", "_clip_without_zero", "_single_tensor_adam"),
        *("_prepare_fp32_grad_for_sub_group", "flatten_dense_tensors_aligned"),
    ),
}
BY_FILE = {
    "/zero/partition_parameters.py": "gathered",
    "/zero/partitioned_param_coordinator.py": "gathered",
    "/runtime/zero/stage": "gradients",
    "/runtime/bf16_optimizer.py": "gradients",
    "/torch/optim/": "optimizer",
    "/transformers/masking_utils.py": "masks",
    "/integrations/sdpa_attention.py": "masks",
    "/kdtrain/losses/": "loss",
    "/kdtrain_kernels/": "loss",
}


def part_of_caller(frame: Any) -> str:
    """The part that the innermost frame with a rule names."""
    while frame is not None:
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        for part, functions in BY_FUNCTION.items():
            if name in functions:
                return part
        for piece, part in BY_FILE.items():
            if piece in file:
                return part
        frame = frame.f_back
    return "activations"


class PartBytes(LiveBytes):
    """LiveBytes with the part of each storage.

    at_peak: bytes of each part at the peak of the total. most: peak of each part.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.at_peak: dict[str, int] = {}
        self._part: dict[int, str] = {}
        self._operation = ""

    def file(self, tensor: Tensor, part: str) -> None:
        """Attribute the live storage of `tensor` to `part` from now on."""
        storage = tensor.untyped_storage()
        if id(storage) in self._part:
            self.parts[self._part[id(storage)]] -= storage.nbytes()
            self._put(id(storage), storage.nbytes(), part)

    def file_all(self, part: str) -> None:
        """Attribute everything to `part`."""
        self._part = dict.fromkeys(self._part, part)
        self.parts = Counter({part: self.now})

    def restart(self) -> None:
        """Reset the peaks."""
        self.peak, self.at_peak, self.most = self.now, dict(self.parts), Counter(self.parts)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._operation = str(func)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _put(self, key: int, size: int, part: str) -> None:
        self._part[key] = part
        self.parts[part] += size
        self.most[part] = max(self.most[part], self.parts[part])

    def _count(self, storage: UntypedStorage) -> None:
        if id(storage) in self.known or storage.device.type == "meta":
            return
        attends = "scaled_dot_product" in self._operation  # its results, for any caller; masks passed to it
        part = "activations" if attends else part_of_caller(sys._getframe(2))
        self._put(id(storage), storage.nbytes(), part)
        before = self.peak
        super()._count(storage)
        if self.peak > before:
            self.at_peak = dict(self.parts)

    def _forget(self, key: int, size: int) -> None:
        super()._forget(key, size)
        self.parts[self._part.pop(key)] -= size


def run_configuration(job: dict) -> Any:
    cfg = configuration(job)
    cfg.objective.name = "pretrain"
    if job["bucket"] is not None:
        cfg.zero.extra = {"reduce_bucket_size": job["bucket"]}
    return cfg


def file_engine(live: PartBytes, backbone: Any, engine: Any) -> None:
    """Attribute the tensors of a built engine: master weights, weights, buckets; the rest is for gradients."""
    zero = engine.deepspeed.optimizer
    live.file_all("gradients")
    masters = [param for group in engine.optimizer.param_groups for param in group["params"]]
    for param in masters + list(getattr(zero, "fp32_partitioned_groups_flat", [])):
        live.file(param, "optimizer")
    for param in [getattr(param, "ds_tensor", param) for _, param in backbone.hf_parameters()] + [*backbone.buffers()]:
        live.file(param, "weights")  # at stage 0 they belong to AdamW
    for bucket in getattr(zero, "ipg_buckets", {}).values():
        if isinstance(bucket.buffer, Tensor):
            live.file(bucket.buffer, "buckets")


def steps(job: dict, folder: Path, live: PartBytes) -> dict[str, Any]:
    """Two steps of two micro-batches, as the trainer makes them.

    Sizes, the estimate, and the peaks of the second step, when the optimizer's states exist. Returns after everything
    is freed.
    """
    from kdtrain.distributed.mesh import Mesh
    from kdtrain.engine import bootstrap
    from kdtrain.engine.zero import StudentEngine
    from kdtrain.jobs.build.batches import build_loader
    from kdtrain.jobs.build.models import build_models, engine_settings
    from kdtrain.jobs.build.objective import build_objective
    from kdtrain.training.timing import PhaseTimer

    rank, cfg = bootstrap.start(), run_configuration(job)
    mesh = Mesh.build(job["tp"])
    inputs = random_inputs(folder, job, mesh.is_main)
    gc.collect()
    before = common.reset_peak()
    with live:
        models = build_models(cfg, inputs, mesh, rank.device, trainable=True)
        for _, param in models.student.hf_parameters():
            param.register_post_accumulate_grad_hook(
                lambda p: None if p.grad is None else live.file(p.grad, "gradients")
            )
        engine = StudentEngine(models.student, mesh, engine_settings(cfg), device=rank.device)
        gc.collect()
        file_engine(live, models.student, engine)
        timer = PhaseTimer(rank.device)
        objective = build_objective(cfg, engine, models, timer)
        loader = build_loader(cfg, inputs, mesh)
        for number in range(2):
            if number == 1:
                gc.collect()
                live.restart()
                common.reset_peak()
            batches = next(loader)
            objective.prefetch(batches)
            for batch in batches:
                loss = objective(batch).loss_sum
                engine.backward(loss, float(job["seq_len"] * job["sequences"]))
                del loss
            engine.step(1e-4)
            del batches, batch
    resident = common.memory("VmHWM") - before
    loader.close()
    engine.close()
    return {
        "device": device_name(rank.device),
        "attention": models.student.config._attn_implementation,
        "resident_bytes": resident,
        "peak_bytes": live.peak,
        "at_peak": {part: live.at_peak.get(part, 0) for part in PARTS},
        "most": {part: live.most[part] for part in PARTS},
        **estimated(cfg, models, mesh.dp_size),
    }


def estimated(cfg: Any, models: Any, dp_size: int) -> dict[str, Any]:
    """The estimate of the same run."""
    from kdtrain.jobs.header import memory_inputs
    from kdtrain.planning.estimate import ModelSize, estimate_memory

    info, shard = models.student.info(), models.student.shard
    size = ModelSize(
        info.num_parameters,
        info.config.hidden_size,
        info.config.num_hidden_layers,
        shard.vocab_size,
        num_heads=info.config.num_attention_heads,
        inner_width=info.config.intermediate_size,
    )
    attention = info.config._attn_implementation
    inputs = memory_inputs(cfg)
    found = estimate_memory(inputs, size, None, dp_size=dp_size, on_cuda=False, student_attention=attention)
    return {"parameters": info.num_parameters, "parts": found.parts, "estimate_bytes": found.total}


def measure(job: dict) -> dict:
    """One job on this rank. A tiny job runs first, so that one-time allocations of libraries are not counted."""
    folder = Path(job["folder"])
    student = folder / f"student_of_{job['rank']}.json"
    student.write_text(json.dumps(job["student"]))
    (folder / "toy").mkdir(exist_ok=True)
    job = {**job, "student": str(student)}
    toy = {**job, "seq_len": 16, "sequences": 2 * job["ranks"], "micro": 1, "bucket": None}
    steps(toy, folder / "toy", PartBytes())
    gc.collect()
    touches_pages()
    return steps(job, folder, PartBytes())


def touches_pages(size: int = 1 << 26) -> None:
    """RuntimeError unless memory that is allocated and never written becomes resident, as MALLOC_PERTURB_ has it."""
    import torch

    before = common.memory("VmRSS")
    untouched = torch.empty(size, dtype=torch.uint8)
    grown = common.memory("VmRSS") - before
    del untouched
    if grown < 0.9 * size:
        raise RuntimeError(f"{size:,} allocated bytes made {grown:,} resident; MALLOC_PERTURB_ needs glibc")
