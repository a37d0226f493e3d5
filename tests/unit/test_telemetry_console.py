import io
import logging
import re
import subprocess
import sys

import pytest

from kdtrain.log import LOGGER, wants_colour
from kdtrain.telemetry.console import format_duration, format_eval, format_rate, format_step, format_table

RECORD = {
    "data/step": 10,
    "data/tokens_seen": 40960,
    "throughput/tokens_per_s": 88123.0,
    "loss/ce": 10.95081,
    "loss/kd": 9.93118,
    "loss/total": 10.441,
    "optim/lr": 3e-6,
    "optim/grad_norm": 5.0249,
    "memory/host_gib": 1.14,
    "time/eta_s": 33 * 3600 + 39 * 60,
    "distill/tvd": 0.5,
}


def test_step_line_has_fixed_columns_for_any_order_of_the_record():
    line = (
        "step   10/480  loss 10.4410  kd 9.9312  ce 10.9508  gnorm 5.02  lr 3.00e-06  tok/s 88.1k  rss 1.1G  eta 33h39m"
    )
    assert format_step(RECORD, 480) == line
    assert format_step(dict(reversed(RECORD.items())), 480) == line


def test_step_lines_of_one_run_begin_in_the_same_column():
    starts = {format_step(RECORD | {"data/step": s}, 12000).index("loss") for s in (1, 99, 12000)}
    assert len(starts) == 1


def test_every_pair_is_found_by_splitting_at_two_spaces():
    pairs = [p for p in re.split(r" {2,}", format_step(RECORD, 480))[2:]]
    assert all(re.fullmatch(r"\S+ \S+", pair) for pair in pairs), pairs
    assert dict(p.split(" ") for p in pairs)["lr"] == "3.00e-06"


def test_step_line_shows_device_memory_on_a_gpu():
    line = format_step(RECORD | {"memory/peak_allocated_gib": 43.8}, 480)
    assert "mem 43.8G" in line
    assert "rss" not in line


def test_eval_line_names_its_step():
    line = format_eval({"data/step": 0, "eval/val_nll": 4.812, "eval/top1_agreement": 0.43219, "time/eval_s": 12.4})
    assert line == "eval  0  val_nll 4.8120  top1 43.2%  took 12s"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (412, "412"),
        (999.7, "1.00k"),
        (88123, "88.1k"),
        (999_960, "1.00M"),
        (1.25e6, "1.25M"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_rates_have_three_digits_and_an_si_prefix(value, text):
    assert format_rate(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (245, "4m05s"),
        (3599.9, "1h00m"),
        (121140, "33h39m"),
        (float("nan"), "-"),
    ],
)
def test_durations_are_formatted_in_hours_minutes_seconds(seconds, text):
    assert format_duration(seconds) == text


def test_table_aligns_text_left_and_numbers_right():
    rows = [
        {"student": "before", "tokens": 0, "ce": 10.8, "kl": None},
        {"student": "distilled", "tokens": 1234567, "ce": 4.25, "kl": 1.0},
    ]
    assert format_table(rows, title="Result").splitlines() == [
        "Result",
        "student       tokens       ce      kl",
        "---------  ---------  -------  ------",
        "before             0  10.8000       -",
        "distilled  1,234,567   4.2500  1.0000",
    ]


@pytest.mark.parametrize("rows", [[], [{"a": 1}, {"b": 1}]])
def test_table_refuses_rows_with_different_keys(rows):
    with pytest.raises(ValueError, match="row"):
        format_table(rows)


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colours_only_on_a_terminal_without_NO_COLOR(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert wants_colour(_Terminal())
    assert not wants_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour(_Terminal())


PRINT_A_STEP = """
from pathlib import Path
import sys
from kdtrain.log import LOGGER, setup_logging
setup_logging(0, Path(sys.argv[1]))
LOGGER.info("step  1  loss 2.0")
LOGGER.warning("watch out")
"""


def test_files_and_pipes_get_plain_text(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PRINT_A_STEP, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "step  1  loss 2.0\nwatch out\n"
    assert (tmp_path / "console.log").read_text() == done.stdout


def test_terminal_gets_colours_and_the_log_file_does_not(tmp_path, monkeypatch):
    from kdtrain.log import setup_logging

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    terminal = _Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    before, propagate = list(LOGGER.handlers), LOGGER.propagate
    try:
        LOGGER.handlers = []
        setup_logging(0, tmp_path)
        LOGGER.info("step  1  loss 2.0")
        LOGGER.warning("watch out")
    finally:
        for handler in LOGGER.handlers:
            handler.close()
        LOGGER.handlers, LOGGER.propagate = before, propagate
        logging.getLogger("kdtrain").setLevel(logging.NOTSET)
    assert terminal.getvalue() == "\x1b[36mstep\x1b[0m  1  loss 2.0\n\x1b[33mwatch out\x1b[0m\n"
    assert "\x1b" not in (tmp_path / "console.log").read_text()
