"""Every causal language model in transformers, sharded over two ranks, against the stock model in one process.

    python proofs/architectures.py           # a few minutes -> docs/results/architectures.md, and prints it
    python proofs/architectures.py --match phi     # only model types that contain it; writes nothing

A tiny random copy of each model type's default config (2 layers, 4 heads in 2 key/value groups where it has groups,
299 tokens) goes through kdtrain's own `load_backbone` at tp 2. Compared with the stock class, run whole by
transformers: hidden states, the summed cross-entropy, and every parameter's gradient, gathered from the ranks. Errors
are relative, in the 2-norm; a gradient smaller than a hundredth of the whole gradient is measured against that
hundredth, because some (the bias of keys) are zero but for rounding. Norms, biases and other vectors are moved away
from ones and zeros. A copy that amplifies rounding is equal if its error is at most three times what the stock class
alone shows when each of its weights is changed by one unit in the last place. `architecture_documents.py` measures
which attention implementations separate packed documents.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import json
import logging
import math
import re
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import measuring as common
from architecture_documents import NOT_MEASURED, Apart, documents_apart
from architecture_table import EQUAL, FAILED, REFUSED, TOLERANCE, Row, counts_of, table_of

TABLE = common.ROOT / "docs/results/architectures.md"
COMMAND = "make architectures"
VOCAB, SEQUENCES, SEQ_LEN, SEED = 299, 2, 13, 5
MOST_ROUNDING, TIMEOUT_S = 1e-3, 90.0
PRELOAD = ("torch", "transformers.models.llama.modeling_llama", "kdtrain.models.load")

HINTS: dict[str, dict[str, Any]] = {
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "phi4_multimodal": {
        "vision_config": {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2},
        "audio_config": {"num_blocks": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"per_layer_config": None},
    "gemma4_unified_text": {"per_layer_config": None},
}
"""Settings without which no tiny copy of a default config can be built."""

PRETRAINED_ONLY = ("cwm", "modernbert-decoder")
"""Configs that require ids of special tokens, which a random architecture lacks."""

EXPERTS, ALONE, UNBUILT = "mixture of experts", "refused at tp 1 too", "no tiny copy"


def known_types() -> dict[str, str]:
    """model_type -> class, of everything AutoModelForCausalLM can build."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()))


def tiny_copies(model_type: str) -> list[dict[str, Any]]:
    """config.json contents to try, the smallest first."""
    from transformers import AutoConfig

    from kdtrain.models.shrink import FULL_WIDTH, tiny_settings

    default = AutoConfig.for_model(model_type)
    for key, value in HINTS.get(model_type, {}).items():
        setattr(default, key, value)
    copies = []
    for what, settings in tiny_settings(default, 2):
        if what == FULL_WIDTH:
            continue
        quiet = {key: 0.0 for key, value in settings.items() if is_dropout(key) and value}
        tokens = {key: VOCAB for key in settings if "vocab_size" in key and isinstance(settings[key], int)}
        copies.append({**settings, **quiet, **tokens, "model_type": model_type, "vocab_size": VOCAB})
    return copies


def documents_of(model_type: str) -> Apart:
    """Which attention keeps its packed documents apart."""
    try:
        copies = tiny_copies(model_type)
    except build_errors() as error:
        return Apart(NOT_MEASURED, f"packed documents: {UNBUILT}: {first_line(error)}")
    return documents_apart(model_type, copies)


def is_dropout(key: str) -> bool:
    return key.endswith(("dropout", "pdrop", "drop_rate", "dropout_prob", "layerdrop"))


def first_line(error: BaseException | str) -> str:
    """The first line of a message without the path of the copy, which differs in every run."""
    text = re.sub(r"^(architecture|model) '[^']*': ", "", str(error))
    return text.splitlines()[0].replace("|", "/")[:200] if text else type(error).__name__


def write_copy(folder: Path, model_type: str) -> tuple[Path | None, str]:
    """(config.json of the first tiny copy that kdtrain can load whole, ""), or (None, why there is none)."""
    from kdtrain.distributed.mesh import Mesh
    from kdtrain.errors import KdtrainError

    reasons = []
    try:
        copies = tiny_copies(model_type)
    except build_errors() as error:
        return None, f"{UNBUILT}: {first_line(error)}"
    for number, settings in enumerate(copies):
        path = folder / f"{model_type}_{number}.json"
        path.write_text(json.dumps(settings))
        try:
            path = with_weights(path, settings) if model_type in PRETRAINED_ONLY else path
            load(path, Mesh())
        except KdtrainError as error:
            text = first_line(error).replace(str(path), model_type)
            reasons.append(f"{EXPERTS if 'mixture of experts' in str(error) else ALONE}: {text}")
        except build_errors() as error:
            reasons.append(f"{UNBUILT}: {type(error).__name__}: {first_line(error)}")
        else:
            return path, ""
    return None, reasons[-1] if reasons else f"{UNBUILT}: its config has no width"


