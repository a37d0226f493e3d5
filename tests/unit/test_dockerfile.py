"""What can be said of the images without building them: no container engine is needed."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from kdtrain.models.attention_packages import flash_obstacle

ROOT = Path(__file__).resolve().parents[2]


def instructions():
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]


def stage(name):
    """Instructions of a stage."""
    found, inside = [], False
    for word, rest in instructions():
        if word == "FROM":
            inside = rest.endswith(f" AS {name}")
        elif inside:
            found.append((word, rest))
    assert found, f"no stage {name}"
    return found


def copied_before_install(name):
    """(sources, destination) of the COPY lines above the first RUN that installs the package."""
    for word, rest in stage(name):
        if word == "RUN" and ("quickstart" in rest or "pip install" in rest):
            return
        if word == "COPY":
            *sources, destination = [part for part in rest.split() if not part.startswith("--")]
            yield sources, destination


def test_every_source_of_a_copy_exists():
    for name in ("cpu", "gpu"):
        for sources, _ in copied_before_install(name):
            for source in sources:
                assert (ROOT / source).exists(), f"stage {name} copies {source}"


def test_what_is_copied_before_the_installation_is_enough_for_its_first_import(tmp_path):
    for sources, destination in copied_before_install("cpu"):
        for source in sources:
            target = tmp_path / destination
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, target, dirs_exist_ok=True)
            else:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, target)
    script = (tmp_path / "launch/quickstart.sh").read_text()
    assert "-c 'import torch, deepspeed, transformers, kdtrain, kdtrain_kernels'" in script
    done = subprocess.run(
        [sys.executable, "-c", "import kdtrain, kdtrain_kernels"],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{tmp_path}/kernels"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_gpu_image_has_what_building_flash_attn_without_isolation_imports():
    (line,) = (rest for word, rest in stage("gpu") if word == "RUN" and "flash-attn" in rest)
    before = line.split("flash-attn")[0]
    for package in ("torch", "ninja", "packaging", "psutil", "einops"):
        assert re.search(rf"\b{package}\b", before), package
    assert "MAX_JOBS=" in before


def test_the_gpu_image_has_what_runs_and_benchmarks_call():
    """gcc and Python's headers for Triton's launchers, git for the commit of a measurement."""
    (line,) = (rest for word, rest in stage("gpu") if word == "RUN" and "apt-get install" in rest)
    for package in ("build-essential", "python3-dev", "git"):
        assert re.search(rf"\s{package}\s", line), package


def test_the_gpu_images_cuda_is_that_of_the_pinned_torch():
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints-gpu.txt").read_text(), re.MULTILINE))
    (image,) = (rest for word, rest in instructions() if word == "FROM" and rest.endswith(" AS gpu"))
    toolkit = re.search(r"cuda:(\d+\.\d+)\.\d+-devel", image)
    assert toolkit, "flash-attn is compiled: the image must hold nvcc"
    assert pins["cuda-toolkit"].startswith(f"{toolkit.group(1)}."), "compiled against another CUDA than torch loads"


def test_building_the_gpu_image_ends_where_its_flash_attn_cannot_be_imported():
    (line,) = (rest for word, rest in stage("gpu") if word == "RUN" and "flash_obstacle" in rest)
    words = shlex.split(line)
    done = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    obstacle = flash_obstacle("flash_attention_2")
    assert (done.returncode, done.stderr.strip()) == ((0, "") if obstacle is None else (1, obstacle))
    assert stage("gpu").index(("RUN", line)) > stage("gpu").index(("COPY", "--chown=kdtrain . ."))
