"""The fastest product for each quantized weight on this machine, measured on a small problem and cached in a file.

A product that gives wrong results here, or that this torch version lacks, is never used. One file in the user's cache
serves all models; its keys include CPU, threads and versions. Deleting it only costs a new measurement. What was
measured beside other busy processes, or contradicts what more rows took, is measured again by a later process: the
minimum of the two counts.
"""

import json
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmctl import __version__
from llmctl.errors import OutputError
from llmctl.files import cache_folder, parse_json, write_bytes
from llmctl.kernels.compiled_step import Tiles, compiled_kinds, find_library
from llmctl.losses.logits import is_native
from llmctl.machine import BEHIND, FEWEST_ROUNDS, processor_name, race, seconds_of
from llmctl.quant.linear import QuantLinear
from llmctl.quant.products import PRODUCTS, ROWS, Product, Table, plain
from llmctl.quant.schemes import SCHEMES, Scheme

LARGEST_SIDE = 2048
"""The largest size to measure; sides of weights are rounded up to a power of two, at most to this."""

LARGEST_ERROR = 0.02
"""The largest relative error (in norm) against the plain product; bfloat16 gives 0.003, 8-bit inputs 0.01."""

MOST_ROUNDS = 20
ROUNDS_SECONDS = 0.02
"""Beyond the fewest rounds, this much time is spent on more."""

REFERENCES = ("float32", "bfloat16")
"""Products with a plain weight, measured for comparison."""

MOST_MEASUREMENTS = 3
"""How often a doubtful problem is measured, once in a process."""

CONTRADICTION = 1.1
"""How much slower few rows may be than more rows."""

SWITCHES_PER_SECOND = 30
"""Involuntary context switches, from which other processes are thought to have disturbed a measurement."""

Seconds = dict[str, float]


class Entry(NamedTuple):
    """The measurements of a problem: the fewest seconds by product, how often it was measured, and if in peace."""

    seconds: Seconds
    n_measurements: int = 1
    is_disturbed: bool = False

    def joined(self, other: "Entry | None") -> "Entry":
        """Return both measurements as one."""
        if other is None:
            return self
        best = {name: min(self.seconds.get(name, seconds), seconds) for name, seconds in other.seconds.items()}
        n_measurements = self.n_measurements + other.n_measurements
        return Entry({**self.seconds, **best}, n_measurements, self.is_disturbed and other.is_disturbed)


def machine_key() -> str:
    """Return the key of everything that the speed of a product depends on: CPU, threads and versions."""
    return " | ".join(
        [
            processor_name(),
            torch.backends.cpu.get_cpu_capability(),
            f"{torch.get_num_threads()} threads",
            f"torch {torch.__version__}",
            f"llmctl {__version__}",
        ]
    )


def products_path() -> Path:
    """Return the file with the measurements."""
    return cache_folder() / "products.json"


