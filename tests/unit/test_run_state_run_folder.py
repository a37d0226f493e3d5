import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

import kdtrain
from kdtrain.errors import ConfigError, NonFiniteLoss, RunStopped
from kdtrain.files import write_atomic
from kdtrain.run_state.run_folder import RunFolder, read_status
from kdtrain.telemetry import environment


def hold(path, **changes):
    """Write a LOCK as of another process."""
    lock = {"host": socket.gethostname(), "pid": 1, "started": "1", "job": None, "restart": 0, "since": "yesterday"}
    path.mkdir(parents=True)
    (path / "LOCK").write_text(json.dumps(lock | changes) + "\n")


def test_status_is_running_while_open_and_done_after_close(tmp_path):
    with RunFolder.open(tmp_path / "runs", "a") as folder:
        assert read_status(folder.path)[0] == "running"
        assert str(os.getpid()) in read_status(folder.path)[1]
        assert (folder.path / "LOCK").exists()
    assert read_status(folder.path) == ("done", "")
    assert not (folder.path / "LOCK").exists()
    assert not list(folder.path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NonFiniteLoss("step 3: nan\n  fix: ..."), ("failed", "NonFiniteLoss: step 3: nan")),
        (RunStopped("stopped at step 3"), ("stopped", "RunStopped: stopped at step 3")),
        (KeyboardInterrupt(), ("failed", "KeyboardInterrupt:")),
    ],
)
def test_status_of_failure_has_first_line_of_error(tmp_path, error, status):
    with pytest.raises(type(error)), RunFolder.open(tmp_path, "a"):
        raise error
    assert read_status(tmp_path / "a") == status
    assert not (tmp_path / "a" / "LOCK").exists()


def test_state_set_by_caller_is_kept(tmp_path):
    with RunFolder.open(tmp_path, "a") as folder:
        folder.set_status("stopped", "signal SIGTERM")
    assert read_status(folder.path) == ("stopped", "signal SIGTERM")


def test_folder_without_run_has_no_status(tmp_path):
    assert read_status(tmp_path) is None
    (tmp_path / "STATUS").write_text("finito\n")
    with pytest.raises(ConfigError, match="begins with 'finito'"):
        read_status(tmp_path)


def test_second_run_in_folder_is_refused_and_first_continues(tmp_path):
    with RunFolder.open(tmp_path, "a") as folder:
        before = (folder.path / "STATUS").read_text()
        with pytest.raises(
            ConfigError, match=rf"in use by process {os.getpid()} on (.|\n)*fix: choose another run\.name"
        ):
            RunFolder.open(tmp_path, "a")
        assert (folder.path / "STATUS").read_text() == before
        assert (folder.path / "LOCK").exists()


HOLD_AND_WAIT = """
import sys, time
from kdtrain.run_state.run_folder import RunFolder
RunFolder.open(sys.argv[1], "a")
print("held", flush=True)
time.sleep(60)
"""


