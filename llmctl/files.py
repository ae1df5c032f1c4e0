"""Files appear whole or not at all: written under a temporary name beside the target, synced, then renamed.

Knows nothing of what is written. A crash or a full disk leaves the old file as it was and nothing half-written.
"""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmctl.errors import OutputError

HINTS = {
    errno.ENOSPC: "free some space there, or choose another place with -o",
    errno.EDQUOT: "your quota is used up: free some space there, or choose another place with -o",
    errno.EFBIG: "the file system or a limit (ulimit -f) forbids files of this size; choose another place with -o",
    errno.EROFS: "that file system is read-only; choose another place with -o",
    errno.EACCES: "make the folder writable, or choose another place with -o",
    errno.EPERM: "make the folder writable, or choose another place with -o",
    errno.ENOENT: "the folder has gone or its name is not allowed; choose another place with -o",
    errno.ENOTDIR: "a part of this path is a file, not a folder; choose another place with -o",
    errno.EISDIR: "a folder stands in the way; choose another name with -o",
    errno.EEXIST: "a file stands where a folder is needed; choose another place with -o",
    errno.ENOTEMPTY: "a folder stands in the way; choose another name with -o",
    errno.ENAMETOOLONG: "choose a shorter name with -o",
    errno.EIO: "the disk reports errors; choose another place with -o",
}


def cache_folder() -> Path:
    """Return where things are kept that can be made again: `LLMCTL_CACHE`, else a folder in the user's cache."""
    named = os.environ.get("LLMCTL_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmctl"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write `path` into one clear error.

    Raises: OutputError naming the path, the reason, and what is needed.
    """
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OutputError(f"cannot write `{path}`: {reason}", HINTS.get(error.errno or 0, "")) from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the target's folder; it becomes `path` when the block ends without an error.

    The block writes a file (or makes a folder) at the temporary path. Missing parent folders are made.

    Raises: OutputError when the file system refuses.
    """
    temporary = path.parent / f".{path.name[:40]}.{secrets.token_hex(4)}.tmp"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        finally:
            discard(temporary)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole.

    Raises: OutputError when the file system refuses.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole.

    Raises: OutputError when the file system refuses.
    """
    write_bytes(path, text.encode())


def write_json(path: Path, obj: Any) -> None:
    """Write a JSON file whole: indented, keys in the order given, Chinese readable.

    Raises: OutputError when the file system refuses.
    """
    write_text(path, json_text(obj))


def json_text(obj: Any) -> str:
    """Return the one textual form that JSON files of an artifact have, so that equal content is equal bytes."""
    return json.dumps(obj, ensure_ascii=False, indent=2) + "\n"


def ensure_writable(folder: Path) -> None:
    """Make the folder and try it, so that a long run does not end with a result that has no place.

    Raises: OutputError when the file system refuses.
    """
    probe = folder / f".{secrets.token_hex(4)}.tmp"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"x")
        finally:
            discard(probe)


def is_seen(path: Path) -> bool:
    """Tell whether a file is there for this process; one in a folder that it may not read is not."""
    try:
        return path.is_file()
    except OSError:
        return False


def sync(path: Path) -> None:
    """Wait until the disk has what was written; a folder's own entry counts, its files were synced on their own."""
    if path.is_dir():
        if os.name == "nt":  # Windows cannot open folders
            return
        descriptor = os.open(path, os.O_RDONLY)
    else:
        descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(path: Path) -> None:
    """Remove what an interrupted write left; nothing is there after a successful one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()
