"""Fuzz the readers: `python -m tests.fuzz.run --inputs 100000`; prints counts and ends with 1 if anything failed.

Every input has a target and a number, and follows from both: `--only TARGET:NUMBER --keep FOLDER` writes its files.
Anything but success and LlmctlError counts as a failure: another exception, a panic, an abort, more memory than the
limit, more than 10 seconds.
"""

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from tests.fuzz.targets import TARGETS
from tests.fuzz.worker import inputs

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 10.0
START_SECONDS = 120.0
"""For the first input of a process, which loads the libraries."""


class Worker:
    """A process that reads inputs; it is replaced when it dies or hangs."""

    def __init__(self, seeds: Path, scratch: Path) -> None:
        self.seeds, self.scratch = seeds, scratch
        self.process: subprocess.Popen[bytes] | None = None
        self.targets: set[str] = set()

    def ask(self, name: str, number: int) -> dict[str, str]:
        """Return what came of an input."""
        if self.process is None:
            self.scratch.mkdir(parents=True, exist_ok=True)
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.worker", str(self.seeds), str(self.scratch)],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self.targets = set()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{name} {number}\n".encode())
        self.process.stdin.flush()
        patience = SECONDS if name in self.targets else START_SECONDS
        self.targets.add(name)
        if not select.select([self.process.stdout], [], [], patience)[0]:
            self.end()
            return {"outcome": "hung", "where": f"more than {patience:g} s"}
        line = self.process.stdout.readline()
        if line:
            answer: dict[str, str] = json.loads(line)
            return answer
        code = self.process.wait()
        self.end()
        return {"outcome": "aborted", "where": signal.Signals(-code).name if code < 0 else f"exit code {code}"}

    def end(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            for pipe in (self.process.stdin, self.process.stdout):
                if pipe is not None:
                    pipe.close()
            self.process.wait()
            self.process = None


def make_seeds(root: Path, names: Sequence[str]) -> None:
    """Write the seeds of targets."""
    for name in names:
        (root / name).mkdir(parents=True)
        with redirect_stdout(None), redirect_stderr(None):
            TARGETS[name].seeds(root / name)


def plan(names: Sequence[str], n_inputs: int, first: int) -> Iterator[tuple[str, int]]:
    """Yield (target, number), by weight, one target after the other in blocks."""
    whole = sum(TARGETS[name].weight for name in names)
    for name in names:
        for number in range(max(1, round(n_inputs * TARGETS[name].weight / whole))):
            yield name, first + number


def fuzz(names: Sequence[str], n_inputs: int, *, first: int = 0, workers: int = 1) -> tuple[Counter[str], list[str]]:
    """Fuzz targets and return the counts of outcomes, and a line for every failure."""
    with tempfile.TemporaryDirectory() as folder:
        seeds = Path(folder) / "seeds"
        make_seeds(seeds, names)
        every = list(plan(names, n_inputs, first))
        counts: Counter[str] = Counter()
        failures: list[str] = []

        def work(index: int) -> None:
            worker = Worker(seeds, Path(folder) / f"scratch-{index}")
            try:
                for name, number in every[index::workers]:
                    answer = worker.ask(name, number)
                    counts[f"{name} {answer['outcome']}"] += 1
                    if answer["outcome"] not in ("read", "refused"):
                        text = f"{name}:{number} {answer['outcome']} {answer['where']} {answer.get('message', '')}"
                        failures.append(text)
                        sys.stderr.write(ascii(text)[1:-1] + "\n")
            finally:
                worker.end()

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, range(workers)))
    return counts, failures


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000, help="number of inputs")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), help=f"of {', '.join(TARGETS)}")
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first input: another one gives other inputs"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--only", help="TARGET:NUMBER of one input to write with --keep")
    parser.add_argument("--keep", type=Path, help="folder for the files of --only")
    options = parser.parse_args()
    if options.only:
        name, number = options.only.split(":")
        with tempfile.TemporaryDirectory() as folder:
            make_seeds(Path(folder), [name])
            for file, data in inputs(name, int(number), Path(folder)).items():
                (options.keep / file).parent.mkdir(parents=True, exist_ok=True)
                (options.keep / file).write_bytes(data)
        return 0
    names = [name for name in options.targets if TARGETS[name].exists]
    begun = time.monotonic()
    counts, failures = fuzz(names, options.inputs, first=options.first, workers=options.workers)
    outcomes = ("read", "refused", "failed", "hung", "aborted")
    sys.stdout.write(f"{'target':<16}" + "".join(f"{outcome:>9}" for outcome in outcomes) + "\n")
    for name in names:
        row = "".join(f"{counts[f'{name} {outcome}']:>9,}" for outcome in outcomes)
        sys.stdout.write(f"{name:<16}{row}\n")
    places = Counter(line.split(" ", 1)[1].split("  ")[0] for line in failures)
    for place, count in places.most_common(40):
        sys.stdout.write(f"{count:>6}  {ascii(place)[1:-1]}\n")
    seconds = time.monotonic() - begun
    sys.stdout.write(f"{counts.total():,} inputs, {len(failures)} failures, {seconds:,.0f} s\n")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
