"""Which flash-attention packages this process can use. Needs no GPU, and never downloads anything."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from importlib import metadata

from packaging.version import InvalidVersion, Version


@dataclass(frozen=True, slots=True)
class FlashPackage:
    """What transformers imports for one implementation.

    distribution: the name pip knows; folder: the top-level module it must have installed; names: module -> what is
    taken from it; at_least: the oldest version that transformers accepts, None if it accepts any.
    """

    distribution: str
    folder: str
    names: tuple[tuple[str, tuple[str, ...]], ...]
    at_least: str | None = None


_FUNCTIONS = ("flash_attn_func", "flash_attn_varlen_func")

FLASH_PACKAGES = {
    "flash_attention_2": FlashPackage(
        "flash-attn",
        "flash_attn",
        (
            ("flash_attn", (*_FUNCTIONS, "flash_attn_with_kvcache")),
            ("flash_attn.bert_padding", ("pad_input", "unpad_input")),
        ),
        at_least="2.3.3",
    ),
    "flash_attention_3": FlashPackage(
        "flash-attn-3",
        "flash_attn_interface",
        (("flash_attn_interface", (*_FUNCTIONS, "flash_attn_with_kvcache")),),
    ),
    "flash_attention_4": FlashPackage("flash-attn-4", "flash_attn", (("flash_attn.cute", _FUNCTIONS),)),
}
"""Implementation -> what it needs. flash-attn and flash-attn-4 install into one folder, so a module that can be found
says nothing. Where transformers does not see the right distribution, it fetches kernels from a hub."""

BROKEN = (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError, AssertionError)
"""What the import of a package raises that was built for another torch, Python or CUDA."""


@functools.cache
def flash_obstacle(implementation: str) -> str | None:
    """Why the package of `implementation`, a key of FLASH_PACKAGES, cannot be used in this process; None if it can.

    Looks for the installed distribution and its version as transformers does, then imports what transformers will
    import: a package built for another torch is found, and fails only there. The device is not looked at. Cached:
    an installation is not expected to change while a process runs. Does not communicate.
    """
    package = FLASH_PACKAGES[implementation]
    version = _installed_version(package.distribution)
    owners = {name.replace("_", "-") for name in metadata.packages_distributions().get(package.folder, ())}
    if version is None:
        others = f" ({package.folder} belongs to {', '.join(sorted(owners))})" if owners else ""
        return f"needs the distribution {package.distribution}, which is not installed{others}"
    if package.distribution not in owners:
        return f"{package.distribution} {version} is installed but holds no module {package.folder}"
    if package.at_least is not None and not _reaches(version, package.at_least):
        return f"{package.distribution} {version} is installed, transformers needs {package.at_least} or newer"
    if problem := _import_problem(package):
        return f"{package.distribution} {version} is installed but cannot be imported: {problem}"
    return None


def attention_packages() -> list[tuple[str, str]]:
    """(implementation, version of its package, or why it cannot be used) for every key of FLASH_PACKAGES.

    Imports every package that is installed.
    """
    return [
        (name, flash_obstacle(name) or str(_installed_version(package.distribution)))
        for name, package in FLASH_PACKAGES.items()
    ]


def _installed_version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution) or "of unknown version"
    except metadata.PackageNotFoundError:
        return None


def _reaches(version: str, least: str) -> bool:
    try:
        return Version(version) >= Version(least)
    except InvalidVersion:
        return False


def _import_problem(package: FlashPackage) -> str:
    """What stops `from module import names`; empty if nothing does."""
    try:
        for module_name, names in package.names:
            module = importlib.import_module(module_name)
            if missing := [name for name in names if not hasattr(module, name)]:
                return f"{module_name} has no {', '.join(missing)}"
    except BROKEN as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return ""