def with_weights(path: Path, settings: dict[str, Any]) -> Path:
    """A folder with a pretrained model of these settings, of random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**settings)
    torch.manual_seed(SEED)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path.with_suffix(""))
    return path.with_suffix("")


def spec_of(path: Path) -> Any:
    """The ModelSpec of a config.json, or of a folder with weights."""
    from kdtrain.models.load import ModelSpec

    return ModelSpec(**{"weights" if path.is_dir() else "architecture": str(path)}, dtype="float32", seed=SEED)


def build_errors() -> tuple[type[Exception], ...]:
    from kdtrain.models.probe import BUILD_ERRORS

    return (*BUILD_ERRORS, OSError)


def load(path: Path, mesh: Any) -> Any:
    """The Backbone of a copy, the same numbers in every layout, its vectors moved away from ones and zeros."""
    import torch

    from kdtrain.models.load import load_backbone
    from kdtrain.parallel.shard_tensors import split_tensor

    backbone = load_backbone(spec_of(path), mesh, vocab_size=VOCAB, trainable=True, packed=False)
    shapes = backbone.full_shapes()
    with torch.no_grad():
        for number, (name, param) in enumerate(backbone.hf_parameters()):
            generator = torch.Generator().manual_seed(number)
            more = torch.randn(shapes[name], generator=generator) * (0.3 if len(shapes[name]) == 1 else 0.05)
            param += split_tensor(more, backbone.cuts.get(name), mesh.tp_rank)
    return backbone


def has_plan(path: Path) -> bool:
    """Whether transformers plans the cut of this model, more of it than embedding and head."""
    from transformers import AutoModelForCausalLM

    from kdtrain.models.load import build_config
    from kdtrain.models.stock import parameters_on_meta

    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(build_config(spec_of(path), VOCAB))
    outside = {"lm_head", "embed_tokens", "embed_in", "embed_out"}
    return bool({key.rpartition(".")[2] for key in model.tp_plan} - outside)


def batch_of() -> Any:
    import torch

    from kdtrain.batch import Batch

    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(4, VOCAB, (SEQUENCES, SEQ_LEN + 1), generator=generator)
    positions = torch.arange(SEQ_LEN).expand(SEQUENCES, -1).clone()
    mask = torch.ones(SEQUENCES, SEQ_LEN)
    mask[0, 4] = 0
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, positions, torch.arange(SEQUENCES))


def run_stock(path: Path, *, jitter: bool = False) -> dict[str, Any]:
    """Hidden states, loss and gradients of the stock class, given the numbers of `load` at tp 1.

    jitter: every weight moved up or down by 2^-23 of itself.
    """
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    from kdtrain.distributed.mesh import Mesh
    from kdtrain.models.probe import base_attention

    backbone = load(path, Mesh())
    attention = base_attention(backbone.model)
    model = AutoModelForCausalLM.from_config(backbone.config, attn_implementation=attention, dtype=torch.float32)
    mine = dict(backbone.hf_parameters())
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(mine[name][tuple(slice(size) for size in param.shape)])
            if jitter:
                param *= 1 + torch.randn_like(param).sign() * 2.0**-23
    model.train()
    batch = batch_of()
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    with torch.no_grad():
        hidden = model.base_model(**inputs).last_hidden_state.flatten(0, 1).numpy()
    losses = F.cross_entropy(model(**inputs).logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
    loss = (losses * batch.loss_mask.flatten()).sum()
    loss.backward()
    grads = {name: param.grad.numpy() for name, param in model.named_parameters() if param.grad is not None}
    return {"hidden": hidden, "loss": float(loss.detach()), "grads": grads}


def run_cut(rank: int, world_size: int, path: str) -> dict[str, Any]:
    """On every rank: the results of `run_stock`, with this rank's part of each gradient."""
    from kdtrain.distributed.mesh import Mesh
    from kdtrain.losses import linear_cross_entropy

    mesh = Mesh.build(world_size)
    try:
        backbone = load(Path(path), mesh)
        batch = batch_of()
        hidden = backbone.hidden_states(batch)
        parts = linear_cross_entropy(
            hidden,
            backbone.lm_head_shard,
            batch.labels.flatten(),
            weight=batch.loss_mask.flatten(),
            shard=backbone.shard,
            group=mesh.tp_group,
        )
        parts.loss.backward()
    except build_errors() as error:
        return {"failure": f"{type(error).__name__}: {first_line(error)}"}
    grads = {name: param.grad.numpy() for name, param in backbone.hf_parameters() if param.grad is not None}
    return {"hidden": hidden.detach().numpy(), "loss": float(parts.loss.detach()), "grads": grads}


