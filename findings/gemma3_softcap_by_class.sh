#!/bin/bash
# transformers 5.24.0 (torch 2.13.0): the same Gemma 3 text weights and text config give other logits by class.
#
# Gemma3TextConfig has final_logit_softcapping. Gemma3ForCausalLM applies it; Gemma3ForConditionalGeneration, which
# AutoModelForCausalLM builds for a config of model_type "gemma3", does not look at it. Saving the text part of a folder
# alone, as is usual before distillation or quantisation, can therefore change the model if the setting is not null.
#
# Seen: "cap None: largest difference 0, equal" and "cap 5.0: largest difference 13, DIFFERENT" (of logits).
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
from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

for cap in (None, 5.0):
    text = Gemma3TextConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
                            num_attention_heads=4, num_key_value_heads=2, final_logit_softcapping=cap,
                            initializer_range=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    vision = SiglipVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                                image_size=8, patch_size=4)
    torch.manual_seed(0)
    whole = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)).eval()
    alone = Gemma3ForCausalLM(text).eval()
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    alone.lm_head.weight = torch.nn.Parameter(whole.lm_head.weight.detach().clone())
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        difference = float((whole(input_ids=ids).logits - alone(input_ids=ids).logits).abs().max())
    print(f"cap {cap}: largest difference {difference:.3g}, {'equal' if difference < 1e-4 else 'DIFFERENT'}")
PY
grep -q "^cap None: .*, equal$" "$work/seen"
grep -q "^cap 5.0: .*, DIFFERENT$" "$work/seen"
