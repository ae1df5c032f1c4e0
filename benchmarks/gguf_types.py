"""Compare GGUF types on a model: size, bits per weight, KL divergence and top-1 agreement with the original.

    python benchmarks/gguf_types.py MODEL TEXT [--dither] [--beside QUANTIZED ...] [--rows 12]

Rows of 256 tokens are spread over the text. `--dither` first moves every weight by a random fraction of a 4-bit step: a
model published on a 4-bit grid favors formats with that grid. If llama-cpp-python is installed, types quantized by
llama.cpp itself are included; `--beside` adds models made by `llmctl quantize`. Sizes count only tensors.
"""

import argparse
import contextlib
import ctypes
import gzip
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import gguf
import torch
from safetensors import safe_open

from llmctl.artifacts.load import load_model
from llmctl.converting.convert import import_model
from llmctl.converting.export_gguf import export_gguf
from llmctl.converting.gguf_check import distance, logits_of
from llmctl.formats.artifact import read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.formats.gguf.write import TYPES

LLAMA_TYPES = {"Q8_0": 7, "Q4_K_M": 15, "Q4_K_S": 14, "Q4_0": 2, "Q3_K_M": 12}
"""Values of `llama_ftype` in llama.cpp's header."""

ROW_TOKENS = 256


def dithered(source: Path, out: Path) -> Path:
    """Return a copy of a model with its weights moved off the Q4_1 grid."""
    artifact, generator = read_artifact(source), torch.Generator().manual_seed(0)
    state = artifact.state()
    for name, weight in state.items():
        if weight.dim() > 1 and name != "lm_head.weight":
            groups = weight.view(weight.shape[0], -1, 32)
            step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
            groups += (torch.rand(groups.shape, generator=generator) - 0.5) * step
    return write_artifact(out, artifact.config, state, files=artifact.files, provenance={})


def by_llama(source: Path, out: Path, kind: str) -> None:
    """Quantize a GGUF file with llama.cpp."""
    from llama_cpp import llama_model_quantize, llama_model_quantize_default_params

    settings = llama_model_quantize_default_params()
    settings.ftype, settings.nthread = LLAMA_TYPES[kind], 1
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        status = llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(settings))
    assert status == 0, f"llama.cpp cannot quantize this model to {kind}"


def files(source: Path, work: Path) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Yield the name of every type with a function that writes a file of it."""
    for kind in TYPES:
        yield kind, partial(export_gguf, source, kind=kind, force=True)
    if importlib.util.find_spec("llama_cpp"):
        export_gguf(source, work / "f32.gguf", kind="f32", force=True)
        for kind in LLAMA_TYPES:
            yield f"llama.cpp {kind}", partial(by_llama, work / "f32.gguf", kind=kind)


def tensor_bytes(path: Path) -> int:
    """Return the bytes of the tensors in a file of either format."""
    if path.suffix == ".gguf":
        return int(sum(tensor.n_bytes for tensor in gguf.GGUFReader(str(path)).tensors))
    with safe_open(path / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--dither", action="store_true")
    parser.add_argument("--beside", type=Path, nargs="*", default=[])
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--types", nargs="*", help='only these types, such as q4_K or "llama.cpp Q4_K_M"')
    options = parser.parse_args()
    content = gzip.decompress(options.text.read_bytes()) if options.text.suffix == ".gz" else options.text.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source = dithered(options.model, work / "dithered") if options.dither else options.model
        original = load_model(source, device="cpu", dtype="float32")
        assert original.tokenizer is not None
        ids = original.tokenizer.encode(content.decode()[:2_000_000])
        step = max(ROW_TOKENS, len(ids) // options.rows)
        rows = [ids[start : start + ROW_TOKENS] for start in range(0, len(ids) - ROW_TOKENS, step)]
        before = logits_of(original.model, rows)

        def show(name: str, path: Path, model: Path) -> None:
            kl, top1 = distance(before, logits_of(load_model(model, device="cpu", dtype="float32").model, rows))
            size = tensor_bytes(path)
            bits = 8 * size / original.model.n_parameters
            size_text = f"{size:>13,} bytes, {bits:5.2f} bits per weight"
            print(f"{name:<24} {size_text}, KL {kl:.3g} nats/token, {top1:.1%} top-1 agreement", flush=True)

        for name, write in files(source, work):
            if options.types is not None and name not in options.types:
                continue
            path = work / "m.gguf"
            path.unlink(missing_ok=True)
            write(path)
            show(name, path, import_model(path, work / "back", force=True))
        for path in options.beside:
            show(path.name, path, path)


main()
