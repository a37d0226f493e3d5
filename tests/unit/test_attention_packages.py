"""Flash-attention packages as pip leaves them in a folder: which can be used, and does transformers see the same ones?

Every case is a process of its own, whose path begins with a folder of small packages: real distributions (METADATA,
RECORD) whose modules hold what transformers imports, or what breaks when it does.
"""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TWO, THREE, FOUR = (f"flash_attention_{n}" for n in (2, 3, 4))
OWNERS = {"flash-attn": TWO, "flash-attn-3": THREE, "flash-attn-4": FOUR}
pytestmark = pytest.mark.skipif(
    any(name in OWNERS for names in metadata.packages_distributions().values() for name in names),
    reason="flash-attention is installed: what these folders lack would be found elsewhere",
)
FUNCTIONS = "def flash_attn_func(): pass\ndef flash_attn_varlen_func(): pass\n"
CACHE = "def flash_attn_with_kvcache(): pass\n"
FLASH_2 = {
    "flash_attn/__init__.py": FUNCTIONS + CACHE,
    "flash_attn/bert_padding.py": "def pad_input(): pass\ndef unpad_input(): pass\n",
}
FLASH_3 = {"flash_attn_interface.py": FUNCTIONS + CACHE}
FLASH_4 = {"flash_attn/cute/__init__.py": FUNCTIONS}
OTHER_4 = {"flash_attn/cute/__init__.py": "# early\n" + FUNCTIONS}
EXTENSION = f"flash_attn_2_cuda{EXTENSION_SUFFIXES[0]}"
NEEDS_EXTENSION = {**FLASH_2, "flash_attn/__init__.py": "import flash_attn_2_cuda\n" + FUNCTIONS + CACHE}

LOOK = """
import json
from kdtrain.models.attention_packages import FLASH_PACKAGES, attention_packages, flash_obstacle
import transformers.utils.import_utils as library
library.is_torch_cuda_available = lambda: True  # packages are compared, not devices
theirs = [getattr(library, f"is_flash_attn_{n}_available")() for n in (2, 3, 4)]
print(json.dumps([{name: flash_obstacle(name) for name in FLASH_PACKAGES}, theirs, attention_packages()]))
"""


def install(folder, distribution, version, files):
    """What pip leaves of a wheel: the files, METADATA, and RECORD with their hashes."""
    info = f"{distribution.replace('-', '_')}-{version}.dist-info"
    about = {f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"}
    record = [f"{info}/RECORD,,"]
    for name, text in {**files, **about}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        record.append(f"{name},sha256={digest},{len(text)}")
    (folder / info / "RECORD").write_text("\n".join(record) + "\n")


def run(code, folder):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / "kernels")))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**env, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


