"""Models of the Hugging Face Hub, named `org/name` or `org/name@REVISION`: from the local cache, else downloaded.

The cache is that of `huggingface_hub`, so that a model which another program downloaded is not downloaded again. Only
the files that llmctl reads are taken, and every one is verified against the size and the hash that the Hub lists. The
configuration comes last, so that an interrupted download never looks complete. huggingface_hub is imported only when a
name of this form is neither a path nor in the cache.
"""

import hashlib
import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from llmctl.data.sources import MODELS, READERS
from llmctl.errors import ArtifactError, LlmctlError, NotFoundError
from llmctl.files import discard, file_sha256, write_text, writing
from llmctl.formats.adapter import ADAPTER_WEIGHTS
from llmctl.formats.artifact import (
    ADAPTER_CONFIG,
    CONFIG,
    FILES,
    INDEX,
    PICKLES,
    WEIGHTS,
    few,
    is_name,
    refuse_pickle,
    shard_names,
)
from llmctl.tokenizer.load import KNOWN_FILES

T = TypeVar("T")

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/\w[\w.-]*", re.ASCII)
ADDRESS = re.compile(r"https?:/{1,2}huggingface\.co/(?!datasets/)([^/]+/[^/]+)/?")
LONGEST, LONGEST_REVISION = 96, 200
REVISION = re.compile(r"\w[\w./+-]*", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
SHORT_COMMIT = re.compile(r"[0-9a-f]{7,39}")
FILE_SUFFIXES = (*MODELS, *PICKLES, *READERS)
"""A name that ends so is the path of a file: the Hub is not asked for it."""
ANSWER_SECONDS = 2.0
"""How long the Hub has for its first answer, name resolution included; HF_HUB_ETAG_TIMEOUT sets another time."""
FILE_SECONDS = 10.0
"""How long it has for the metadata of a file, once it has answered."""
TRIES = 3
"""How often a file is begun anew, or asked for after an error of the server."""


@dataclass(frozen=True)
class Reference:
    """A repository of the Hub and the revision that is meant: a branch, a tag or a commit."""

    repository: str
    revision: str = "main"

    def __str__(self) -> str:
        return self.repository if self.revision == "main" else f"{self.repository}@{self.revision}"


def parse(name: str) -> Reference | None:
    """Return the repository that a name means: `org/name[@REVISION]`, its web address, or its place in a cache.

    None for a path: one whose first folder exists here, or which names a file.
    """
    if place := in_cache(Path(name)):
        return place
    address = ADDRESS.fullmatch(name)
    repository, at, revision = (address[1] if address else name).partition("@")
    is_name = (
        REPOSITORY.fullmatch(repository) and len(repository) <= LONGEST and ".." not in name and "--" not in repository
    )
    if not is_name or repository.lower().endswith((*FILE_SUFFIXES, ".git", "-", ".")):
        return None
    if (at and not (REVISION.fullmatch(revision) and len(revision) <= LONGEST_REVISION)) or (
        not address and Path(repository).parent.exists()
    ):
        return None
    return Reference(repository, revision or "main")


def in_cache(path: Path) -> Reference | None:
    """Return the repository and commit of a folder in a cache of the Hub, or of a file directly in it."""
    for folder in (path, path.parent):
        owner = folder.parent.parent.name
        if folder.parent.name == "snapshots" and owner.startswith("models--") and COMMIT.fullmatch(folder.name):
            return Reference(owner.removeprefix("models--").replace("--", "/"), folder.name)
    return None


def named(path: Path | str) -> str:
    """Return the name under which a model is found everywhere: `org/name@commit` if it is the Hub's, else its path."""
    return str(in_cache(Path(path)) or path)


def shown(path: Path | str) -> str:
    """Return the same with a short commit, for messages."""
    place = in_cache(Path(path))
    return f"{place.repository}@{place.revision[:7]}" if place else str(path)


def label(path: Path | str) -> str:
    """Return the last part of a model's name, for the name of a run."""
    place = in_cache(Path(path))
    return place.repository.rpartition("/")[2] if place else Path(path).name.removesuffix(".safetensors")


def find(reference: Reference) -> Path:
    """Return the folder of a model of the Hub, downloaded if the cache lacks it or a part of it.

    Raises: NotFoundError if it does not exist, may not be read, or the Hub cannot be reached; ArtifactError for files
    that arrive damaged, and for a repository without safetensors; OutputError if the cache cannot be written.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    storage = Path(HF_HUB_CACHE) / f"models--{reference.repository.replace('/', '--')}"
    cached = cached_folder(storage, reference.revision)
    if cached is not None and has_tokenizer(cached):
        return cached
    try:
        return download(reference, storage)
    except UnreachableError:
        if cached is not None:  # without a tokenizer, of which another program had no need
            return cached
        raise


def cached_folder(storage: Path, revision: str) -> Path | None:
    """Return the folder of a revision in the cache if all of the model is there."""
    commit = revision
    ref = storage / "refs" / revision
    if ref.is_file():
        commit = ref.read_bytes()[:LONGEST].decode("utf-8", "replace").strip()
    elif SHORT_COMMIT.fullmatch(revision):
        commits = [path.name for path in (storage / "snapshots").glob(f"{revision}*")]
        commit = commits[0] if len(commits) == 1 else revision
    if not COMMIT.fullmatch(commit):
        return None
    folder = storage / "snapshots" / commit
    return folder if is_complete(folder) else None


def is_complete(folder: Path) -> bool:
    """Tell whether a folder has a model's configuration and all of its weights."""
    if (folder / CONFIG).is_file():
        if (folder / WEIGHTS).is_file():
            return True
        if (folder / INDEX).is_file():
            try:
                return all((folder / name).is_file() for name in shard_names(folder / INDEX))
            except ArtifactError:
                return False
    return (folder / ADAPTER_CONFIG).is_file() and (folder / ADAPTER_WEIGHTS).is_file()


def has_tokenizer(folder: Path) -> bool:
    """Tell whether a tokenizer lies beside a model; adapters use that of their base."""
    return (folder / ADAPTER_CONFIG).is_file() or any((folder / name).is_file() for name in KNOWN_FILES)


class UnreachableError(NotFoundError):
    """The Hub does not answer, or must not be asked."""


class GaveUpError(Exception):
    """A file was asked for too often; the message is the reason."""


@dataclass(frozen=True)
class Remote:
    """A file as the Hub lists it: sha256 for large files, the hash that git gives it (SHA-1) for others."""

    name: str
    size: int | None
    sha256: str
    git: str

    def defect(self, path: Path) -> str:
        """Return what is wrong with a downloaded file, or an empty string."""
        size = path.stat().st_size
        if self.size is not None and size != self.size:
            return f"it has {size:,} bytes instead of {self.size:,}"
        if self.sha256:
            return "" if file_sha256(path) == self.sha256 else "its SHA-256 is not the listed one"
        if self.git:
            content = path.read_bytes()
            digest = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
            return "" if digest == self.git else "its hash is not the listed one"
        return ""


def download(reference: Reference, storage: Path) -> Path:
    """Download the files of a model into the cache, verify them and return their folder."""
    commit, remote = listing(reference)
    names = wanted(reference.repository, sorted(remote))
    folder = storage / "snapshots" / commit
    # The revision is noted last: until then it does not lead to this folder.
    with writing(storage), watched():
        for name in names.first:
            fetch(reference, commit, remote[name])
        weights = list(names.weights)
        if INDEX in names.first:
            shards = shard_names(folder / INDEX)
            if missing := [name for name in shards if name not in remote]:
                raise ArtifactError(
                    f"`{INDEX}` of `{reference.repository}` lists {few(missing)}, which the repository lacks",
                    "use another revision: org/name@REVISION",
                )
            weights += shards
        for name in (*weights, *names.last):
            fetch(reference, commit, remote[name])
        if reference.revision != commit:
            write_text(storage / "refs" / reference.revision, commit)
    return folder


@dataclass(frozen=True)
class Wanted:
    """The files to download, in order."""

    first: list[str]
    weights: list[str]
    last: list[str]


def wanted(repository: str, listed: list[str]) -> Wanted:
    """Choose the files that llmctl reads; no other name of a listing is used.

    Raises: ArtifactError if there are no safetensors among them.
    """
    small = [name for name in FILES if name in listed]
    if WEIGHTS in listed or INDEX in listed:
        if CONFIG not in listed:
            raise ArtifactError(
                f"`{repository}` has no `{CONFIG}`, which says what the weights are",
                f"download it and pass its file: {by_hand(repository)}",
            )
        if WEIGHTS in listed:
            return Wanted(small, [WEIGHTS], [CONFIG])
        return Wanted([INDEX, *small], [], [CONFIG])
    if ADAPTER_CONFIG in listed and ADAPTER_WEIGHTS in listed:
        return Wanted(small, [ADAPTER_WEIGHTS], [ADAPTER_CONFIG])
    if pickles := [name for name in listed if Path(name).suffix in PICKLES and is_name(name)]:
        raise refuse_pickle(Path(repository) / pickles[0])
    if ggufs := [name for name in listed if name.endswith(".gguf")]:
        raise ArtifactError(
            f"`{repository}` has GGUF files, and no `{WEIGHTS}`",
            f"download one and convert it: hf download {repository} {ggufs[0][:80]} --local-dir . && llmctl import "
            f"{ggufs[0][:80]} -o MODEL",
        )
    raise ArtifactError(
        f"`{repository}` has no `{WEIGHTS}`: it holds {few(listed) or 'nothing'}",
        "pass the name of a repository with a model in safetensors",
    )


def listing(reference: Reference) -> tuple[str, dict[str, Remote]]:
    """Ask the Hub for the commit and the files of a revision.

    Raises: NotFoundError.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        raise unreachable(reference, "HF_HUB_OFFLINE is set, so the Hub is not asked")
    named = os.environ.get("HF_HUB_ETAG_TIMEOUT", "")
    seconds = float(named) if named.isdecimal() and int(named) else ANSWER_SECONDS

    def ask() -> Any:
        # Its timeout is that of every single step; all of them together are limited below.
        return HfApi().model_info(
            reference.repository, revision=reference.revision, files_metadata=True, timeout=2 * seconds
        )

    with reported(reference):
        try:
            info = within(seconds, ask)
        except TimeoutError:
            raise unreachable(reference, f"{host()} does not answer within {seconds:g} s") from None
        except (ValueError, TypeError, KeyError, AttributeError):  # a web page of a hotel, for example
            raise unreachable(reference, f"{host()} does not answer as the Hub does") from None
    files = [Remote(file.rfilename, file.size, sha256_of(file), file.blob_id or "") for file in info.siblings or []]
    if not COMMIT.fullmatch(str(info.sha)):
        raise unreachable(reference, f"{host()} does not answer as the Hub does")
    return str(info.sha), {file.name: file for file in files}


def sha256_of(file: Any) -> str:
    """Return the SHA-256 of a listed file; empty if it is not among the large ones."""
    return str(file.lfs.sha256) if file.lfs is not None else ""


def within(seconds: float, ask: Callable[[], T]) -> T:
    """Return the result of a call. Name resolution knows no timeout, so the call is left behind when time is up.

    Raises: TimeoutError, and what the call raises.
    """
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:  # noqa: BLE001 - handed to the caller
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return answer.result(seconds)


def fetch(reference: Reference, commit: str, file: Remote) -> None:
    """Download one file into the cache, unless it is there, and verify it; a damaged one is removed.

    Raises: ArtifactError.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        """One bar, also for the downloads that would show two."""

        def __init__(self, *arguments: Any, **settings: Any) -> None:
            shown_as = {"desc": file.name, "position": 0, "leave": False}
            super().__init__(*arguments, **(settings | shown_as))  # type: ignore[no-untyped-call]

        def update_transfer(self, n: float | None = 1) -> None:
            """Show nothing: the bytes are counted when they are written."""

    with reported(reference, file.name):
        path = Path(
            hf_hub_download(reference.repository, file.name, revision=commit, etag_timeout=FILE_SECONDS, tqdm_class=Bar)
        )
    if what := file.defect(path):
        discard(path.resolve())
        discard(path)
        raise damaged(reference, file.name, what)


@contextmanager
def watched() -> Iterator[None]:
    """Limit how often huggingface_hub begins a file anew, which it does without end, and keep its warnings back."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import logging as hub_logging

    asked: Counter[tuple[str, str]] = Counter()

    def watch(response: Any) -> None:
        request = response.request
        is_failure, is_start = response.status_code >= 500, request.method == "GET" and response.status_code == 200
        asked[request.method, str(request.url)] += is_failure or is_start
        if asked[request.method, str(request.url)] > TRIES - is_failure:
            raise GaveUpError(
                f"the server answers {response.status_code}"
                if is_failure
                else "the connection was lost again and again"
            )
        names = [response.headers.get(name, "").removeprefix("W/") for name in ("ETag", "X-Linked-ETag")]
        if request.method == "HEAD" and any(set(name) & set("/\\") for name in names):  # names of files in the cache
            raise GaveUpError("its hash is not one")

    session: Any = get_session()
    hooks, verbosity = session.event_hooks, hub_logging.get_verbosity()
    session.event_hooks = hooks | {"response": [*hooks["response"], watch]}
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        session.event_hooks = hooks
        hub_logging.set_verbosity(verbosity)


@contextmanager
def reported(reference: Reference, file: str = "") -> Iterator[None]:
    """Turn the errors of huggingface_hub into ours, while it lists a repository or downloads a file of it.

    Raises: NotFoundError, ArtifactError.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    http_error: type[Exception] = HfHubHTTPError.__bases__[0]  # of httpx, or of httpx2 in newer versions
    try:
        yield
    except (LocalEntryNotFoundError, http_error, GaveUpError) as error:
        raise as_ours(error, reference, file) from error
    except OSError as error:
        if error.errno is not None or not file:
            raise
        sizes = re.search(r"of size (\d+) but has size (\d+)", str(error))
        what = f"it has {int(sizes[2]):,} bytes instead of {int(sizes[1]):,}" if sizes else reason_of(error)
        raise damaged(reference, file, what) from error


def as_ours(error: Exception, reference: Reference, file: str) -> LlmctlError:
    """Return the error for one of huggingface_hub: no such model, no access, no network."""
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository = reference.repository
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__
    if isinstance(error, GatedRepoError):
        return NotFoundError(
            f"`{repository}` is gated: its authors give access to those who accept its license",
            f"accept it at {ENDPOINT}/{repository}, then run `hf auth login` or set HF_TOKEN",
        )
    if isinstance(error, RevisionNotFoundError):
        return NotFoundError(
            f"`{repository}` on the Hub has no revision `{reference.revision}`",
            f"its branches and tags are listed at {ENDPOINT}/{repository}/tree/main",
        )
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    reason = f"{host()} answers {status}" if status else reason_of(error)
    login = "for a private model run `hf auth login` or set HF_TOKEN"
    if file:
        hint = login if status in (401, 403) else "run the command again: files that are complete are kept"
        return NotFoundError(f"`{file}` of `{repository}` cannot be downloaded: {reason}", hint)
    if isinstance(error, RepositoryNotFoundError) or status in (401, 404):
        return NotFoundError(
            f"there is no folder `{repository}` here, and no such model on the Hub (or it is private)",
            f"check the spelling; {login}",
        )
    return unreachable(reference, reason if status else f"{host()} cannot be reached: {reason}")


def reason_of(error: BaseException) -> str:
    """Return the first line of the error that is at the bottom of another."""
    while error.__cause__ is not None and not isinstance(error, LlmctlError):
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")


def damaged(reference: Reference, file: str, what: str) -> ArtifactError:
    """Return the error for a file that arrives with other content than the Hub lists."""
    return ArtifactError(
        f"`{file}` of `{reference.repository}` arrived damaged: {what}",
        "run the command again: the file is downloaded anew",
    )


def unreachable(reference: Reference, reason: str) -> UnreachableError:
    """Return the error for a name that is not in the cache while the Hub cannot be asked."""
    return UnreachableError(
        f"`{reference}` is neither a folder here nor in the cache of the Hub, and {reason}",
        f"download it where there is a network, and pass the folder: {by_hand(str(reference.repository))}",
    )


def host() -> str:
    """Return the name of the Hub's server."""
    from huggingface_hub.constants import ENDPOINT

    return urlsplit(ENDPOINT).netloc or ENDPOINT


def by_hand(repository: str) -> str:
    """Return the command that downloads a repository into a folder."""
    return f"hf download {repository} --local-dir {repository.rpartition('/')[2]}"
