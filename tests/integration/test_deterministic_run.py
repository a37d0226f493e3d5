"""debug.deterministic through a whole run: it reaches torch, and on the CPU it changes no number."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdtrain.models.tiny import tiny_config
from tests.support.tiny_run import write_run

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.deepspeed


def run(config, name, *words, **environment):
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", **environment}
    command = [sys.executable, str(ROOT / "launch/train.py"), str(config), f"run.name={name}", *words]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=200, check=False)


def numbers(folder):
    """Of every step, without times."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [
        {k: v for k, v in record.items() if not k.startswith(("time/", "throughput/", "memory/"))} for record in records
    ]
    assert all("distill/forward_kl" in record for record in kept), records[0]
    return kept


def test_a_deterministic_run_keeps_its_numbers_and_says_what_it_does(tmp_path):
    config = write_run(tmp_path, student=tiny_config("llama"), teacher=tiny_config("qwen3"), steps=3, zero={"stage": 2})
    plain, strict = run(config, "plain"), run(config, "strict", "debug.deterministic=true")
    assert (plain.returncode, strict.returncode) == (0, 0), plain.stderr + strict.stderr
    assert "deterministic algorithms only" in strict.stdout
    assert "deterministic algorithms only" not in plain.stdout
    found = numbers(tmp_path / "runs/strict")
    assert len(found) == 3
    assert found == numbers(tmp_path / "runs/plain")


def test_an_environment_that_contradicts_it_ends_the_run_before_it_begins(tmp_path):
    config = write_run(tmp_path, student=tiny_config("llama"), steps=2)
    done = run(config, "refused", "debug.deterministic=true", FLASH_ATTENTION_DETERMINISTIC="0")
    assert done.returncode == 2
    assert "debug.deterministic = true, but FLASH_ATTENTION_DETERMINISTIC = '0' in the environment" in done.stderr
    assert not (tmp_path / "runs/refused").exists()


def test_check_says_what_a_bucket_of_zero_extra_costs(tmp_path):
    config = write_run(tmp_path, student=tiny_config("llama"), steps=2, zero={"stage": 2})
    for accelerator, size in (("cpu", "1.86"), ("cuda", "3.73")):  # two buckets on CUDA, where reduction overlaps
        words = ("zero.extra.reduce_bucket_size=5e8", "--check")
        done = run(config, "checked", *words, DS_ACCELERATOR=accelerator)
        assert done.returncode == 0, done.stderr
        assert f"buckets take {size} GiB by zero.extra.reduce_bucket_size; 0.00 GiB without it" in done.stdout
