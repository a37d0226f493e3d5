"""One shard of a token store, mapped and checked: its own files, or a pair elsewhere that it uses in place."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import numpy as np

from kdtrain.data.manifest import DAMAGED_FIX, Linked, Manifest
from kdtrain.data.megatron_index import MegatronIndex, read_index
from kdtrain.errors import DataError
from kdtrain.stores.files import StoredFile

INDEX_PROBES = 4096
"""Index entries that `map_shard` checks, over all shards; `TokenStore.verify` checks all of them."""
TIME_UNITS_NS = (1, 100, 1000, 10**6, 10**9)
"""Resolutions of modification times in file systems; some round down only after a file has left the writer's cache."""
LINKED_FIX = (
    "  fix: restore the pair with its date (cp -p, rsync -t), or make the store again (launch/prepare_corpus.py "
    "--from-megatron --in-place); the same tokens give a store with the same fingerprint"
)


def map_shard(path: Path, manifest: Manifest, number: int) -> tuple[np.ndarray, MegatronIndex]:
    """Tokens and index of a shard, mapped, sizes and a sample of the index checked. Raises DataError."""
    shard, dtype = manifest.shards[number], np.dtype(manifest.dtype)
    for file in shard.files():
        _check_size(path, file, manifest)
    _check_unchanged(path / f"{shard.name}.bin", manifest)
    index = read_index(path / f"{shard.name}.idx")
    tokens = np.asarray(np.memmap(path / f"{shard.name}.bin", mode="r", dtype=dtype))
    found = (str(index.dtype), len(index.sizes), index.num_tokens, len(tokens))
    if found != (manifest.dtype, shard.num_documents, shard.num_tokens, shard.num_tokens):
        raise DataError(
            f"{path / shard.name}.idx does not agree with {path}/manifest.json: {index.dtype}, "
            f"{len(index.sizes)} documents, {index.num_tokens} tokens; the manifest has {dtype}, "
            f"{shard.num_documents}, {shard.num_tokens}, in {shard.bin_bytes} bytes\n  fix: prepare the corpus again"
        )
    index.check(path / f"{shard.name}.idx", probes=max(1, INDEX_PROBES // len(manifest.shards)))
    check_borders(path, manifest, shard.name, tokens, index, np.array([0, shard.num_documents - 1]))
    return tokens, index


def check_borders(
    path: Path, manifest: Manifest, name: str, tokens: np.ndarray, index: MegatronIndex, documents: np.ndarray
) -> None:
    """Check that these documents of a shard begin with the prefix and end with the separator of the manifest."""
    sizes, starts = index.sizes[documents], index.pointers[documents] // index.dtype.itemsize
    unbegun = sizes <= len(manifest.document_prefix)
    for place, token in enumerate(manifest.document_prefix):
        unbegun |= tokens[np.minimum(starts + place, len(tokens) - 1)] != token
    unended = tokens[starts + sizes - 1] != manifest.separator_id
    for wrong, what in (
        (unended, f"end with separator_id {manifest.separator_id}"),
        (unbegun, f"begin with document_prefix {list(manifest.document_prefix)}"),
    ):
        if wrong.any():
            raise DataError(
                f"{path}/manifest.json does not describe {name}.bin: its document {int(documents[np.argmax(wrong)])} "
                f"does not {what}\n{DAMAGED_FIX}"
            )


def _check_size(path: Path, file: StoredFile, manifest: Manifest) -> None:
    shown, fix = shown_and_fix(path / file.name, manifest)
    try:
        found = file.size_found(path)
    except FileNotFoundError as error:
        raise DataError(f"{shown} is missing\n{fix}") from error
    if found != file.size:
        what = "truncated" if found < file.size else "damaged"
        raise DataError(f"{shown} is {what}: {found} bytes, {file.size} in the manifest\n{fix}")


def _check_unchanged(path: Path, manifest: Manifest) -> None:
    """Check the time of a file used in place: others may write to it without a change of its size."""
    linked = _linked(path, manifest)
    if linked is None or any(path.stat().st_mtime_ns == linked.mtime_ns // unit * unit for unit in TIME_UNITS_NS):
        return
    times = (path.stat().st_mtime_ns, linked.mtime_ns)
    now, then = (datetime.datetime.fromtimestamp(ns / 1e9, datetime.UTC).isoformat(" ") for ns in times)
    shown, fix = shown_and_fix(path, manifest)
    raise DataError(
        f"{shown} was changed after the store was made: last modified {now}, then {then}\n"
        f"  why: its tokens may have changed\n{fix}"
    )


def shown_and_fix(path: Path, manifest: Manifest) -> tuple[str, str]:
    """(file of a store as messages show it, with the file it links to; the fix if it is damaged)."""
    if _linked(path, manifest) is None:
        return str(path), DAMAGED_FIX
    return f"{os.readlink(path)} (used in place as {path})", LINKED_FIX


def _linked(path: Path, manifest: Manifest) -> Linked | None:
    """The manifest's entry of a .bin that is used in place; None for a file of the store, as in a copied folder."""
    if path.suffix != ".bin" or not path.is_symlink():
        return None
    return next((entry for entry in manifest.linked if entry.shard == path.stem), None)
