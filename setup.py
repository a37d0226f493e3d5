"""Packaging. Tool settings live in pyproject.toml; pinned versions in constraints-*.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "kdtrain/__init__.py").read_text()).group(1)

# Upper bounds are the release series that all tests passed on; patch releases inside them are tried by .ci/newest. To
# raise one: change it here and in constraints-*.txt, run `make newest`, `make test` and `make architectures`, and read
# what moved in the tables. torch 2.10 is the first whose addmm adds products of bfloat16 to float32. triton: series
# without a fault in docs/results/triton_releases.md (proofs/triton_releases.py); 3.8 and 3.9 spill registers of one
# kernel each.
setup(
    name="kdtrain",
    version=VERSION,
    description="Distil large language models into small ones while they are pre-trained.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # kernels/ is a source root, not a package: see docs/design/0003-kernels-folder.md.
    packages=[*find_packages(include=["kdtrain", "kdtrain.*"]), *find_packages("kernels")],
    package_dir={"kdtrain_kernels": "kernels/kdtrain_kernels"},
    package_data={"kdtrain": ["py.typed", "assets/**/*"]},
    install_requires=[
        "torch>=2.10",
        "numpy>=1.26",
        "safetensors>=0.5",
        "tokenizers>=0.21",
        "omegaconf>=2.4",
        "rich>=13",
        "packaging>=20",
        "transformers>=5.23,<5.25",
        "deepspeed>=0.19.8,<0.20",
    ],
    extras_require={
        "wandb": ["wandb>=0.26,<0.32"],
        "quantize": ["torchao>=0.18,<0.19"],
        "gguf": ["gguf>=0.10", "accelerate>=1.0"],
        "gpu": ["triton>=3.6,<3.8; platform_system == 'Linux'", "flash-attn>=2.7; platform_system == 'Linux'"],
        "docs": ["mkdocs-material>=9.6"],
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.8",
            "ruff>=0.9",
            "mypy>=1.14",
            "import-linter>=2.1",
            "codespell>=2.3",
            "types-PyYAML",
            "torchao>=0.18,<0.19",
            # its interpreter and compilers prove the kernels on machines without a GPU
            "triton>=3.6,<3.8; platform_system == 'Linux' and platform_machine == 'x86_64'",
        ],
    },
)
