"""The shape of the repository: what a reader may rely on, and traps that show only on somebody else's machine."""

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.support.tree_copy import tracked_files

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("kdtrain", "kernels/kdtrain_kernels", "launch", "tests", "benchmarks", "proofs", "examples")
FORBIDDEN = {
    "a path of one machine": r"(?<![\w/.])/(work|opt|tmp/venv|root|home/\w+)/",
    "a package registry's host": r"(py[p]i|npm[j]s|python[h]osted|debi[a]n)\.(org|com|net)\b|download\.py[t]orch\.org",
    "a private key or token": r"-----BEGIN [A-Z ]*PRIVATE KEY|\bhf_[A-Za-z0-9]{30,}|\bghp_[A-Za-z0-9]{30,}",
}


def python_files():
    return [path for folder in SOURCES for path in sorted((ROOT / folder).rglob("*.py"))]


def package_folders(top):
    """Every folder under `top` that holds Python source, `top` included."""
    return sorted({path.parent for path in top.rglob("*.py")})


def test_kernels_is_a_source_root_and_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "see docs/design/0003-kernels-folder.md"


def test_no_root_folder_shadows_a_dependency():
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    assert not folders & {"datasets", "tokenizers", "accelerate", "evaluate", "transformers", "deepspeed", "triton"}


def test_no_launch_script_shares_a_name_with_a_module():
    # launch/ is the first entry of sys.path of its scripts
    stems = {path.stem for path in (ROOT / "launch").glob("*.py")}
    installed = {name.partition(".")[0] for name in metadata.packages_distributions()}
    assert stems
    assert not stems & set(sys.stdlib_module_names)
    assert not stems & (installed - {"kdtrain", "kdtrain_kernels"})


def test_every_package_folder_has_an_init():
    missing = [
        str(folder.relative_to(ROOT))
        for top in ("kdtrain", "kernels/kdtrain_kernels")
        for folder in package_folders(ROOT / top)
        if not (folder / "__init__.py").exists()
    ]
    assert not missing


def test_tests_are_not_packages_and_their_names_are_unique():
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert not [path for path in files if path.name == "__init__.py"]
    names = [path.name for path in files if path.name != "conftest.py"]
    assert len(names) == len(set(names))


def test_setup_lists_every_package():
    code = (
        "import setuptools, runpy\n"
        "setuptools.setup = lambda **kw: print(*sorted(kw['packages']), sep='\\n')\n"
        "runpy.run_path('setup.py')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    folders = [*package_folders(ROOT / "kdtrain"), *package_folders(ROOT / "kernels/kdtrain_kernels")]
    names = {".".join(f.relative_to(ROOT).parts).removeprefix("kernels.") for f in folders}
    assert set(done.stdout.split()) == names


def test_no_source_file_is_longer_than_500_lines():
    long = {str(p.relative_to(ROOT)): n for p in python_files() if (n := len(p.read_text().splitlines())) > 500}
    assert not long


def test_launch_scripts_are_thin():
    long = {p.name: n for p in (ROOT / "launch").glob("*.py") if (n := len(p.read_text().splitlines())) > 60}
    assert not long


@pytest.mark.parametrize("package", ["kdtrain.config", "kdtrain.errors", "kdtrain.log"])
def test_reporting_a_mistake_needs_no_torch(package):
    code = (
        "import importlib, pkgutil, sys\n"
        f"top = importlib.import_module({package!r})\n"
        "for module in pkgutil.walk_packages(getattr(top, '__path__', []), top.__name__ + '.'):\n"
        "    importlib.import_module(module.name)\n"
        "print(*sorted({'torch', 'numpy', 'deepspeed', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == []


def test_nothing_tracked_names_a_machine_a_registry_or_a_secret():
    found = []
    for path in tracked_files():
        if path == Path(__file__).resolve() or path.suffix in {".xz", ".png", ".svg", ".gz", ".npz", ".safetensors"}:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for what, pattern in FORBIDDEN.items():
            found += [f"{path.relative_to(ROOT)}: {what}: {m.group()}" for m in re.finditer(pattern, text)]
    assert not found, "\n".join(found)


def test_the_patterns_for_machines_and_registries_match_what_they_should():
    for what, text in {
        "a path of one machine": 'open("/home/jane/models/x")',
        "a package registry's host": "https://files.python" + "hosted.org/x.whl",
        "a private key or token": "hf_" + "a" * 34,
    }.items():
        assert re.search(FORBIDDEN[what], text)
    for folder in ("work", "root", "opt"):
        for innocent in ("runs", "docs", "https://a.b"):
            assert not re.search(FORBIDDEN["a path of one machine"], "/".join((innocent, folder, "x")))


def test_no_tracked_file_is_large_except_the_demo_text():
    sizes = {str(path.relative_to(ROOT)): path.stat().st_size for path in tracked_files()}
    assert not {name: n for name, n in sizes.items() if n > 500_000 and not name.startswith("kdtrain/assets/")}
    assert sum(n for name, n in sizes.items() if name.startswith("kdtrain/assets/")) <= 3_500_000


def test_source_is_ascii_and_leaves_nothing_for_later():
    # a marker of unfinished work, spelt so that this file does not hold one
    markers = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|NotImplemented" r"Error)\b")
    for path in python_files():
        text = path.read_text(encoding="utf-8")
        assert text.isascii() or path.is_relative_to(ROOT / "tests"), path
        assert not markers.search(text), f"{path}: {markers.search(text).group()}"


def test_no_handler_hides_an_unknown_error():
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                names = [n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)] if node.type else []
                assert node.type is not None, f"bare except at {where}"
                assert "Exception" not in names, f"except Exception at {where}"


IMPORT_LLAMA = """
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=11)
print(sum(p.numel() for p in LlamaForCausalLM(config).parameters()) > 0)
import kernels
print(kernels.__file__)
"""


def test_hugging_face_kernels_is_not_shadowed_by_our_folder(tmp_path):
    # as on a multi-node run: the launcher puts the working directory first on PYTHONPATH
    stub = tmp_path / "site" / "kernels"
    stub.mkdir(parents=True)
    names = ["CUDAProperties", "Device", "LayerRepository", "LocalLayerRepository", "Mode", "get_kernel", "has_kernel"]
    body = [f"class {name}:\n    def __init__(self, *a, **k): pass\n" for name in names]
    body.append("def __getattr__(name):")
    body.append("    if name.startswith('__'): raise AttributeError(name)")
    body.append("    return lambda *a, **k: (lambda f: f)")
    (stub / "__init__.py").write_text("\n".join(body))
    info = tmp_path / "site" / "kernels-0.18.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_LLAMA],
        cwd=ROOT,
        env={
            "PATH": "",
            "HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{tmp_path / 'site'}",
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", str(stub / "__init__.py")]
