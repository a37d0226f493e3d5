"""Which flash-attention packages this process can use. Needs no GPU, and never downloads anything."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.version import InvalidVersion, Version


@dataclass(frozen=True, slots=True)
class FlashPackage:
    """What transformers imports for one implementation.

    distribution: its name in pip; folder: the top-level module that it must have installed; names: module -> names
    imported from it; capability: the lowest major compute capability that its kernels support; at_least: the oldest
    version that transformers accepts, None if it accepts any; shared: a folder of its files that another distribution
    writes into as well, "" if none does.
    """

    distribution: str
    folder: str
    names: tuple[tuple[str, tuple[str, ...]], ...]
    capability: int
    at_least: str | None = None
    shared: str = ""


_FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func")

FLASH_PACKAGES = {
    "flash_attention_2": FlashPackage(
        "flash-attn",
        "flash_attn",
        (
            ("flash_attn", (*_FUNCTIONS, "flash_attn_with_kvcache")),
            ("flash_attn.bert_padding", ("pad_input", "unpad_input")),
        ),
        capability=8,
        at_least="2.3.3",
    ),
    "flash_attention_3": FlashPackage(
        "flash-attn-3",
        "flash_attn_interface",
        (("flash_attn_interface", (*_FUNCTIONS, "flash_attn_with_kvcache")),),
        capability=8,
    ),
    "flash_attention_4": FlashPackage(
        "flash-attn-4", "flash_attn", (("flash_attn.cute", _FUNCTIONS),), capability=9, shared="flash_attn/cute/"
    ),
}
"""Implementation -> required package. flash-attn and flash-attn-4 install into one folder, so finding a module proves
nothing; flash-attn even contains files with the names of flash-attn-4's files. Where transformers does not see the
right distribution, it fetches kernels from a hub."""

BROKEN = (
    ImportError,
    OSError,
    RuntimeError,
    AttributeError,
    NameError,
    LookupError,
    TypeError,
    ValueError,
    SyntaxError,
    AssertionError,
)
"""Errors raised by importing a package that was built for another torch, Python or CUDA."""


@functools.cache
def flash_obstacle(implementation: str) -> str | None:
    """Why the package of `implementation`, a key of FLASH_PACKAGES, cannot be used in this process; None if it can.

    Looks for the installed distribution and its version as transformers does, then whether its files are still its
    own, and imports what transformers will import: a package built for another torch is found, and fails only there.
    Does not query the device. The result is cached: an installation is not expected to change while a process runs.
    Does not communicate.
    """
    package = FLASH_PACKAGES[implementation]
    version = installed_version(implementation)
    owners = {str(name).replace("_", "-") for name in metadata.packages_distributions().get(package.folder, ())}
    if version is None:
        others = f" ({package.folder} belongs to {', '.join(sorted(owners))})" if owners else ""
        return f"needs the distribution {package.distribution}, which is not installed{others}"
    if package.distribution not in owners:
        return f"{package.distribution} {version} is installed but holds no module {package.folder}"
    if package.at_least is not None and not _reaches(version, package.at_least):
        return f"{package.distribution} {version} is installed, transformers needs {package.at_least} or newer"
    if package.shared and (changed := _changed_file(package)):
        return f"{package.distribution} {version} is installed, but {changed}: install it again, after flash-attn"
    if problem := _import_problem(package):
        return f"{package.distribution} {version} is installed but cannot be imported: {problem}"
    return None


def capability_obstacle(implementation: str, capability: tuple[int, int] | None) -> str | None:
    """Why the kernels of `implementation` cannot run on a device of this compute capability; None if they can, or it
    is not known."""
    least = FLASH_PACKAGES[implementation].capability
    if capability is None or capability[0] >= least:
        return None
    return f"needs a GPU of compute capability {least}.0, this is {capability[0]}.{capability[1]}"


def attention_packages() -> list[tuple[str, str]]:
    """(implementation, version of its package, or why it cannot be used) for every key of FLASH_PACKAGES.

    Imports every package that is installed.
    """
    return [(name, flash_obstacle(name) or str(installed_version(name))) for name in FLASH_PACKAGES]


def installed_version(implementation: str) -> str | None:
    """Version of the distribution that `implementation` needs, usable or not; None if it is not installed."""
    try:
        return metadata.version(FLASH_PACKAGES[implementation].distribution) or "of unknown version"
    except metadata.PackageNotFoundError:
        return None


def _reaches(version: str, least: str) -> bool:
    try:
        return Version(version) >= Version(least)
    except InvalidVersion:
        return False


def _changed_file(package: FlashPackage) -> str:
    """The first file of `package.shared` that differs from pip's record of the installation; empty if none does."""
    for file in metadata.distribution(package.distribution).files or ():
        if not str(file).startswith(package.shared) or file.hash is None:
            continue
        path = Path(str(file.locate()))
        if not path.is_file():
            return f"{file} is gone"
        digest = base64.urlsafe_b64encode(hashlib.new(file.hash.mode, path.read_bytes()).digest())
        if digest.decode().rstrip("=") != file.hash.value:
            return f"{file} has been replaced"
    return ""


def _import_problem(package: FlashPackage) -> str:
    """The reason why `from module import names` fails; empty if it succeeds."""
    try:
        for module_name, names in package.names:
            module = importlib.import_module(module_name)
            if missing := [name for name in names if not hasattr(module, name)]:
                return f"{module_name} has no {', '.join(missing)}"
    except BROKEN as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return ""
