#!/bin/bash
# transformers 5.24.0 (torch 2.13.0): in gpt-oss and AFMoE documents packed into one row see each other, always.
#
# transformers keeps documents of a row apart when position_ids restart, no cache is in use and no attention_mask is
# given: `create_causal_mask` finds them in the position_ids that a model hands it. The models of gpt_oss and afmoe hand
# it none: their forward builds `mask_kwargs` from config, embeddings, mask and cache alone, while the rotary embeddings
# do restart. So the second document reads the first, with positions that overlap its own. Nothing warns. Handing the
# same model the mask that `create_causal_mask` makes of its position_ids, which its forward takes as a dict, keeps them
# apart: nothing else is in the way. Mixtral and OLMoE, with the same call and the same settings, are apart as they are.
#
# Seen: "gpt_oss: SEES", "afmoe: SEES", "mixtral: apart", "olmoe: apart", and "masks from position_ids: apart" for the
# first two.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 safetensors==0.8.0 numpy==2.4.6 >"$work/pip.log" 2>&1 || {
    tail -n 5 "$work/pip.log" >&2
    exit 1
}
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" - <<'PY' | tee "$work/seen"
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])  # two documents of four tokens
ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
other = torch.tensor([[20, 21, 22, 23, 9, 10, 11, 12]])  # another first document
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "initializer_range": 0.2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
experts = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
for kind in ("gpt_oss", "afmoe", "mixtral", "olmoe"):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes, **heads, **experts, **tokens)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()

    def second(mask=None):
        with torch.no_grad():
            a, b = (
                model(input_ids=row, position_ids=positions, attention_mask=mask, use_cache=False).logits
                for row in (ids, other)
            )
        return "SEES" if float((a - b)[:, 4:].abs().max()) > 1e-4 else "apart"

    print(f"{kind}: {second()}")
    if kind in ("gpt_oss", "afmoe"):
        given = (model.config, torch.empty(1, 8, 32), None, None, positions)
        masks = {
            "full_attention": create_causal_mask(*given),
            "sliding_attention": create_sliding_window_causal_mask(*given),
        }
        print(f"{kind}, masks from position_ids: {second(masks)}")
PY
for kind in gpt_oss afmoe; do
    grep -q "^$kind: SEES" "$work/seen"
    grep -q "^$kind, masks from position_ids: apart" "$work/seen"
done
grep -q "^mixtral: apart" "$work/seen"
grep -q "^olmoe: apart" "$work/seen"
