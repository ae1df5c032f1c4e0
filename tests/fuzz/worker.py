"""The process that reads mutated files: `python -m tests.fuzz.worker SEEDS SCRATCH`.

It takes lines `TARGET NUMBER` and answers each with a line of JSON. Memory is limited for all of them; the parent ends
the process when an answer takes too long, and starts another.
"""

import json
import os
import random
import shutil
import sys
import traceback
from pathlib import Path

from tests.fuzz.targets import TARGETS, Files, walk

MEMORY_BYTES = 3 << 30
"""On top of what the libraries map when they are loaded."""


def main(seeds: Path, scratch: Path) -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)  # libraries print what they think of a file
    os.dup2(quiet, 2)
    import torch

    torch.set_num_threads(1)
    is_limited = False
    for line in sys.stdin:
        name, number = line.split()
        outcome = run(name, int(number), seeds, scratch)
        answers.write(json.dumps(outcome) + "\n")
        answers.flush()
        if not is_limited and outcome["outcome"] in ("read", "refused"):  # its libraries are loaded
            is_limited = limit_memory()


def limit_memory() -> bool:
    """Limit the address space of this process, and raise the limit as libraries are loaded for other targets."""
    import resource

    mapped = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES, mapped + MEMORY_BYTES))
    return True


def inputs(name: str, number: int, seeds: Path) -> Files:
    """Return the files of one input: a seed with a few mutations, all of which follow from its number."""
    random_ = random.Random(f"{name} {number}")
    target = TARGETS[name]
    seed = random_.choice(sorted((seeds / name).iterdir()))
    files = {str(path.relative_to(seed)): path.read_bytes() for path in walk(seed)}
    for _ in range(random_.choice([1, 1, 1, 2, 3, 5])):
        known = [(file, suffix) for file in files for suffix in target.mutators if file.endswith(suffix)]
        known = [(file, suffix) for file, suffix in known if not file.startswith("base/")]
        file, suffix = random_.choice(known)
        files[file] = random_.choice(target.mutators[suffix])(files[file], random_)
    target.after(files, random_)
    return files


def run(name: str, number: int, seeds: Path, scratch: Path) -> dict[str, str]:
    """Read one input and return what came of it: read, refused, or failed with the place."""
    from llmctl.errors import LlmctlError

    folder = scratch / "input"
    try:
        for file, data in inputs(name, number, seeds).items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(data)
        TARGETS[name].read(folder)
    except LlmctlError as error:
        str(error).encode(errors="replace")
        return {"outcome": "refused", "where": type(error).__name__}
    except BaseException as error:  # noqa: BLE001 - a panic is no Exception, and everything else is what is sought
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "/llmctl/" in frame.filename and "/site-packages/" not in frame.filename]
        place = ours[-1] if ours else frames[-1]
        where = f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}"
        return {"outcome": "failed", "where": where, "message": str(error)[:200]}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"outcome": "read", "where": ""}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
