"""Every system call of a save, killed or failed in turn: there is always a valid checkpoint, and the next save works.

usage: python -m tests.crash.syscalls [--sample N]

strace notes the calls that change the file system (or open or close something) while one checkpoint is saved and the
older one is rotated away; then each of them is hit, one per save, by SIGKILL, by ENOSPC and by EIO. A save that is
killed leaves the old checkpoint or the new one; one that meets an error says so as an OutputError, the next one in
the same process works, and a rotation that meets one is no failed save. Two saves are taken apart: of a new step,
and of one whose damaged checkpoint is in the way. Prints one line of JSON.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from llmctl.distributed.sharding import whole
from llmctl.errors import OutputError
from llmctl.runs import checkpoint
from tests.crash import forked

CALLS = (
    "open,openat,creat,write,writev,pwrite64,ftruncate,fallocate,fsync,fdatasync,rename,renameat,renameat2,"
    "link,linkat,symlink,symlinkat,mkdir,mkdirat,unlink,unlinkat,rmdir,chmod,fchmod,fchmodat,close"
)
FAULTS = ("signal=SIGKILL", "error=ENOSPC", "error=EIO")
SCENARIOS = ("new", "damaged")


class Point(NamedTuple):
    """The n-th call of its name in a save, and what befalls it."""

    scenario: str
    call: str
    n: int
    fault: str


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(64, 32, generator=generator)
    return {"model": {"w": weight}, "optimizer": {"adamw/w/exp_avg": weight / 2, "adamw/w/step": torch.tensor(1.0)}}


def save(folder: Path, step: int) -> None:
    """Save a step as the loop does, and rotate all older ones away."""
    store = checkpoint.Store(folder)
    store.save(step, *[whole(named) for named in tensors(step).values()], {"step": step, "losses": [1.0] * 128})
    store.rotate(1)


def prepare(folder: Path, scenario: str) -> None:
    """Let there be a valid checkpoint of step 1, and perhaps a damaged one of step 2."""
    if scenario == "damaged":
        save(folder, 2)
        (folder / checkpoint.name_of(2) / checkpoint.STATE).write_text("{}")
    save(folder, 1)
    if scenario == "damaged":  # rotation keeps it: no newer one is valid
        assert len(checkpoint.published(folder)) == 2


def check(folder: Path, steps: set[int]) -> str:
    """Return what is wrong with the newest checkpoint, which must be of one of these steps, or an empty string."""
    found, _ = checkpoint.Store(folder).load_newest()
    step = found.state["step"]
    if step not in steps or checkpoint.step_of(found.path) != step:
        return f"the newest valid checkpoint is of step {step}, not of {steps}"
    for kind, named in tensors(step).items():
        if any(not torch.equal(tensor, found.read(kind, name)) for name, tensor in named.items()):
            return f"the checkpoint of step {step} holds other tensors"
    return ""


@dataclass
class Tracer:
    """Saves under strace, each in a forked child that has torch already."""

    folder: Path

    def run(self, folder: Path, *options: str, again: bool) -> tuple[int | None, str, str]:
        """Save step 2 (and step 3 afterwards); return the exit code, the trace, and what the child said."""
        ready, go = os.pipe()
        log, trace = self.folder / "child.log", self.folder / "trace"

        def action() -> None:
            os.close(go)
            os.read(ready, 1)  # until the tracer is there
            problem = None
            try:
                save(folder, 2)
            except OutputError as error:
                problem = error
            if again:
                save(folder, 3)
            if problem is not None:
                raise problem

        child = forked.start(action, log)
        os.close(ready)
        command = ["strace", "-o", str(trace), "-e", f"trace={CALLS}", *options, "-p", str(child.pid)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
            assert tracer.stderr is not None
            said = tracer.stderr.readline()
            if "attached" not in said:
                child.kill()
                raise RuntimeError(f"strace cannot attach: {said}")
            os.write(go, b"x")
            os.close(go)
            tracer.stderr.read()
        code = child.wait()
        return code, trace.read_text(encoding="utf-8"), log.read_text(encoding="utf-8")

    def points(self, scenario: str) -> list[Point]:
        """Return the calls of one save, with every fault."""
        folder = self.folder / f"{scenario}-base"
        prepare(folder, scenario)
        code, trace, said = self.run(folder, again=False)
        assert code == 0, said
        # The child's end closes nothing by itself, so all calls are the save's.
        seen: Counter[str] = Counter()
        found = []
        for call in re.findall(r"^(\w+)\(", trace, re.MULTILINE):
            if call in CALLS.split(","):
                seen[call] += 1
                found.append((call, seen[call]))
        return [Point(scenario, call, n, fault) for fault in FAULTS for call, n in found]

    def hit(self, point: Point) -> tuple[str, str]:
        """Let a fault befall a save; return what came of it, and what is wrong with that, if anything."""
        with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
            folder = Path(temporary) / "checkpoints"
            prepare(folder, point.scenario)
            is_kill = point.fault.startswith("signal")
            inject = f"inject={point.call}:{point.fault}:when={point.n}"
            code, trace, said = self.run(folder, "-e", inject, again=not is_kill)
            if is_kill:
                if code != -9:
                    return "missed", f"the child ended with {code}"
                problem = check(folder, {1, 2})
                came = f"step {checkpoint.Store(folder).load_newest()[0].state['step']}"
                checkpoint.Store(folder).sweep()
                save(folder, 3)
            else:
                if "(INJECTED)" not in trace:
                    return "missed", "no call was hit"
                came = {0: "saved", 8: "said"}.get(code or 0, f"exit code {code}")
                problem = "" if code in (0, 8) else said
                checkpoint.Store(folder).sweep()
            problem = problem or check(folder, {3})
            left = sorted(path.name for path in folder.iterdir() if path.name != checkpoint.name_of(3))
            if is_kill and left and not problem:
                problem = f"{left} is left"
            return came, problem


def main(sample: int) -> bool:
    """Sweep all points, or evenly spread ones; print the line of JSON; tell whether nothing was lost."""
    begun = time.monotonic()
    came: Counter[str] = Counter()
    n_calls = {}
    n_failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        tracer = Tracer(Path(temporary))
        save(tracer.folder / "warm", 1)  # what is imported on the way is imported here
        every: list[Point] = []
        for scenario in SCENARIOS:
            points = tracer.points(scenario)
            n_calls[scenario] = len(points) // len(FAULTS)
            every += points
        chosen = every if not sample else [every[index * len(every) // sample] for index in range(sample)]
        for point in chosen:
            result, problem = tracer.hit(point)
            came[f"{point.fault}: {result}"] += 1
            if problem:
                n_failed += 1
                sys.stderr.write(f"{point}: {result}: {problem}\n")
    report = {
        "calls_of_a_save": n_calls,
        "points": len(chosen),
        "ok": len(chosen) - n_failed,
        "came": dict(sorted(came.items())),
        "seconds": round(time.monotonic() - begun, 1),
    }
    print(json.dumps(report), flush=True)  # noqa: T201  the result of the command
    return n_failed == 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=0, help="this many points instead of all")
    sys.exit(0 if main(parser.parse_args().sample) else 1)
