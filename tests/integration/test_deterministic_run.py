"""debug.deterministic through a whole run: it reaches torch, and on the CPU it changes no number."""

import sys

import pytest

from kdtrain.models.tiny import tiny_config
from tests.support.launching import ROOT, numbers_of, run_command, run_ranks, start_rank
from tests.support.tiny_run import write_run

pytestmark = pytest.mark.deepspeed


def test_deterministic_run_keeps_its_numbers_and_prints_what_it_does(tmp_path):
    config = write_run(tmp_path, student=tiny_config("llama"), teacher=tiny_config("qwen3"), steps=3, zero={"stage": 2})
    plain = run_ranks("train.py", config, "run.name=plain")
    strict = run_ranks("train.py", config, "run.name=strict", "debug.deterministic=true")
    assert "deterministic algorithms only" in strict.out
    assert "deterministic algorithms only" not in plain.out
    found = numbers_of(tmp_path / "runs/strict")
    assert all("distill/forward_kl" in record for record in found)
    assert len(found) == 3
    assert found == numbers_of(tmp_path / "runs/plain")


def test_environment_that_contradicts_it_ends_the_run_before_it_begins(tmp_path):
    config = write_run(tmp_path, student=tiny_config("llama"), steps=2)
    words, env = ("run.name=refused", "debug.deterministic=true"), {"FLASH_ATTENTION_DETERMINISTIC": "0"}
    done = start_rank("train.py", config, *words, env=env).end()
    assert done.code == 2
    assert "debug.deterministic = true, but FLASH_ATTENTION_DETERMINISTIC = '0' in the environment" in done.err
    assert not (tmp_path / "runs/refused").exists()


def test_check_prints_the_memory_of_a_bucket_of_zero_extra(tmp_path):
    config = write_run(tmp_path, student=tiny_config("llama"), steps=2, zero={"stage": 2})
    for accelerator, size in (("cpu", "1.86"), ("cuda", "3.73")):  # two buckets on CUDA, where reduction overlaps
        words = ("run.name=checked", "zero.extra.reduce_bucket_size=5e8", "--check")
        # DeepSpeed reads DS_ACCELERATOR when it is imported
        command = (sys.executable, ROOT / "launch/train.py", config, *words)
        done = run_command(*command, env={"DS_ACCELERATOR": accelerator})
        assert done.code == 0, done.err
        assert f"buckets take {size} GiB by zero.extra.reduce_bucket_size; 0.00 GiB without it" in done.out