def read_measured() -> dict[str, dict[str, Entry]]:
    """Read the measurements of all machines; empty if the file is missing or damaged."""
    try:
        content = parse_json(products_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not is_measured(content):
        return {}
    return {name: {key: Entry(*entry) for key, entry in problems.items()} for name, problems in content.items()}


def is_measured(content: Any) -> bool:
    """Tell whether parsed JSON is a mapping machine -> problem -> the fields of an `Entry`."""
    return isinstance(content, dict) and all(
        isinstance(problems, dict) and all(map(is_entry, problems.values())) for problems in content.values()
    )


def is_entry(fields: Any) -> bool:
    """Tell whether parsed JSON has the fields of an `Entry`."""
    if not (isinstance(fields, list) and len(fields) == len(Entry._fields)):
        return False
    times, n_measurements, is_disturbed = fields
    is_times = isinstance(times, dict) and times and all(isinstance(seconds, float) for seconds in times.values())
    return bool(is_times) and isinstance(n_measurements, int) and isinstance(is_disturbed, bool)


class Measured(Table):
    """A table of products that measures missing entries on demand; with `again`, it ignores the file."""

    def __init__(self, *, again: bool = False) -> None:
        library = find_library()
        self.tiles = None if library is None else Tiles(library)
        compiled = compiled_kinds(self.tiles)
        self.kinds = {**PRODUCTS, **compiled}
        self.machine = machine_key() + (" | compiled" if compiled else "")
        self.known = {} if again else read_measured().get(self.machine, {})
        self.settled: set[str] = set()

    def __call__(self, scheme: Scheme, n_out: int, n_in: int, n_rows: int) -> str:
        """Return the fastest correct product."""
        names = self.fitting(scheme, n_out, n_in)
        times = self.times(scheme, n_out, n_in, n_rows)
        return min((name for name in names if name in times), key=times.__getitem__, default="plain")

    def times(self, scheme: Scheme, n_out: int, n_in: int, n_rows: int) -> Seconds:
        """Return the seconds of every correct product that may be the fastest, and of the references."""
        n_out, n_in = measured_side(n_out), measured_side(n_in)
        problem = partial("{} {}x{} {}".format, name_of(scheme), n_out, n_in)
        key = problem(n_rows)
        if key not in self.settled:
            self.settled.add(key)
            known = self.known.get(key)
            larger = [self.known[problem(n)] for n in ROWS if n > n_rows and problem(n) in self.known]
            if known is None or is_doubtful(known, larger):
                entry = measure(self, scheme, n_out, n_in, n_rows)
                self.known[key] = entry.joined(known)
                self._store(key, entry)
        return self.known[key].seconds

    def _store(self, key: str, entry: Entry) -> None:
        content = read_measured()  # read again: another process may have added entries
        problems = content.setdefault(self.machine, {})
        problems[key] = entry.joined(problems.get(key))
        with suppress(OutputError):
            write_bytes(products_path(), json.dumps(content, indent=1).encode())


def is_doubtful(entry: Entry, larger: Sequence[Entry]) -> bool:
    """Tell whether to measure a problem again: it was disturbed, or what more rows took less time for contradicts it.

    larger: what is known of the same problem with more rows.
    """
    if entry.n_measurements >= MOST_MEASUREMENTS:
        return False
    return entry.is_disturbed or any(contradicts(other.seconds, entry.seconds) for other in larger)


def contradicts(many: Seconds, few: Seconds) -> bool:
    """Tell whether a product, or the fastest one, took longer with few rows than with many."""
    fastest = [min((times[name] for name in times if name not in REFERENCES), default=0.0) for times in (many, few)]
    pairs = [(seconds, few[name]) for name, seconds in many.items() if name in few]
    return any(longer > CONTRADICTION * shorter for shorter, longer in [*pairs, tuple(fastest)])


def measured_side(size: int) -> int:
    """Round a side of a weight to the size that is measured in its place."""
    return min(LARGEST_SIDE, max(256, 1 << (size - 1).bit_length()))


def name_of(scheme: Scheme) -> str:
    """Return a scheme's key in the file."""
    zeros = "symmetric" if scheme.symmetric else "zeros"
    return f"{scheme.bits}-bit group {scheme.group} {zeros} inputs {scheme.activations}"


@torch.inference_mode()
def measure(table: Table, scheme: Scheme, n_out: int, n_in: int, n_rows: int) -> Entry:
    """Time the products that are correct on a random weight; those that are far behind only until that is clear."""
    started, n_switches = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    generator = torch.Generator().manual_seed(0)
    layer = random_layer(scheme, n_out, n_in, generator)
    x_NI = torch.randn(n_rows, n_in, generator=generator)
    usual = partial(plain(layer), x_NI)
    outputs: list[Tensor] = []
    seconds = {"plain": seconds_of(lambda: outputs.append(usual()))}
    expected_NO = outputs[0]  # correctness first: a fast kernel may be wrong on some CPU
    calls: dict[str, Callable[[], object]] = {"plain": usual}
    skipped = ("plain",) if is_native(torch.bfloat16) else ("plain", "narrow")
    for name in table.fitting(scheme, n_out, n_in):
        if name in skipped:
            continue
        with suppress(RuntimeError, TypeError, AttributeError):  # unsupported by this torch version or CPU
            product = table.kinds[name].make(layer)
            limit = BEHIND * min(seconds.values())
            if (found := trial(product, x_NI, expected_NO, limit)) is not None:
                calls[name], seconds[name] = partial(product, x_NI), found
    # The rounds alternate, so that a busy machine favors none.
    n_rounds = max(FEWEST_ROUNDS - 1, min(MOST_ROUNDS, int(ROUNDS_SECONDS / sum(seconds.values()))))
    best = race(calls, first=seconds, rounds=n_rounds)
    best |= references(n_out, n_in, n_rows, torch.get_num_threads())
    elapsed = time.perf_counter() - started
    n_switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - n_switches
    return Entry(best, 1, n_switches > 1 + SWITCHES_PER_SECOND * elapsed)


@cache
def references(n_out: int, n_in: int, n_rows: int, _n_threads: int) -> Seconds:
    """Return the seconds of products with a plain weight; bfloat16 only where the CPU has instructions for it."""
    products = {}
    for dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.float32 or is_native(dtype):
            weight_OI, x_NI = torch.ones(n_out, n_in, dtype=dtype), torch.ones(n_rows, n_in, dtype=dtype)
            products[str(dtype).removeprefix("torch.")] = partial(F.linear, x_NI, weight_OI)
    return {name: race({name: product})[name] for name, product in products.items()}


def trial(product: Product, x_NI: Tensor, expected_NO: Tensor, limit: float) -> float | None:
    """Return the seconds of a first call, None for a product that is wrong or takes longer than `limit`.

    Few rows come first: a product that takes too long for them need not be tried with all.
    """
    seconds = 0.0
    for n_rows in [*(n for n in ROWS if n < len(x_NI)), len(x_NI)]:
        part_NI, outputs = x_NI[:n_rows], []
        seconds = seconds_of(lambda: outputs.append(product(part_NI)))  # noqa: B023 - called at once
        error = (outputs[0] - expected_NO[:n_rows]).norm() / expected_NO[:n_rows].norm()
        if not float(error) < LARGEST_ERROR:
            return None
        # A first call may take longer than others, to prepare a kernel.
        if seconds > limit and (seconds := min(seconds, seconds_of(partial(product, part_NI)))) > limit:
            return None
    return seconds


def random_layer(scheme: Scheme, n_out: int, n_in: int, generator: torch.Generator) -> QuantLinear:
    """Return a layer with random codes."""
    layer = QuantLinear(n_in, n_out, scheme, bias=False)
    randomize(layer, generator)
    return layer


def randomize(layer: QuantLinear, generator: torch.Generator) -> None:
    """Fill a layer with random codes, scales and zero points; weights have the magnitude of an initialized model's.

    All scales differ, so that a product that mixes them up fails the check.
    """
    for name, buffer in layer.named_buffers(recurse=False):
        if name in ("weight_packed", "weight_zero_point"):
            buffer.random_(-(2**31), 2**31 - 1, generator=generator)
        elif name == "weight_scale":
            buffer.uniform_(0.5, 1.5, generator=generator).mul_(0.07 / layer.scheme.levels)


def give_table(model: nn.Module, table: Table) -> None:
    """Make all quantized layers of a model choose their products by a table."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.table = table


SURVEYED = ("int8", "w8a8", "int4")


def survey() -> list[dict[str, Any]]:
    """Measure the fastest product by scheme and number of rows, with its speed relative to float32."""
    table = Measured(again=True)
    rows = []
    for name in SURVEYED:
        for n_rows in ROWS:
            times = table.times(SCHEMES[name], LARGEST_SIDE, LARGEST_SIDE, n_rows)
            product = table(SCHEMES[name], LARGEST_SIDE, LARGEST_SIDE, n_rows)
            speed = times["float32"] / times[product]
            rows.append({"scheme": name, "rows": n_rows, "product": product, "speed": speed})
            if name == SURVEYED[0] and "bfloat16" in times:
                speed = times["float32"] / times["bfloat16"]
                rows.append({"scheme": "bfloat16", "rows": n_rows, "product": "plain", "speed": speed})
    return sorted(rows, key=lambda row: row["scheme"] != "bfloat16")


NEARLY = 0.9
"""The speed relative to float32 below which a scheme is said to be slower."""


def render_survey(rows: list[Mapping[str, Any]]) -> list[str]:
    """Format the survey as a table: a line per scheme, a column per number of rows."""
    schemes = list(dict.fromkeys(row["scheme"] for row in rows))
    lines = [f"products   {LARGEST_SIDE} x {LARGEST_SIDE}, speed relative to float32 by rows of the input"]
    lines.append("  scheme  " + "".join(f"{n_rows:>13}" for n_rows in ROWS))
    for scheme in schemes:
        own = [row for row in rows if row["scheme"] == scheme]
        cells = "".join(f"{row['product'].partition('_')[2] or row['product']:>9}{row['speed']:4.1f}" for row in own)
        lines.append(f"  {scheme:<8}{cells}")
    for scheme in schemes:
        slow = [str(row["rows"]) for row in rows if row["scheme"] == scheme and row["speed"] < NEARLY]
        if slow:
            lines.append(f"{scheme} is slower than float32 on this machine with {', '.join(slow)} rows")
    return lines
