"""A tokenizer that puts <bos> before a text, and tiny models trained to need it or to be disturbed by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import processors
from torch import Tensor

from kdtrain.batch import Batch
from kdtrain.data.token_store import TokenStore
from kdtrain.data.tokenizer import load_tokenizer
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import HeadShard
from kdtrain.losses import linear_cross_entropy
from kdtrain.losses.types import LossParts
from kdtrain.models.backbone import call_with_head
from kdtrain.models.load import ModelSpec, load_backbone
from kdtrain.models.tiny import save_random, tiny_config
from tests.support.tiny_data import write_store, write_tokenizer

BOS, EOS = 257, 258
VOCAB = 259
LETTERS = 16
"""Documents count through tokens 1 to LETTERS cyclically."""


def write_bos_tokenizer(folder: Path) -> Path:
    """The byte-level tokenizer with <bos> and <eos>, which begins every text with <bos>."""
    write_tokenizer(folder, more=["<bos>", "<eos>"], eos="<|endoftext|>")
    tokenizer = load_tokenizer(folder)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_counting_store(folder: Path, tokenizer: Path, *, count: int = 200, seed: int = 0) -> TokenStore:
    """Documents of 30 to 60 tokens that count upwards from anywhere, each with its <bos>."""
    random = np.random.default_rng(seed)
    documents = [1 + (np.arange(random.integers(30, 61)) + random.integers(LETTERS)) % LETTERS for _ in range(count)]
    return write_store(folder, [document.tolist() for document in documents], tokenizer, prefix=(BOS,))


def train_model(folder: Path, config: dict[str, Any], *, needs_bos: bool, steps: int = 40) -> Path:
    """Write a Hugging Face folder with a model that continues counting after a <bos> and predicts <eos> without one, or
    the opposite unless needs_bos. folder: already holds the tokenizer."""
    save_random(folder, {**config, "vocab_size": VOCAB})
    spec = ModelSpec(weights=str(folder), dtype="float32", attention="sdpa")
    backbone = load_backbone(spec, Mesh(), vocab_size=VOCAB, trainable=True)
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        batch = _lesson(generator, needs_bos)

        def head_fn(hidden: Tensor, head: HeadShard, batch: Batch = batch) -> LossParts:
            weight, labels = batch.loss_mask.reshape(-1), batch.labels.reshape(-1)
            return linear_cross_entropy(
                hidden, head, labels, weight=weight, shard=backbone.shard, group=None, slab_bytes=1 << 24
            )

        loss = call_with_head(backbone, batch, head_fn).loss / batch.loss_mask.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    shapes = backbone.full_shapes()
    tensors = {name: p.detach()[: shapes[name][0]].clone() for name, p in backbone.hf_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_bos_run(folder: Path) -> Path:
    """Write folder/run.yaml and all files it names; the teacher needs <bos>. A second one, folder/disturbed, predicts
    worse with it."""
    for name in ("needs", "disturbed"):
        train_model(write_bos_tokenizer(folder / name), tiny_config("qwen3"), needs_bos=name == "needs")
    write_counting_store(folder / "store", folder / "needs")
    write_counting_store(folder / "validation", folder / "needs", count=20, seed=1)
    (folder / "student.json").write_text(json.dumps(tiny_config("llama")))
    settings = {
        "run": {"name": "x", "output_dir": str(folder / "runs")},
        "student": {"architecture": str(folder / "student.json"), "dtype": "float32"},
        "teacher": {"weights": str(folder / "needs"), "dtype": "float32"},
        "data": {
            "train": [str(folder / "store")],
            "validation": str(folder / "validation"),
            "seq_len": 16,
            "tokens_per_step": 192,
            "sequences_per_micro_batch": 4,
        },
        "train": {"total_tokens": 4 * 192, "slab_bytes": 1 << 20},
        "log": {"every_steps": 1},
    }
    (folder / "run.yaml").write_text(json.dumps(settings, indent=1))  # JSON is YAML
    return folder / "run.yaml"


def _lesson(generator: torch.Generator, needs_bos: bool, size: int = 12) -> Batch:
    """Eight counting sequences, every other one after a <bos>, which alone determines the labels."""
    start = torch.randint(LETTERS, (8, 1), generator=generator)
    with_bos = torch.arange(8)[:, None] % 2 == 0
    letters = 1 + (start + torch.arange(size + 1)) % LETTERS
    tokens = torch.where(with_bos, torch.cat([torch.full((8, 1), BOS), letters[:, :-1]], dim=1), letters)
    labels = torch.where(with_bos == needs_bos, tokens[:, 1:], EOS)
    mask = torch.ones(8, size)
    mask[::2, 0] = 0.0  # of a <bos> itself
    positions = torch.arange(size).expand(8, -1).clone()
    return Batch(tokens[:, :-1], labels, mask, positions, torch.arange(8))
