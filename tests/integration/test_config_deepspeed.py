"""kdtrain's tables of DeepSpeed's settings against DeepSpeed itself, in a new process."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import json
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, get_zero_config
from kdtrain.config.deepspeed_config import EXTRA_ZERO_KEYS, deepspeed_config
from kdtrain.config.schema import ZeroSection
others = dict(grad_clip=1.0, dtype="bfloat16", sequences_per_micro_batch=8, on_cuda=True, num_parameters=1000)
extra = {name: kind == "switch" or 3e8 for name, kind in EXTRA_ZERO_KEYS.items()}
parsed = []
for stage in (0, 1, 2, 3):
    zero = get_zero_config(deepspeed_config(ZeroSection(stage=stage, extra=extra), **others))
    parsed.append([zero.stage, zero.overlap_comm, zero.reduce_bucket_size, zero.reduce_scatter])
from kdtrain.config.deepspeed_config import REDUCE_BUCKET
from kdtrain.planning.zero_memory import MAX_LIVE, PREFETCH
usual = DeepSpeedZeroConfig()
assert (usual.reduce_bucket_size, usual.max_live_parameters, usual.prefetch_bucket_size) == (
    REDUCE_BUCKET, MAX_LIVE, PREFETCH
), "the estimate has other defaults than DeepSpeed"
fields = DeepSpeedZeroConfig.model_fields
deprecated = [n for n, f in fields.items() if (f.json_schema_extra or {}).get("deprecated")]
known = [f.alias or n for n, f in fields.items() if n not in deprecated]
print(json.dumps({"known": known, "parsed": parsed}))
"""


def test_every_zero_key_is_offered_or_refused():
    from kdtrain.config.deepspeed_config import EXTRA_ZERO_KEYS, OWNED_ZERO_KEYS

    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(EXTRA_ZERO_KEYS) <= set(found["known"]), "DeepSpeed has no such key"
    undecided = set(found["known"]) - set(EXTRA_ZERO_KEYS) - set(OWNED_ZERO_KEYS)
    assert not undecided, "a key of this DeepSpeed that kdtrain neither offers nor refuses"
    assert found["parsed"] == [[stage, stage >= 2, 300_000_000, True] for stage in (0, 1, 2, 3)]
