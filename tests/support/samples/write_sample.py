"""Write a sample of the formats on disk with whatever version of kdtrain is on PYTHONPATH: see README.md here.

Usage: python write_sample.py CHECKOUT OUTPUT. CHECKOUT: a working tree of that version. OUTPUT: a new folder; it gets
the token stores a and b, the checkpoint after step 2, the student's configuration, and expected.json: the settings, the
losses of all steps and the sha256 of each of the checkpoint's weights, as that version reads them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

STEPS, KEPT = 4, 2
WORK = "work"
STUDENT = {
    "model_type": "llama",
    "vocab_size": 257,
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
}


def write_tokenizer(folder: Path) -> None:
    """One token per byte, and the separator as id 0."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0} | {token: 1 + place for place, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


def write_store(folder: Path, count: int, seed: int, tokenizer: Path) -> None:
    """A store of `count` documents of lower-case words."""
    from kdtrain.data.token_store import TokenStoreWriter

    value = seed
    with TokenStoreWriter(folder, tokenizer, 0, source="write_sample.py") as writer:
        for _ in range(count):
            ids = []
            for _ in range(30):
                value = (value * 1103515245 + 12345) % (1 << 31)
                ids.append(1 + (value >> 16) % 64)
            writer.add(ids, text_bytes=len(ids))
        writer.commit()


def train(checkout: Path, output: Path, stores: list[str]) -> Path:
    """Run STEPS steps of pre-training with the version's own script; returns the run folder. Paths are relative."""
    work = output / WORK
    (work / "student.json").write_text(json.dumps(STUDENT))
    settings = {
        "run": {"output_dir": WORK, "name": "run", "seed": 3},
        "student": {"architecture": f"{WORK}/student.json", "dtype": "float32"},
        "data": {"train": stores, "train_weights": [1.0, 2.0], "seq_len": 16, "tokens_per_step": 128}
        | {"sequences_per_micro_batch": 4},
        "objective": {"name": "pretrain"},
        "train": {"total_tokens": STEPS * 128, "slab_bytes": 1 << 20},
        "schedule": {"warmup_tokens": 256},
        "checkpoint": {"every_steps": KEPT, "keep_last": 9},
        "log": {"every_steps": 1},
    }
    (work / "config.yaml").write_text(json.dumps(settings, indent=1))
    command = [sys.executable, str(checkout / "launch/train.py"), f"{WORK}/config.yaml"]
    subprocess.run(command, check=True, cwd=output)
    return work / "run"


def main(checkout: Path, output: Path) -> None:
    """Write the sample."""
    work = output / WORK
    work.mkdir(parents=True)
    write_tokenizer(work / "tokenizer")
    stores = {name: output / name for name in "ab"}
    for number, folder in enumerate(stores.values()):
        write_store(folder, 20 + 4 * number, 1 + number, work / "tokenizer")
    fingerprint = {n: json.loads((f / "manifest.json").read_text())["fingerprint"] for n, f in stores.items()}
    listed = sorted("ab", key=fingerprint.__getitem__, reverse=True)  # not sorted, so that the numbers matter
    run = train(checkout, output, listed)
    kept = run / f"checkpoints/step_{KEPT:06d}"
    shutil.copytree(kept, output / kept.name)
    shutil.copy(work / "student.json", output)

    from kdtrain.engine.checkpoint import read_full_parameters
    from kdtrain.log import LOGGER

    weights = {name: hashlib.sha256(w.numpy().tobytes()).hexdigest() for name, w in read_full_parameters(kept)}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss/ce"] for record in records if "loss/ce" in record]
    assert len(losses) == STEPS, records
    settings = json.loads((work / "config.yaml").read_text())
    expected = {"listed": listed, "losses": losses, "weights": weights, "settings": settings}
    (output / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    LOGGER.info("wrote %s", output)
    shutil.rmtree(work)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