def test_lock_of_killed_run_is_taken_over(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD_AND_WAIT, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"in use by process {process.pid}"):
        RunFolder.open(tmp_path, "a")
    process.kill()  # not yet waited for: a zombie holds nothing either
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            folder = RunFolder.open(tmp_path, "a")
            break
        except ConfigError:
            time.sleep(0.05)
    else:
        pytest.fail("the lock of a killed process was never given up")
    folder.close()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize(
    ("changes", "environ", "stale"),
    [
        ({"pid": 2**22 + 1}, {}, True),  # no such process
        ({"pid": 1, "started": "no such time"}, {}, True),  # the number belongs to another process now
        ({"host": "elsewhere"}, {}, False),  # cannot know
        ({"host": "elsewhere", "job": "77"}, {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"}, True),  # requeued
        ({"host": "elsewhere", "job": "77"}, {"SLURM_JOB_ID": "77"}, False),  # another task of the same job
        ({"host": "elsewhere", "job": "77"}, {"SLURM_JOB_ID": "78", "SLURM_RESTART_COUNT": "1"}, False),
    ],
)
def test_lock_is_taken_over_only_when_holder_has_certainly_ended(tmp_path, monkeypatch, changes, environ, stale):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    hold(tmp_path / "a", **changes)
    if stale:
        RunFolder.open(tmp_path, "a").close()
    else:
        with pytest.raises(ConfigError, match=r"in use by process 1 on elsewhere since yesterday(.|\n)*remove .*LOCK"):
            RunFolder.open(tmp_path, "a")
        assert (tmp_path / "a" / "LOCK").exists()


def test_incomplete_lock_is_taken_over(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "LOCK").write_text('{"host": "x", "pi')
    RunFolder.open(tmp_path, "a").close()


def test_close_keeps_lock_of_another_process(tmp_path):
    folder = RunFolder.open(tmp_path, "a")
    (folder.path / "LOCK").unlink()
    other = RunFolder.open(tmp_path, "a")
    lock = json.loads((other.path / "LOCK").read_text()) | {"pid": 1}
    (other.path / "LOCK").write_text(json.dumps(lock))
    folder.close()
    assert (folder.path / "LOCK").exists()


def test_unwritable_output_dir_is_refused_with_fix(tmp_path):
    (tmp_path / "runs").write_text("a file where a folder should be")
    with pytest.raises(ConfigError, match=r"cannot write the run folder (.|\n)*fix: set run\.output_dir") as caught:
        RunFolder.open(tmp_path / "runs", "a")
    assert str(tmp_path / "runs" / "a") in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="Permission denied"):
        RunFolder.open(tmp_path, "a")


@pytest.mark.parametrize("name", ["", "..", "a/b", "/etc"])
def test_a_name_that_leaves_the_output_dir_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=r"run\.name"):
        RunFolder.open(tmp_path, name)


def test_changed_configuration_is_kept_as_before_file(tmp_path):
    with RunFolder.open(tmp_path, "a") as folder:
        folder.write_config("seed: 1\n", "seed  a.yaml:1\n")
        folder.write_config("seed: 1\n", "seed  a.yaml:1\n")
        assert not (folder.path / "config.yaml.before").exists()
        folder.write_config("seed: 2\n", "seed  command line\n")
    assert (folder.path / "config.yaml").read_text() == "seed: 2\n"
    assert (folder.path / "config.yaml.before").read_text() == "seed: 1\n"
    assert (folder.path / "config.origin.txt").read_text() == "seed  command line\n"


def test_a_write_that_fails_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "STATUS"
    write_atomic(path, "running\n")

    def out_of_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", out_of_space)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "done\n")
    assert path.read_text() == "running\n"


def test_environment_names_versions_source_devices_and_settings_but_no_other_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("KDTRAIN_TEST_SECRET", "hunter2")
    for name, value in {"NCCL_DEBUG": "INFO", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    found = environment.environment_record(world_size=3)
    assert found["world_size"] == 3
    assert found["packages"]["torch"].startswith("2.")
    assert found["devices"]
    assert {"NCCL_DEBUG": "INFO", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0", "OMP_NUM_THREADS": "1"}.items() <= (
        found["settings"].items()
    )
    assert found["float32_matmul_precision"] == "highest"
    with RunFolder.open(tmp_path, "a") as folder:
        folder.write_environment(found)
    text = (folder.path / "environment.json").read_text()
    assert json.loads(text)["kdtrain"] == kdtrain.__version__
    assert "hunter2" not in text


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_first_line_of_a_run_names_commit_and_state(tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    assert environment.git_state(tmp_path) is None
    subprocess.run([*git, "init", "-q"], check=True, timeout=30)
    (tmp_path / "f").write_text("1")
    subprocess.run([*git, "add", "f"], check=True, timeout=30)
    subprocess.run([*git, "commit", "-qm", "one"], check=True, timeout=30)
    clean = environment.git_state(tmp_path)
    (tmp_path / "f").write_text("2")
    assert clean["dirty"] is False
    assert environment.git_state(tmp_path) == {"commit": clean["commit"], "dirty": True}
    line = environment.headline({"kdtrain": "0.1.0", "git": clean, "packages": {"torch": "2.13.0"}})
    assert line == f"kdtrain 0.1.0 ({clean['commit'][:7]}, clean)  torch 2.13.0"
