import json

import pytest

from kdtrain.errors import ConfigError, DataError
from kdtrain.telemetry.jsonl_sink import JsonlSink, read_records


def record(step, **more):
    return {"data/step": step, "data/tokens_seen": step * 4096, **more}


def write_run(path, steps, resume_step=0):
    sink = JsonlSink(path, resume_step=resume_step)
    for step in steps:
        sink.write(record(step, **{"loss/ce": 1 / (step + 1)}))
    sink.close()


def test_record_can_be_read_after_write(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write(record(1, **{"loss/ce": 2.5}))
    assert read_records(path) == [record(1, **{"loss/ce": 2.5})]
    sink.close()


def test_resume_drops_records_of_steps_that_will_be_repeated(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_run(path, [0, 5, 10, 15])
    write_run(path, [15, 20], resume_step=10)
    assert [r["data/step"] for r in read_records(path)] == [0, 5, 10, 15, 20]


def test_resume_keeps_all_records_of_the_resumed_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_run(path, [10, 10, 11])  # a step line and an evaluation of step 10
    write_run(path, [11], resume_step=10)
    assert [r["data/step"] for r in read_records(path)] == [10, 10, 11]


def test_run_from_scratch_renames_an_existing_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_run(path, [0, 1, 2])
    write_run(path, [0])
    assert [r["data/step"] for r in read_records(path)] == [0]
    assert [r["data/step"] for r in read_records(tmp_path / "metrics.jsonl.before")] == [0, 1, 2]


def test_file_cut_at_any_byte_keeps_the_complete_records(tmp_path):
    whole = tmp_path / "metrics.jsonl"
    write_run(whole, [1, 2, 3])
    content = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for cut in range(len(content) + 1):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(content[:cut])
        expected = sum(end <= cut for end in ends)
        assert len(read_records(path)) == expected, cut
        write_run(path, [9], resume_step=8)
        assert len(read_records(path)) == expected + 1, cut


def test_damaged_line_is_named_by_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_run(path, [1, 2])
    path.write_bytes(path.read_bytes().replace(b'{"data/step": 1', b'{"data/step" 1'))
    with pytest.raises(DataError, match=r"metrics\.jsonl:1 is not a JSON record"):
        JsonlSink(path, resume_step=1)


def test_line_without_a_step_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"loss/ce": 1.0}\n')
    with pytest.raises(DataError, match="without data/step"):
        read_records(path)


def test_nonfinite_numbers_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write(record(1, **{"loss/ce": float("nan"), "optim/grad_norm": float("inf")}))
    sink.close()
    found = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert found["loss/ce"] is None
    assert found["optim/grad_norm"] is None


def test_record_without_a_step_is_not_written(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="data/step"):
        sink.write({"loss/ce": 1.0})
    sink.close()
    assert read_records(tmp_path / "metrics.jsonl") == []


def test_unwritable_folder_is_a_configuration_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match=r"cannot write .*metrics\.jsonl(.|\n)*fix: choose another run\.output_dir"):
        JsonlSink(tmp_path / "file" / "metrics.jsonl")
