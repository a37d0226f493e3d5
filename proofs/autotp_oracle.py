"""One step of an untied Llama under DeepSpeed's own tensor parallelism (AutoTP), as a second opinion.

Its process group is global in a process, so it needs ranks of its own. It cuts a stock Hugging Face model inside
deepspeed.initialize; the loss here is torch's cross-entropy on the logits the model returns. Used by proofs/layouts.py,
whose table shows how far it and kdtrain are from plain torch and from each other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FAMILY = "llama_untied"


def run_step(rank: int, world_size: int, folder: str, weights: str) -> tuple[float, dict[str, Any]]:
    """On every rank: (loss, each parameter's gradient, gathered) of step 1 with `weights`, a file of full tensors.

    The gradients are those before clipping, by Hugging Face name; rows beyond the vocabulary stay.
    """
    import torch
    import torch.nn.functional as F

    from kdtrain.engine import bootstrap
    from tests.support.layout_steps import VOCAB, step_batch

    bootstrap.start()
    full = torch.load(weights, weights_only=True)
    engine = build_engine(Path(folder) / f"{FAMILY}.json", full, world_size)
    batch = step_batch(1)
    output = engine(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    logits = output.logits.flatten(0, 1)[:, :VOCAB]
    losses = F.cross_entropy(logits, batch.labels.flatten(), reduction="none")
    loss = (losses * batch.loss_mask.flatten()).sum() / batch.loss_mask.sum()
    engine.backward(loss)
    pieces = dict(engine.module.named_parameters())
    if all(p.shape == full[name].shape for name, p in pieces.items()):
        raise AssertionError("AutoTP has sharded nothing, so this tests nothing")
    gradients = {name: gathered(p.grad, full[name].shape) for name, p in pieces.items()}
    return loss.item(), gradients if rank == 0 else {}


def build_engine(config_file: Path, full: dict[str, Any], tp: int) -> Any:
    import deepspeed
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = json.loads(config_file.read_text()) | {"vocab_size": full["lm_head.weight"].shape[0]}
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    model.load_state_dict(full)
    return deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 0},
            "tensor_parallel": {"autotp_size": tp},
        },
        dist_init_required=False,
    )[0]


def gathered(gradient: Any, shape: Any) -> Any:
    """The full gradient from every rank's piece, which lacks part of one dimension, or of none."""
    import torch
    import torch.distributed as dist

    pieces = [None] * dist.get_world_size()
    dist.all_gather_object(pieces, gradient)
    cut = [dim for dim, size in enumerate(gradient.shape) if size != shape[dim]]
    if not cut:
        if any(not torch.equal(piece, pieces[0]) for piece in pieces):
            raise AssertionError("ranks disagree about the gradient of a replicated parameter")
        return pieces[0]
    return torch.cat(pieces, dim=cut[0])


def compare(folder: Path, want: Any) -> list[str]:
    """Markdown: AutoTP and kdtrain on two ranks, against plain torch (`want`) and against each other."""
    import layouts
    import torch

    from kdtrain.distributed.mesh import Mesh
    from kdtrain.engine.slices import CheckpointReader
    from kdtrain.testing.ranks import RankPool
    from tests.support.layout_steps import MAX_NORM, Case, build_backbone

    weights = folder / "autotp_weights.pt"
    backbone = build_backbone(folder, FAMILY, Mesh())
    torch.save({name: p.detach().clone() for name, p in backbone.hf_parameters()}, weights)
    pool = RankPool(2, fresh=True)
    try:
        (loss, raw), _ = pool.run(run_step, timeout_s=layouts.TIMEOUT_S, folder=str(folder), weights=str(weights))
    finally:
        pool.close()
    norm = float(torch.stack([g.norm() for g in raw.values()]).norm())
    autotp = {name: g * min(1.0, MAX_NORM / (norm + 1e-6)) for name, g in raw.items()}
    case = Case(FAMILY, 2, 1, (8, 8, 8))
    ((answers, problem),) = layouts.run_group(2, [case], folder)
    if answers is None:
        raise SystemExit(problem)
    our_loss, our_norm = answers[0][0][0]
    with CheckpointReader(folder / case.name / "step_000001") as reader:
        ours = {name: reader.read_full(name, "exp_avg") / (1 - 0.9) for name in reader.names()}

    def worst(a: dict[str, Any], b: dict[str, Any]) -> str:
        errors = []
        for name, mine in ours.items():
            rows = len(mine)
            errors.append(float((a[name][:rows] - b[name][:rows]).norm() / want.grads[name][:rows].norm()))
        return f"{float(torch.tensor(errors).max()):.1e}"  # unlike max(), of NaN too

    (plain_loss, plain_norm) = want.steps[0]
    return [
        "| one step of an untied Llama | loss | gradient norm | gradient error to plain torch | to kdtrain |",
        "| --- | ---: | ---: | ---: | ---: |",
        f"| plain torch, 1 process | {plain_loss:.6f} | {plain_norm:.6f} | 0 | {worst(want.grads, ours)} |",
        f"| kdtrain, tp 2, ZeRO 1 | {our_loss:.6f} | {our_norm:.6f} | {worst(ours, want.grads)} | 0 |",
        f"| DeepSpeed AutoTP 2, ZeRO 0 | {loss:.6f} | {norm:.6f} | {worst(autotp, want.grads)} "
        f"| {worst(autotp, ours)} |",
    ]
