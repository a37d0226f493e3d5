"""What a run through the launcher needs, made as a user makes it: text, a tokenizer, stores, a teacher, a file."""

from __future__ import annotations

import json
import lzma
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from kdtrain.models.tiny import tiny_config
from tests.support.launching import ROOT, run_ranks

VOCAB = 389
TEXT = ROOT / "kdtrain/assets/demo"
NUM_PARAGRAPHS = 400
MODEL = {"vocab_size": VOCAB, "max_position_embeddings": 64}
CONFIG = """
run: {{name: run, output_dir: {folder}/runs}}
student: {{architecture: {folder}/student.json, dtype: float32}}
teacher: {{weights: {folder}/teacher, dtype: float32}}
data:
  train: [{folder}/data/train]
  validation: {folder}/data/validation
  seq_len: 32
  tokens_per_step: 256
  sequences_per_micro_batch: 4
objective: {{name: distill, distill: {{kd_weight: 0.7, temperature: 2.0}}}}
parallel: {{tp: 2}}
train: {{total_tokens: 2048, slab_bytes: 1048576}}
schedule: {{warmup_tokens: 512}}
eval: {{every_steps: 4, max_tokens: 512}}
log: {{every_steps: 1}}
debug: {{self_check: false}}
"""


def paragraphs() -> list[str]:
    """The first paragraphs of the demo's text."""
    with lzma.open(sorted(TEXT.glob("*.jsonl.xz"))[0], "rt", encoding="utf-8") as file:
        parts = (part for line in file for part in json.loads(line)["text"].split("\n\n") if part.strip())
        return list(islice(parts, NUM_PARAGRAPHS))


def write_teacher(folder: Path, texts: list[str]) -> None:
    """A random model with a byte-pair tokenizer trained on `texts`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = tiny_config("smollm", **MODEL)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def write_world(folder: Path) -> Path:
    """folder/config.yaml and all it names: teacher, student.json, data/train and data/validation (by the script)."""
    texts = paragraphs()
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in texts))
    write_teacher(folder / "teacher", texts)
    student = tiny_config("qwen3", max_position_embeddings=64, tie_word_embeddings=True)
    (folder / "student.json").write_text(json.dumps(student))
    words = ["--tokenizer", folder / "teacher", "--output", folder / "data", "--validation-share", 0.1]
    run_ranks("prepare_corpus.py", *words, "--workers", 1, "--inner-separators", "keep", folder / "text.jsonl")
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder))
    return folder / "config.yaml"
