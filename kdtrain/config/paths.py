"""The status of a path, or the reason why it cannot be read. Writes nothing.

Whatever the lookup can raise (a name that is too long, a loop of links, a folder that may not be entered, text that is
no path) becomes the reason of a problem, so that all problems of a configuration are reported at once.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

ABSENT = "does not exist"
LONGEST_NAME, LONGEST_PATH = 255, 4095
"""Largest number of bytes on Linux, of one name between slashes and of a whole path."""


def look(path: Path) -> os.stat_result | str:
    """Status of `path`, links followed; on an error the reason, phrased to follow the path. Raises nothing."""
    try:
        return os.stat(path)
    except OSError as error:
        return _reason(path, error)
    except ValueError:  # a NUL byte, or characters that no file name can hold
        return "holds characters that no path can hold"


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder whose status can be read. Raises nothing."""
    found = look(path)
    return not isinstance(found, str) and stat.S_ISDIR(found.st_mode)


def _reason(path: Path, error: OSError) -> str:
    if error.errno == errno.ENAMETOOLONG:
        return too_long(path) or "is too long for a path of this file system"
    if error.errno == errno.ELOOP:
        return "leads through symbolic links that go in a circle"
    if error.errno == errno.ENOENT:
        return f"is a symbolic link to {os.readlink(path)}, which {ABSENT}" if path.is_symlink() else ABSENT
    parents = [*reversed(path.parents)]
    if error.errno == errno.ENOTDIR:
        file = next((parent for parent in parents if os.path.exists(parent) and not os.path.isdir(parent)), path.parent)
        return f"{ABSENT}: {file} is not a folder"
    if error.errno == errno.EACCES:
        shut = next((parent for parent in parents if not os.access(parent, os.X_OK)), path.parent)
        return f"cannot be accessed: you have no permission in {shut}"
    return f"cannot be accessed: {error.strerror}"


def too_long(path: Path) -> str | None:
    """The reason, phrased to follow the path, if it is longer than Linux accepts; else None."""
    longest = max((_bytes(part) for part in path.parts), default=0)
    if longest > LONGEST_NAME:
        return f"holds a name of {longest} bytes, longer than the {LONGEST_NAME} that a file name may have"
    whole = _bytes(str(path))
    return f"has {whole} bytes, more than the {LONGEST_PATH} of a path" if whole > LONGEST_PATH else None


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