MISSING = "needs the distribution {}, which is not installed"
ABSENT = {
    TWO: MISSING.format("flash-attn"),
    THREE: MISSING.format("flash-attn-3"),
    FOUR: MISSING.format("flash-attn-4"),
}
BESIDE_4 = MISSING.format("flash-attn") + " (flash_attn belongs to flash-attn-4)"
BESIDE_2 = MISSING.format("flash-attn-4") + " (flash_attn belongs to flash-attn)"
CASES = {
    "nothing": ([], ABSENT),
    "2": ([("flash-attn", "2.8.3", FLASH_2)], {**ABSENT, TWO: None, FOUR: BESIDE_2}),
    "2, written as its wheel is": ([("flash_attn", "2.8.3", FLASH_2)], {**ABSENT, TWO: None, FOUR: BESIDE_2}),
    "2 that holds a cute of its own": (
        [("flash-attn", "2.8.3", {**FLASH_2, **FLASH_4})],
        {**ABSENT, TWO: None, FOUR: BESIDE_2},
    ),
    "3": ([("flash-attn-3", "3.0.0b1", FLASH_3)], {**ABSENT, THREE: None}),
    "4 alone": ([("flash-attn-4", "4.0.0b36", FLASH_4)], {**ABSENT, FOUR: None, TWO: BESIDE_4}),
    "2 and 4": (
        [("flash-attn", "2.8.3", FLASH_2), ("flash-attn-4", "4.0.0b36", FLASH_4)],
        {**ABSENT, TWO: None, FOUR: None},
    ),
    "4, and then 2 with a cute of its own": (
        [("flash-attn-4", "4.0.0b36", FLASH_4), ("flash-attn", "2.8.3", {**FLASH_2, **OTHER_4})],
        {
            **ABSENT,
            TWO: None,
            FOUR: "flash-attn-4 4.0.0b36 is installed, but flash_attn/cute/__init__.py has been replaced: install it",
        },
    ),
    "2 with a cute of its own, and then 4": (
        [("flash-attn", "2.8.3", {**FLASH_2, **OTHER_4}), ("flash-attn-4", "4.0.0b36", FLASH_4)],
        {**ABSENT, TWO: None, FOUR: None},
    ),
    "2 too old": (
        [("flash-attn", "2.3.2", FLASH_2)],
        {**ABSENT, TWO: "flash-attn 2.3.2 is installed, transformers needs 2.3.3 or newer", FOUR: BESIDE_2},
    ),
    "2 of no version that can be compared": (
        [("flash-attn", "local", FLASH_2)],
        {**ABSENT, TWO: "flash-attn local is installed, transformers needs 2.3.3 or newer", FOUR: BESIDE_2},
    ),
    "a name that holds nothing": (
        [("flash-attn-3", "0.0.0", {"placeholder.py": ""})],
        {**ABSENT, THREE: "flash-attn-3 0.0.0 is installed but holds no module flash_attn_interface"},
    ),
    "2 built for something else": (
        [("flash-attn", "2.8.3", {**NEEDS_EXTENSION, EXTENSION: "not a shared library, nor the start of one" * 9})],
        {**ABSENT, TWO: "flash-attn 2.8.3 is installed but cannot be imported: ImportError: ", FOUR: BESIDE_2},
    ),
    "2 broken, and 4 in its folder": (
        [("flash-attn", "2.8.3", NEEDS_EXTENSION), ("flash-attn-4", "4.0.0b36", FLASH_4)],
        {
            **ABSENT,
            TWO: "flash-attn 2.8.3 is installed but cannot be imported: ModuleNotFoundError: No module named 'flash_a",
            FOUR: "flash-attn-4 4.0.0b36 is installed but cannot be imported: ModuleNotFoundError: No module named 'f",
        },
    ),
    "3 without a library it loads": (
        [("flash-attn-3", "3.0.0", {"flash_attn_interface.py": "import ctypes\nctypes.CDLL('libabsent-kd.so.7')\n"})],
        {**ABSENT, THREE: "flash-attn-3 3.0.0 is installed but cannot be imported: OSError: libabsent-kd.so.7: "},
    ),
    "4 without a function": (
        [("flash-attn-4", "4.0.0b1", {"flash_attn/cute/__init__.py": "def flash_attn_func(): pass\n"})],
        {
            **ABSENT,
            TWO: BESIDE_4,
            FOUR: "flash-attn-4 4.0.0b1 is installed but cannot be imported: flash_attn.cute has no flash_attn_varlen_",
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_installed_packages_are_judged_by_distribution_version_and_import(tmp_path, case):
    installed, expected = CASES[case]
    for distribution, version, files in installed:
        install(tmp_path, distribution, version, files)
    found, theirs, reported = run(LOOK, tmp_path)
    for name, reason in expected.items():
        assert found[name] == reason or (reason and found[name] and found[name].startswith(reason)), found[name]
    # transformers imports nothing to decide: it sees broken packages as usable ones, and else what we see
    seen = [reason is None or "cannot be imported" in reason or "replaced" in reason for reason in found.values()]
    assert seen == theirs
    versions = {OWNERS[distribution.replace("_", "-")]: version for distribution, version, _ in installed}
    assert reported == [[name, found[name] or versions[name]] for name in (TWO, THREE, FOUR)]


def test_flash_attn_4_files_removed_with_flash_attn_are_detected(tmp_path):
    """pip uninstall flash-attn removes flash_attn/cute/__init__.py, which flash-attn-4 has installed over its own."""
    install(tmp_path, "flash-attn-4", "4.0.0b36", {**FLASH_4, "flash_attn/cute/mask.py": ""})
    (tmp_path / "flash_attn/cute/__init__.py").unlink()
    found, theirs, _ = run(LOOK, tmp_path)
    assert found[FOUR].startswith("flash-attn-4 4.0.0b36 is installed, but flash_attn/cute/__init__.py is gone: ")
    assert theirs == [False, False, True], "transformers looks at the distribution alone"


def test_modules_without_a_distribution_do_not_count(tmp_path):
    """A source tree on PYTHONPATH: transformers would not take it either, but go to its hub."""
    (tmp_path / "flash_attn_interface.py").write_text(FUNCTIONS + CACHE)
    found, theirs, _ = run(LOOK, tmp_path)
    assert (found, theirs) == (ABSENT, [False, False, False])


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_import_error_of_a_package_is_the_reason(tmp_path):
    install(tmp_path, "flash-attn", "2.8.3", {**NEEDS_EXTENSION, EXTENSION: ""})
    source = tmp_path / "extension.c"
    source.write_text(
        "void _ZN3c105ErrorC2E(void);\nvoid *PyInit_flash_attn_2_cuda(void) { _ZN3c105ErrorC2E(); return 0; }\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / EXTENSION, source], check=True, timeout=60)
    found, theirs, _ = run(LOOK, tmp_path)
    assert found[TWO].startswith("flash-attn 2.8.3 is installed but cannot be imported: ImportError: ")
    assert "undefined symbol: _ZN3c105ErrorC2E" in found[TWO]
    assert theirs[0], "transformers sees it as installed, and would fail in the model's constructor"


CHOOSE = """
import json
from kdtrain.errors import ConfigError
from kdtrain.models.attention import resolve_attention
def choose(wanted, **facts):
    try:
        return resolve_attention(wanted, **{"device_type": "cuda", "dtype": "bfloat16", **facts})
    except ConfigError as error:
        return ["refused", str(error)]
wanted = ["auto", "flash_attention_2", "flash_attention_3", "flash_attention_4"]
print(json.dumps([[choose(name) for name in wanted], choose("auto", dtype="float32"), choose("auto", device_type="cpu"),
                  choose("auto", measured={"flash_attention_2": "no flash here"}.get)]))
"""


def test_auto_takes_an_importable_package_and_explicit_choice_is_refused_with_the_reason(tmp_path):
    """On a device that is taken to be CUDA."""
    install(tmp_path, "flash-attn", "2.8.3", FLASH_2)
    on_cuda, in_float32, on_cpu, unsupported = run(CHOOSE, tmp_path)
    assert on_cuda[0] == [TWO, "auto: flash-attn can be imported and the device is CUDA"]
    assert on_cuda[1] == [TWO, "explicit setting"]
    assert in_float32 == ["packed", "auto: flash_attention_2 needs bfloat16, this is float32"]
    assert on_cpu == ["packed", "auto: flash_attention_2 needs a CUDA device, this is cpu"]
    assert unsupported == ["packed", "auto: flash_attention_2: no flash here"]
    for (kind, text), name in zip(on_cuda[2:], (THREE, FOUR), strict=True):
        assert kind == "refused"
        assert f"attention = '{name}' cannot be used: {name}: needs the distribution flash-attn-{name[-1]}" in text
        assert "never falls back" in text


def test_flash_attn_4_alone_does_not_count_as_flash_attn(tmp_path):
    install(tmp_path, "flash-attn-4", "4.0.0b36", FLASH_4)
    (auto, two, _, four), *_ = run(CHOOSE, tmp_path)
    assert auto == ["packed", f"auto: flash_attention_2: {BESIDE_4}"]
    assert (two[0], four) == ("refused", [FOUR, "explicit setting"])


def test_auto_skips_a_broken_package(tmp_path):
    install(tmp_path, "flash-attn", "2.8.3", NEEDS_EXTENSION)
    (auto, two, *_), *_ = run(CHOOSE, tmp_path)
    assert auto[0] == "packed"
    assert auto[1].startswith(
        "auto: flash_attention_2: flash-attn 2.8.3 is installed but cannot be imported: ModuleNotFoundError"
    )
    assert two[0] == "refused"
