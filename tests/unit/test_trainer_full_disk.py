"""Files of a run that cannot be written: the run ends with one error, and its reason is kept."""

import json
import math

import pytest

from kdtrain.errors import EXIT_OTHER, NonFiniteLoss, OutputError
from kdtrain.log import LOGGER, setup_logging
from kdtrain.run_state.run_folder import RunFolder, read_status
from kdtrain.telemetry.jsonl_sink import JsonlSink
from tests.support.tiny_trainer import full_disk, tiny_trainer


@pytest.fixture
def warned(monkeypatch):
    messages = []
    monkeypatch.setattr(LOGGER, "warning", lambda text, *args: messages.append(text % args))
    return messages


@pytest.mark.parametrize("full", ["metrics.jsonl", "console.log", "skipped.jsonl"])
def test_full_disk_ends_the_run_at_the_next_step_with_one_message_and_exit_code_1(tmp_path, full, capsys):
    """The file of the test is as long as the limit beforehand; the others stay below it."""
    long = json.dumps({"data/step": 0, "x": "x" * 5000}) + "\n"
    ended_at = []

    def work():
        with RunFolder.open(tmp_path, "run") as folder:
            if full == "console.log":
                (folder.path / full).write_text(long)
            setup_logging(0, folder.path)
            run = tiny_trainer(folder.path, 60, {20: math.nan}, max_skipped_steps=1, log=30, every=None)
            if full != "console.log":
                (folder.path / full).write_text(long)
            with full_disk(len(long)):
                try:
                    run.run()
                finally:
                    ended_at.append(run.progress.step)
                    run.close(failed=True)

    try:
        with pytest.raises(OutputError) as caught:
            work()
    finally:
        setup_logging(0)
    path = tmp_path / "run" / full
    assert str(caught.value).startswith(f"cannot write {path}: [Errno 27] File too large\n  why: ")
    assert (caught.value.exit_code, ended_at) == (EXIT_OTHER, [6 if full == "skipped.jsonl" else 1])
    assert "Logging error" not in capsys.readouterr().err
    assert read_status(tmp_path / "run") == ("failed", f"OutputError: cannot write {path}: [Errno 27] File too large")
    assert not (tmp_path / "run/LOCK").exists()
    if full != "console.log":  # the line of a log stays in the buffer until the handler is closed
        assert path.read_text() == long


def test_write_error_in_the_report_of_the_last_step_is_raised(tmp_path):
    run = tiny_trainer(tmp_path, 1, every=None)
    with full_disk(10), pytest.raises(OutputError, match=r"metrics\.jsonl"):
        run.run()
    assert run.progress.step == 1


def test_write_error_is_raised_again_on_close_unless_the_run_failed(tmp_path):
    for failed in (True, False):
        sink = JsonlSink(tmp_path / "metrics.jsonl")
        with full_disk(10):
            with pytest.raises(OutputError, match="cannot write"):
                sink.write({"data/step": 1, "loss/total": 2.0})
            if failed:
                sink.close(failed=True)
            else:
                with pytest.raises(OutputError, match="cannot write"):
                    sink.close()
        assert sink._file.closed


def test_write_error_of_the_status_does_not_hide_the_error_that_ended_the_run(tmp_path, warned):
    def work():
        with RunFolder.open(tmp_path, "run"):
            raise NonFiniteLoss("step 3")

    folder = tmp_path / "run"
    write = RunFolder.set_status

    def on_a_full_disk(self, state, reason=""):
        with full_disk(refusals[state]):
            write(self, state, reason)

    refusals = {"running": 4096, "failed": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "set_status", on_a_full_disk)
        with pytest.raises(NonFiniteLoss, match="step 3"):
            work()
    assert warned == [f"{folder / 'STATUS'} could not be changed from running: File too large"]
    assert read_status(folder)[0] == "running"
    assert [p.name for p in folder.iterdir()] == ["STATUS"]


def test_write_error_of_the_status_is_raised_when_the_run_is_done(tmp_path):
    folder = RunFolder.open(tmp_path, "run")
    with full_disk(0), pytest.raises(OutputError, match=r"cannot write .*STATUS: \[Errno 27\]"):
        folder.mark_done()
    assert read_status(tmp_path / "run")[0] == "running"
    folder.mark_done()
    assert read_status(tmp_path / "run")[0] == "done"
    folder.close()
