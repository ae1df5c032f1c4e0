"""Atomic file writes: a temporary file next to the target is written, fsynced, then renamed.

A crash or a full disk leaves the old file unchanged and no partial one. Knows nothing about the content.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmctl.errors import ArtifactError, OutputError, UsageError

MAX_NESTING = 100
HINTS = {
    errno.ENOSPC: "free some disk space, or choose another location with -o",
    errno.EDQUOT: "your disk quota is exhausted: free some space, or choose another location with -o",
    errno.EFBIG: "the file system or a limit (ulimit -f) forbids files of this size; choose another location with -o",
    errno.EROFS: "the file system is read-only; choose another location with -o",
    errno.EACCES: "make the folder writable, or choose another location with -o",
    errno.EPERM: "make the folder writable, or choose another location with -o",
    errno.ENOENT: "the folder was deleted, or its name is not allowed; choose another location with -o",
    errno.ENOTDIR: "a part of this path is a file, not a folder; choose another location with -o",
    errno.EISDIR: "a folder of this name exists; choose another name with -o",
    errno.EEXIST: "a file exists where a folder is needed; choose another location with -o",
    errno.ENOTEMPTY: "a folder of this name exists; choose another name with -o",
    errno.ENAMETOOLONG: "choose a shorter name with -o",
    errno.EIO: "the disk reports errors; choose another location with -o",
}


def cache_folder() -> Path:
    """Return the folder of files that can be regenerated: `LLMCTL_CACHE`, else `llmctl` in the user's cache folder."""
    named = os.environ.get("LLMCTL_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmctl"


KERNEL_FOLDERS = ("/proc", "/sys", "/dev")
"""Where Linux shows itself as files. Their refusals are misleading, and root could replace `/dev/null` by a file."""


def check_place(path: Path) -> None:
    """Refuse to write where no file can stay: in a file system of the kernel, or over a device or a pipe.

    Raises: OutputError.
    """
    with suppress(OSError, RuntimeError):  # what cannot be looked up is refused when it is written
        place = path.parent.resolve() / path.name
        root = next((root for root in KERNEL_FOLDERS if place.is_relative_to(root)), "")
        if root and not place.is_relative_to("/dev/shm"):  # noqa: S108 (ordinary files in memory)
            raise OutputError(
                f"cannot write `{path}`: `{root}` holds no files of users", "choose another location with -o"
            )
        if place.exists() and not place.is_file() and not place.is_dir():
            raise OutputError(f"cannot write `{path}`: it is a device or a pipe", "choose the name of a file with -o")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert an OSError raised while writing `path`.

    Raises: OutputError naming the path and the reason; UsageError for a file that cannot be read on the way.
    """
    check_place(path)
    try:
        yield
    except OSError as error:
        if unreadable(error):
            raise refuse_to_read(error) from error
        reason = (error.strerror or str(error)).lower()
        raise OutputError(f"cannot write `{path}`: {reason}", HINTS.get(error.errno or 0, "")) from error


def unreadable(error: OSError) -> str:
    """Return the file or folder that an error says may not be read, or an empty string: then writing was refused."""
    name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
    if not name or error.errno not in (errno.EACCES, errno.EPERM):
        return ""
    needed = os.R_OK | (os.X_OK if Path(name).is_dir() else 0)
    with suppress(OSError):
        mode = Path(name).stat().st_mode
        return "" if os.access(name, needed) and mode & 0o444 else name
    # What cannot even be looked at lies in a folder that may not be entered; what does not exist was to be made.
    parent = Path(name).parent
    return name if parent.is_dir() and not os.access(parent, os.X_OK) else ""


def refuse_to_read(error: OSError) -> UsageError:
    """Return the error for a file that may not be read."""
    reason = (error.strerror or str(error)).lower()
    return UsageError(f"cannot read `{unreadable(error)}`: {reason}", "make it readable (chmod u+r), or ask its owner")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the target's folder, renamed to `path` if the block succeeds.

    The block writes a file (or creates a folder) at the temporary path. Missing parent folders are created.

    Raises: OutputError if the file system refuses.
    """
    # In the same folder, since a rename is atomic only within a file system; random, since two processes may write.
    temporary = path.parent / f".{path.name[:40]}.{secrets.token_hex(4)}.tmp"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            sync(temporary)  # before the rename: otherwise a power failure could leave an empty file under the name
            temporary.replace(path)
            sync(path.parent)  # makes the rename itself durable
        finally:
            discard(temporary)


def link_or_copy(source: Path, path: Path) -> None:
    """Give a file that will not be changed a second name, atomically; a copy where the file system has no hard links.

    Raises: OutputError if the file system refuses.
    """
    with atomic_path(path) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically.

    Raises: OutputError if the file system refuses.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically.

    Raises: OutputError if the file system refuses.
    """
    write_bytes(path, text.encode())


def write_json(path: Path, obj: Any) -> None:
    """Write a JSON file atomically: indented, in the given key order, non-ASCII text unescaped.

    Raises: OutputError if the file system refuses.
    """
    write_text(path, json_text(obj))


def json_text(obj: Any) -> str:
    """Serialize an object the one way all JSON files of an artifact use, so that equal content is equal bytes."""
    return json.dumps(obj, ensure_ascii=False, indent=2) + "\n"


def ensure_writable(folder: Path) -> None:
    """Create the folder and write a probe file, so that a long run does not fail only when it saves its result.

    Raises: OutputError if the file system refuses.
    """
    probe = folder / f".{secrets.token_hex(4)}.tmp"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"x")
        finally:
            discard(probe)


def is_seen(path: Path) -> bool:
    """Tell whether a file exists; False if this process may not read its folder."""
    try:
        return path.is_file()
    except OSError:
        return False


def exposed(path: Path) -> str:
    """Return who else could have written a file that is to run as code, or an empty string.

    The file and its folder must be the user's own and writable by nobody else, and no folder above may let others rename
    it (such as /tmp without its sticky bit). A group of the user's own name counts as the user: many systems make one.
    """
    if os.name == "nt":
        return ""
    user = os.geteuid()
    real = path.resolve()
    for place in (real, *real.parents):
        try:
            status = place.stat()
        except OSError as error:
            return f"`{place}` cannot be checked ({error.strerror})"
        if place in (real, real.parent) and status.st_uid != user:
            return f"`{place}` belongs to user {status.st_uid}"
        is_sticky = place not in (real, real.parent) and status.st_mode & stat.S_ISVTX
        by_group = status.st_mode & stat.S_IWGRP and status.st_gid != user
        if (by_group or status.st_mode & stat.S_IWOTH) and not is_sticky:
            return f"`{place}` can be written by others"
    return ""


def read_own(path: Path) -> bytes:
    """Read a file of a folder that others made; a link out of the folder would pass on a file of the user's.

    Raises: ArtifactError naming such a link.
    """
    if target := outside(path):
        raise ArtifactError(
            f"`{path}` is a link to `{target}`, outside its folder", "copy the file there if it belongs to the folder"
        )
    return path.read_bytes()


def outside(path: Path) -> Path | None:
    """Return where a file lies if it is a link that leads out of its folder, else None.

    The cache of the Hugging Face Hub is one folder here: `snapshots/REVISION/FILE` links to `blobs/HASH`.
    """
    if not path.is_symlink():
        return None
    folder, target = path.parent.resolve(), path.resolve()
    caches = [place.parent / "blobs" for place in (folder, *folder.parents) if place.name == "snapshots"]
    return None if any(target.is_relative_to(place) for place in (folder, *caches[:1])) else target


def parse_json(text: str | bytes) -> Any:
    """Parse JSON of a file that others made.

    Raises: ValueError if it is not JSON or nested more than `MAX_NESTING` deep, which whoever walks it cannot bear.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [content] if isinstance(content, (dict, list)) else []
    for _ in range(MAX_NESTING):
        level = [part for each in level for part in (each.values() if isinstance(each, dict) else each)]
        level = [part for part in level if isinstance(part, (dict, list))]
        if not level:
            return content
    raise ValueError(f"it is nested more than {MAX_NESTING} deep")


def json_of(files: Mapping[str, bytes], name: str, kind: type = dict) -> Any:
    """Parse one of a model's small files as a JSON object, or as a list; empty if it is missing.

    Raises: ArtifactError naming the file and what is wrong.
    """
    try:
        content = parse_json(files[name]) if name in files else kind()
    except ValueError as error:
        known = recognized(files[name][:512])
        if known is not None and known[0] != "text":
            raise ArtifactError(f"`{name}` is not JSON, but {known[0]}", known[1]) from None
        raise ArtifactError(f"`{name}` cannot be read: {error}", "download it again") from None
    if not isinstance(content, kind):
        wanted = "a JSON object" if kind is dict else "a JSON list"
        raise ArtifactError(f"`{name}` is a {type(content).__name__}, not {wanted}", "download it again")
    return content


def contents(folder: Path) -> str:
    """Say what a folder holds, for an error about what it does not: `it holds `a.txt` and 3 more`."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    shown = ", ".join(f"`{name[:60]}`" for name in names[:3])
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return f"it holds {shown}{more}" if names else "it is empty"


def download_hint(name: str) -> str:
    """Return how to fetch the file that a URL names; empty for a path."""
    return f"it is not downloaded from here; fetch it first: curl -LO {name}" if re.match(r"https?://", name) else ""


KINDS = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself", "fetch the file: git lfs pull"),
    (b"<!doctype html", "a web page", "download the file itself, not the page that shows it"),
    (b"<html", "a web page", "download the file itself, not the page that shows it"),
    (b"GGUF", "a GGUF file", "convert it first: llmctl import FILE -o MODEL"),
    (b"PK\x03\x04", "a zip archive or a PyTorch pickle", "unpack it, or save the model as safetensors"),
    (
        b"\x80",
        "a pickle, which can run code when loaded",
        "save the model as safetensors: save_pretrained of transformers",
    ),
    (b"\x1f\x8b", "compressed with gzip", "unpack it: gunzip"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it: unzstd"),
    (b"PAR1", "a parquet file, which is data", "name it as data, not as the model"),
)
"""Beginnings of files that lie under the name of another format: what they are, and what to do."""


def recognized(head: bytes) -> tuple[str, str] | None:
    """Return what a file is by its first bytes, and what to do, if it is something known or plain text."""
    lower = head.lstrip()[:32].lower()
    for begin, what, hint in KINDS:
        is_length = begin == b"\x80" and head[4:8] == bytes(4)  # a safetensors header of 128 bytes begins so, too
        if not is_length and (head.startswith(begin) or lower.startswith(begin)):
            return what, hint
    try:
        text = head[:512].decode()
    except UnicodeDecodeError:
        return None
    is_text = bool(text) and all(sign.isprintable() or sign in "\r\n\t" for sign in text)
    return ("text", "name it as data, not as the model") if is_text else None


def sync(path: Path) -> None:
    """Fsync a file, or a folder's list of entries (not the files in it)."""
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
    """Remove a temporary file or folder if it still exists, ignoring errors."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()


def hash64(content: bytes) -> int:
    """Return a hash of 64 bits that is the same in every process, to compare many texts without keeping them."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def file_sha256(path: Path | str) -> str:
    """Return the sha256 of a file's bytes as a hexadecimal string."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
