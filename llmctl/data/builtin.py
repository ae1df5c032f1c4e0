"""The default corpus: English reference text read from the user's own Python installation.

It consists of the language reference in `pydoc_data.topics` and the standard library's docstrings, near-duplicates
removed: about 2 MB. Nothing is redistributed; provenance records its digest and the Python version. Built once, then
cached.
"""

import ast
import gzip
import hashlib
import inspect
import json
import platform
import re
import sysconfig
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from llmctl.errors import NotFoundError, OutputError
from llmctl.files import cache_folder, hash64, write_bytes

MIN_CHARACTERS = 80
"""Shorter docstrings are skipped: they contain little text ("See base class.")."""

SKIPPED = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "ensurepip",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
SHINGLE_WORDS = 8
"""Shingle length: documents that share most of their 8-word sequences are near-duplicates."""

CACHE_VERSION = 2


def builtin_documents() -> list[str]:
    """Return the documents: topics of the language reference, then docstrings in module order."""
    return [str(text) for text in corpus()["documents"]]


def builtin_pairs() -> list[tuple[str, str]]:
    """Return (qualified name and signature, first sentence of the docstring) of the standard library's functions."""
    return [(str(source), str(target)) for source, target in corpus()["pairs"]]


def builtin_provenance() -> dict[str, Any]:
    """Describe the corpus: kind, Python version, sha256 and counts."""
    content = corpus()
    digest = hashlib.sha256(json.dumps([content["documents"], content["pairs"]]).encode()).hexdigest()
    documents = content["documents"]
    return {
        "kind": "builtin",
        "description": "pydoc_data.topics and the docstrings of Python's standard library",
        "python": platform.python_version(),
        "sha256": digest,
        "n_documents": len(documents),
        "n_pairs": len(content["pairs"]),
        "n_bytes": sum(len(text.encode()) for text in documents),
    }


def corpus() -> dict[str, Any]:
    """Return documents and pairs, from this Python's cache file if it is valid."""
    path = cache_path()
    content = read_cache(path)
    if content is None:
        content = build()
        store(path, content)
    return content


def read_cache(path: Path) -> dict[str, Any] | None:
    """Return the cached corpus; None if it is missing, damaged or unreadable."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error):
        return None
    return dict(content) if is_corpus(content) else None


def is_corpus(content: Any) -> bool:
    """Tell whether parsed JSON has the structure of the corpus."""
    return (
        isinstance(content, dict)
        and isinstance(content.get("documents"), list)
        and isinstance(content.get("pairs"), list)
        and all(isinstance(text, str) for text in content["documents"])
        and all(isinstance(pair, list) and len(pair) == 2 for pair in content["pairs"])
    )


def cache_path() -> Path:
    """Return the cache file of this Python version."""
    return (
        cache_folder()
        / f"builtin-{CACHE_VERSION}-{platform.python_implementation()}-{platform.python_version()}.json.gz"
    )


def store(path: Path, content: dict[str, Any]) -> None:
    """Cache the corpus; an unwritable folder is ignored, since rebuilding takes only seconds."""
    with suppress(OutputError):
        write_bytes(path, gzip.compress(json.dumps(content).encode(), compresslevel=1, mtime=0))


def build() -> dict[str, Any]:
    """Build the corpus from the Python installation.

    Raises: NotFoundError if it has neither topics nor docstrings (a stripped Python).
    """
    documents = topics()
    pairs: list[tuple[str, str]] = []
    for module, path in library_files():
        for name, signature, text in docstrings(module, path):
            if len(text) >= MIN_CHARACTERS:
                documents.append(text)
            sentence = first_sentence(text)
            if signature and len(sentence) >= 15:
                pairs.append((name + signature, sentence))
    if not documents:
        raise NotFoundError(
            f"the Python in `{sysconfig.get_paths()['stdlib']}` has neither `pydoc_data` nor docstrings to train on",
            "pass your own text: llmctl pretrain book.txt",
        )
    unique = dict(reversed(pairs))  # reversed: of equal sources, keep the first
    return {"documents": without_near_duplicates(documents), "pairs": sorted(unique.items())}


def topics() -> list[str]:
    """Return the topics of the language reference."""
    try:
        from pydoc_data.topics import topics as content
    except ImportError:  # some distributions package it separately
        return []
    return [text.strip() for _, text in sorted(content.items())]


def library_files() -> Iterator[tuple[str, Path]]:
    """Yield (module name, file) of the standard library's sources, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if not SKIPPED & set(parts) and not parts[0].startswith(("config-", "lib-dynload")):
            yield ".".join(part for part in parts if part != "__init__"), path


def docstrings(module: str, path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (qualified name, signature or "", docstring) of a file's module, classes and functions."""
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return
    if '"""' not in source and "'''" not in source:  # parsing is slow: skip files without multi-line docstrings
        return
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    stack: list[tuple[str, ast.AST]] = [(module, tree)]
    while stack:
        name, node = stack.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = raw_docstring(node)
            is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            if text:
                yield name, f"({ast.unparse(node.args)})" if is_function else "", text  # type: ignore[union-attr]
            inner = [child for child in node.body if hasattr(child, "name")]
            stack += [(f"{name}.{child.name}", child) for child in reversed(inner)]


def raw_docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return a node's docstring without indentation, empty if it has none."""
    if node.body and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant):
        value = node.body[0].value.value
        if isinstance(value, str):
            return inspect.cleandoc(value).strip().encode("utf-8", "ignore").decode()
    return ""


def first_sentence(text: str) -> str:
    """Return a docstring's first sentence on one line."""
    paragraph = " ".join(text.split("\n\n", 1)[0].split())
    return re.split(r"(?<=[.!?])\s", paragraph, maxsplit=1)[0]


def without_near_duplicates(documents: list[str]) -> list[str]:
    """Drop documents most of whose shingles occur in kept ones, so that train and held-out text do not overlap.

    Longest first: a short text contained in a long one is the duplicate, not the other way round.
    """
    seen: set[int] = set()
    kept: set[int] = set()
    for index in sorted(range(len(documents)), key=lambda i: -len(documents[i])):
        words = re.findall(r"\w+", documents[index].lower())
        shingles = {
            hash64(" ".join(words[at : at + SHINGLE_WORDS]).encode())
            for at in range(max(1, len(words) - SHINGLE_WORDS + 1))
        }
        if len(shingles & seen) <= len(shingles) // 2:
            kept.add(index)
            seen |= shingles
    return [text for index, text in enumerate(documents) if index in kept]
