"""The fastest product for each quantized weight on this machine, measured once on a small problem and cached in a file.

A product that gives wrong results here, or that this torch version lacks, is never used. One file in the user's cache
serves all models; its keys include CPU, threads and versions. Deleting it only costs a new measurement.
"""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmctl import __version__
from llmctl.errors import OutputError
from llmctl.files import cache_folder, parse_json, write_bytes
from llmctl.kernels.compiled_step import Tiles, compiled_kinds, find_library
from llmctl.machine import processor_name
from llmctl.quant.linear import QuantLinear
from llmctl.quant.products import PRODUCTS, ROWS, Product, Table, plain
from llmctl.quant.schemes import SCHEMES, Scheme

LARGEST_SIDE = 2048
"""The largest size to measure; sides of weights are rounded up to a power of two, at most to this."""

LARGEST_ERROR = 0.02
"""The largest relative error (in norm) against the plain product; bfloat16 gives 0.003, 8-bit inputs 0.01."""

ROUNDS, CALLS = 4, 3
"""The fastest round counts: interference by other processes only makes a round slower."""

LONGEST_SECONDS = 0.1
"""No new round starts after this time."""

REFERENCE = "bfloat16"
"""The name of the product with a plain bfloat16 weight, measured for comparison."""

Seconds = dict[str, float]


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


def read_measured() -> dict[str, dict[str, Seconds]]:
    """Read the measurements of all machines; empty if the file is missing or damaged."""
    try:
        content = parse_json(products_path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if is_measured(content) else {}


def is_measured(content: Any) -> bool:
    """Tell whether parsed JSON is a mapping machine -> problem -> product -> seconds."""
    return isinstance(content, dict) and all(
        isinstance(problems, dict)
        and all(
            isinstance(times, dict) and times and all(isinstance(seconds, float) for seconds in times.values())
            for times in problems.values()
        )
        for problems in content.values()
    )


class Measured(Table):
    """A table of products that measures missing entries on demand; with `again`, it ignores the file."""

    def __init__(self, *, again: bool = False) -> None:
        library = find_library()
        self.tiles = None if library is None else Tiles(library)
        compiled = compiled_kinds(self.tiles)
        self.kinds = {**PRODUCTS, **compiled}
        self.machine = machine_key() + (" | compiled" if compiled else "")
        self.known = {} if again else read_measured().get(self.machine, {})

    def __call__(self, scheme: Scheme, n_out: int, n_in: int, n_rows: int) -> str:
        """Return the fastest correct product."""
        names = self.fitting(scheme, n_out, n_in)
        # Nothing to choose from: no measurement.
        if names == ["plain"]:
            return "plain"
        times = self.times(scheme, n_out, n_in, n_rows)
        return min((name for name in names if name in times), key=times.__getitem__, default="plain")

    def times(self, scheme: Scheme, n_out: int, n_in: int, n_rows: int) -> Seconds:
        """Return the seconds of every correct product, and of the bfloat16 reference."""
        n_out, n_in = measured_side(n_out), measured_side(n_in)
        problem = f"{name_of(scheme)} {n_out}x{n_in} {n_rows}"
        if problem not in self.known:
            self.known[problem] = measure(self, scheme, n_out, n_in, n_rows)
            self._store()
        return self.known[problem]

    def _store(self) -> None:
        content = read_measured()  # read again: another process may have added entries
        content[self.machine] = {**content.get(self.machine, {}), **self.known}
        with suppress(OutputError):
            write_bytes(products_path(), json.dumps(content, indent=1).encode())


def measured_side(size: int) -> int:
    """Round a side of a weight to the size that is measured in its place."""
    return min(LARGEST_SIDE, max(256, 1 << (size - 1).bit_length()))


def name_of(scheme: Scheme) -> str:
    """Return a scheme's key in the file."""
    zeros = "symmetric" if scheme.symmetric else "zeros"
    return f"{scheme.bits}-bit group {scheme.group} {zeros} inputs {scheme.activations}"


@torch.inference_mode()
def measure(table: Table, scheme: Scheme, n_out: int, n_in: int, n_rows: int) -> Seconds:
    """Time every product that is correct on a random weight, in seconds."""
    generator = torch.Generator().manual_seed(0)
    layer = random_layer(scheme, n_out, n_in, generator)
    x_NI = torch.randn(n_rows, n_in, generator=generator)
    expected_NO = plain(layer)(x_NI)  # correctness first: a fast kernel may be wrong on some CPU
    products: dict[str, Product] = {}
    for name in table.fitting(scheme, n_out, n_in):
        if name != "plain":
            with suppress(RuntimeError, TypeError, AttributeError):  # unsupported by this torch version or CPU
                product = table.kinds[name].make(layer)
                error = (product(x_NI) - expected_NO).norm() / expected_NO.norm()
                if float(error) < LARGEST_ERROR:
                    products[name] = product
    if not products:
        products["plain"] = plain(layer)
    weight_OI, narrow_NI = layer.dequantized(torch.bfloat16), x_NI.bfloat16()
    products[REFERENCE] = lambda _x: F.linear(narrow_NI, weight_OI)
    best = dict.fromkeys(products, float("inf"))
    started = time.perf_counter()
    # Rounds alternate between products and keep the minimum, so that a busy machine favors none.
    for _ in range(ROUNDS):
        for name, product in products.items():
            best[name] = min(best[name], seconds_of(product, x_NI))
        # Slow products on large weights: one round tells enough.
        if time.perf_counter() - started > LONGEST_SECONDS:
            break
    return best


def seconds_of(product: Product, x_NI: Tensor) -> float:
    """Return the mean seconds of `CALLS` calls."""
    start = time.perf_counter()
    for _ in range(CALLS):
        product(x_NI)
    return (time.perf_counter() - start) / CALLS


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


def survey() -> list[dict[str, Any]]:
    """Measure the fastest product by scheme and number of rows, with its speed relative to bfloat16."""
    table = Measured(again=True)
    rows = []
    for name in ("int8", "w8a8", "int4"):
        for n_rows in ROWS:
            times = table.times(SCHEMES[name], LARGEST_SIDE, LARGEST_SIDE, n_rows)
            product = table(SCHEMES[name], LARGEST_SIDE, LARGEST_SIDE, n_rows)
            speed = times[REFERENCE] / times[product]
            rows.append({"scheme": name, "rows": n_rows, "product": product, "speed": speed})
    return rows


def render_survey(rows: list[Mapping[str, Any]]) -> list[str]:
    """Format the survey as a table: a line per scheme, a column per number of rows."""
    schemes = list(dict.fromkeys(row["scheme"] for row in rows))
    lines = [f"products   {LARGEST_SIDE} x {LARGEST_SIDE}, speed relative to bfloat16 by rows of the input"]
    lines.append("  scheme  " + "".join(f"{n_rows:>13}" for n_rows in ROWS))
    for scheme in schemes:
        own = [row for row in rows if row["scheme"] == scheme]
        cells = "".join(f"{row['product'].partition('_')[2] or row['product']:>9}{row['speed']:4.1f}" for row in own)
        lines.append(f"  {scheme:<8}{cells}")
    return lines