def errors_of(stock: dict[str, Any], cuts: dict[str, Any], answers: list[dict[str, Any]]) -> dict[str, float]:
    """Relative error of hidden states, loss and each gradient, the worst rank's."""
    import numpy as np
    import torch

    from kdtrain.parallel.shard_tensors import merge_state_dict

    norm = np.linalg.norm
    found = {"loss": max(abs(answer["loss"] / stock["loss"] - 1) for answer in answers)}
    found["hidden states"] = max(
        float(norm(answer["hidden"] - stock["hidden"]) / norm(stock["hidden"])) for answer in answers
    )
    total = math.sqrt(sum(float(norm(grad)) ** 2 for grad in stock["grads"].values()))
    states = [{name: torch.from_numpy(grad) for name, grad in answer["grads"].items()} for answer in answers]
    for name in states[0]:
        if name not in cuts and any(not torch.equal(state[name], states[0][name]) for state in states):
            found[f"{name} (ranks disagree)"] = math.inf
    merged = merge_state_dict(states, cuts)
    for name in sorted(set(merged) ^ set(stock["grads"])):
        found[f"{name} (one side has no gradient)"] = math.inf
    for name in set(merged) & set(stock["grads"]):
        want = stock["grads"][name]
        got = merged[name].numpy()[tuple(slice(size) for size in want.shape)]
        found[name] = float(norm(got - want)) / max(float(norm(want)), total / 100)
    return {name: math.inf if math.isnan(error) else error for name, error in found.items()}


class Sweep:
    """A pool of two ranks and a folder for configs; continues after a case that kills its ranks."""

    def __init__(self, folder: Path, pool: Any = None) -> None:
        from kdtrain.testing.ranks import RankPool

        self.folder = folder
        self.pool = pool or RankPool(2, preload=PRELOAD)

    def row(self, model_type: str, name: str) -> Row:
        """Measure one model type."""
        return replace(self.two_ranks(model_type, name), apart=documents_of(model_type))

    def two_ranks(self, model_type: str, name: str) -> Row:
        """The same without its packed documents."""
        path, why = write_copy(self.folder, model_type)
        if path is None:
            return Row(model_type, name, None, *why.split(": ", 1))
        return self.measure(path, model_type, name)

    def measure(self, path: Path, model_type: str, name: str) -> Row:
        """Measure a copy on the ranks, unless it is refused at load."""
        from kdtrain.distributed.mesh import Mesh
        from kdtrain.errors import KdtrainError

        planned = has_plan(path)
        try:
            cuts = load(path, Mesh(2, 0, 2)).cuts
        except KdtrainError as error:
            return Row(model_type, name, planned, REFUSED, first_line(error))
        except build_errors() as error:
            return Row(model_type, name, planned, FAILED, f"{type(error).__name__}: {first_line(error)}")
        try:
            answers = self.pool.run(run_cut, timeout_s=TIMEOUT_S, path=str(path))
        except (AssertionError, TimeoutError) as error:
            return Row(model_type, name, planned, FAILED, first_line(error))
        failures = [answer["failure"] for answer in answers if "failure" in answer]
        if failures:
            return Row(model_type, name, planned, FAILED, failures[0])
        stock = run_stock(path)
        errors = errors_of(stock, cuts, answers)
        worst = max(errors, key=lambda key: errors[key])
        if errors[worst] <= TOLERANCE:
            return Row(model_type, name, planned, EQUAL, "", errors[worst])
        rounding = max(errors_of(stock, {}, [run_stock(path, jitter=True)]).values())
        detail = f"worst: {worst}; weights off by one unit in the last place give {rounding:.1e}"
        verdict = EQUAL if errors[worst] <= 3 * rounding < MOST_ROUNDING else FAILED
        return Row(model_type, name, planned, verdict, detail, errors[worst])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--match", metavar="TEXT", help="only model types that contain TEXT; writes nothing")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    started, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="architectures_") as folder:
        sweep = Sweep(Path(folder))
        for model_type, name in known_types().items():
            if (arguments.match or "") in model_type:
                rows.append(sweep.row(model_type, name))
                print(rows[-1].line(), flush=True)
        sweep.pool.close()
    if not arguments.match:
        common.write_whole(TABLE, table_of(rows, COMMAND))
    print(*counts_of(rows), f"{time.monotonic() - started:.0f} s", sep="\n")
    return int(any(row.result == FAILED for row in rows))


if __name__ == "__main__":
    sys.exit(main())
