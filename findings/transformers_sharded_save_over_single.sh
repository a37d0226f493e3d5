#!/bin/bash
# transformers 5.24.0 (torch 2.13.0): a sharded save into a folder that holds a single-file save is not what is loaded.
#
# save_pretrained(folder) writes model.safetensors. A later save_pretrained(folder, max_shard_size=...) of other weights
# writes shards and an index beside it and leaves model.safetensors in place; from_pretrained(folder) then reads the old
# single file, without a warning. The other way round (single over sharded) the new weights are loaded.
#
# Seen: "sharded over single: loads the OLD weights, warnings: 0" and "single over sharded: loads the NEW weights, ...".
# A run that writes its exports into one folder, and whose model outgrows the shard size, would be served stale.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 safetensors==0.8.0 numpy==2.4.6 >"$work/pip.log" 2>&1 || {
    tail -n 5 "$work/pip.log" >&2
    exit 1
}
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=warning "$work/venv/bin/python" - "$work" <<'PY' | tee "$work/seen"
import logging, sys
from pathlib import Path

import torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, tie_word_embeddings=False)
said = []
handler = logging.Handler(logging.WARNING)
handler.emit = said.append
transformers.utils.logging.get_logger("transformers").addHandler(handler)


def model(seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(CONFIG)


def try_order(name, sizes):
    folder, old, new = Path(sys.argv[1]) / name.replace(" ", "_"), model(1), model(2)
    old.save_pretrained(folder, max_shard_size=sizes[0])
    new.save_pretrained(folder, max_shard_size=sizes[1])
    said.clear()
    loaded = LlamaForCausalLM.from_pretrained(folder)
    which = [label for label, m in (("OLD", old), ("NEW", new)) if torch.equal(loaded.lm_head.weight, m.lm_head.weight)]
    print(f"{name}: loads the {' and '.join(which)} weights, warnings: {len(said)}")


try_order("sharded over single", ("1GB", "20KB"))
try_order("single over sharded", ("20KB", "1GB"))
PY
grep -qx "sharded over single: loads the OLD weights, warnings: 0" "$work/seen"
grep -q "single over sharded: loads the NEW weights" "$work/seen"
