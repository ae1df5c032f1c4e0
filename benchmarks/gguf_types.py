"""Compare GGUF files of a model: bytes, KL divergence and top-1 agreement with the original, decoding speed.

    python benchmarks/gguf_types.py MODEL TEXT [--dither] [--beside QUANTIZED ...] [--rows 12] [--imatrix CALIBRATION]

Rows of 256 tokens are spread over the text. `--dither` first moves every weight by a random fraction of a 4-bit step: a
model published on a 4-bit grid favors formats with that grid. If llama-cpp-python is installed, GGUF files are measured in
llama.cpp, and types quantized by llama.cpp itself are included; with `--imatrix` also with an importance matrix: the mean
squares of every layer's inputs on 64 rows of a text. `--beside` adds models and GGUF files made by `llmctl quantize` or
others. Sizes are those of whole files. Speed is llama.cpp's on one thread: tokens per CPU-second after a prompt of 16.
"""

import argparse
import contextlib
import ctypes
import gzip
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from llmctl.artifacts.load import load_model
from llmctl.converting.convert import import_model
from llmctl.converting.export_gguf import export_gguf
from llmctl.converting.gguf_check import distance, llama_cpp, logits_of, predicted
from llmctl.formats.artifact import read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.formats.gguf.architectures import architecture_for
from llmctl.formats.gguf.model import tensor_names
from llmctl.formats.gguf.write import TYPES

LLAMA_TYPES = {
    "Q8_0": 7, "Q6_K": 18, "Q5_K_M": 17, "Q5_0": 8, "Q4_K_M": 15, "Q4_K_S": 14, "Q4_1": 3, "Q4_0": 2, "IQ4_NL": 25, "IQ4_XS": 30,
    "Q3_K_M": 12, "Q3_K_S": 11,
}  # fmt: skip
"""Values of `llama_ftype` in llama.cpp's header."""

ROW_TOKENS, IMATRIX_ROWS = 256, 64


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


def importance(source: Path, text: str) -> dict[str, torch.Tensor]:
    """Return the mean squares of the inputs of every layer's matrices on a text, by llama.cpp's names."""
    loaded = load_model(source, device="cpu", dtype="float32")
    assert loaded.tokenizer is not None
    ids = loaded.tokenizer.encode(text[:2_000_000])
    config = loaded.model.config
    found: dict[str, torch.Tensor] = {}
    for there, names in tensor_names(config, architecture_for(config)).items():
        module = loaded.model.get_submodule(names[0].rpartition(".")[0])
        if there.startswith("blk.") and isinstance(module, torch.nn.Linear):

            def hook(_: object, args: tuple[torch.Tensor, ...], there: str = there) -> None:
                found[there] = found.get(there, 0) + args[0].flatten(0, -2).float().square().mean(dim=0) / IMATRIX_ROWS

            module.register_forward_pre_hook(hook)
    step = max(ROW_TOKENS, len(ids) // IMATRIX_ROWS)
    logits_of(loaded.model, [ids[start : start + ROW_TOKENS] for start in range(0, len(ids) - ROW_TOKENS, step)])
    return found


def by_llama(source: Path, out: Path, kind: str, matrix: dict[str, torch.Tensor]) -> None:
    """Quantize a GGUF file with llama.cpp."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = LLAMA_TYPES[kind], 1
    if matrix:
        entry = llama_cpp.llama_model_imatrix_data
        arrays = {name: (ctypes.c_float * len(row))(*row.tolist()) for name, row in matrix.items()}
        entries = (entry * (len(arrays) + 1))()  # the last has no name
        for item, (name, row) in zip(entries, arrays.items(), strict=False):
            item.name, item.data, item.size = name.encode(), ctypes.cast(row, ctypes.POINTER(ctypes.c_float)), len(row)
        settings.imatrix = ctypes.cast(entries, ctypes.POINTER(entry))
    llama_model_quantize = llama_cpp.llama_model_quantize
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        status = llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(settings))
    assert status == 0, f"llama.cpp cannot quantize this model to {kind}"


def in_llama(path: Path, rows: list[list[int]]) -> tuple[list[torch.Tensor], float]:
    """Return llama.cpp's logits of every row, and tokens per CPU-second when it decodes."""
    with llama_cpp(path, path, ROW_TOKENS, logits_all=True, n_threads=1, n_threads_batch=1) as llama:
        found = [predicted(llama, row).clone() for row in rows]
        best = 0.0
        for _ in range(3):
            begun = time.process_time()
            llama.reset()
            llama.eval(rows[0][:16])
            prompt = time.process_time() - begun
            for token in rows[0][16:80]:
                llama.eval([token])
            best = max(best, 64 / (time.process_time() - begun - prompt))
    return found, best


def files(source: Path, work: Path, matrix: dict[str, torch.Tensor]) -> Iterator[tuple[str, Callable[[Path], object]]]:
    """Yield the name of every type with a function that writes a file of it."""
    for kind in TYPES:
        yield kind, partial(export_gguf, source, kind=kind, force=True)
    if importlib.util.find_spec("llama_cpp"):
        export_gguf(source, work / "f32.gguf", kind="f32", force=True)
        for kind in LLAMA_TYPES:
            yield f"llama.cpp {kind}", partial(by_llama, work / "f32.gguf", kind=kind, matrix={})
            if matrix:
                yield f"llama.cpp {kind} imatrix", partial(by_llama, work / "f32.gguf", kind=kind, matrix=matrix)


def file_bytes(path: Path) -> int:
    """Return the bytes of a GGUF file or of a model's safetensors."""
    return (path if path.is_file() else path / "model.safetensors").stat().st_size


def text_of(path: Path) -> str:
    """Return a text, unpacked if it is compressed."""
    return (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--dither", action="store_true")
    parser.add_argument("--beside", type=Path, nargs="*", default=[])
    parser.add_argument("--rows", type=int, default=12)
    parser.add_argument("--types", nargs="*", help='only these types, such as q4_K or "llama.cpp Q4_K_M"')
    parser.add_argument("--imatrix", type=Path, help="a text to compute an importance matrix on")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        source = dithered(options.model, work / "dithered") if options.dither else options.model
        original = load_model(source, device="cpu", dtype="float32")
        assert original.tokenizer is not None
        ids = original.tokenizer.encode(text_of(options.text)[:2_000_000])
        step = max(ROW_TOKENS, len(ids) // options.rows)
        rows = [ids[start : start + ROW_TOKENS] for start in range(0, len(ids) - ROW_TOKENS, step)]
        before = logits_of(original.model, rows)

        def show(name: str, path: Path) -> None:
            speed = ""
            if path.suffix == ".gguf" and importlib.util.find_spec("llama_cpp"):
                after, rate = in_llama(path, rows)
                speed = f", {rate:.0f} tokens per CPU-second"
            else:
                model = import_model(path, work / "back", force=True) if path.suffix == ".gguf" else path
                after = logits_of(load_model(model, device="cpu", dtype="float32").model, rows)
            kl, top1 = distance(before, after)
            print(f"{name:<28} {file_bytes(path):>13,} bytes, KL {kl:.4f}, top-1 {top1:.1%}{speed}", flush=True)

        matrix = importance(source, text_of(options.imatrix)) if options.imatrix else {}
        for name, write in files(source, work, matrix):
            if options.types is not None and name not in options.types:
                continue
            path = work / "m.gguf"
            path.unlink(missing_ok=True)
            write(path)
            show(name, path)
        for path in options.beside:
            show(path.name, path)


main()
