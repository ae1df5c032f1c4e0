"""Report versions, hardware, precision, memory and the runs folder of this machine; knows nothing of models."""

import os
import platform
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from llmctl import __version__
from llmctl.files import exposed
from llmctl.kernels.compile import COMPILED, PACKAGED, library_path, packaged_path, verdict
from llmctl.kernels.compiled_step import find_library, is_disabled, variant_of
from llmctl.machine import available_cores, available_memory, choose_dtype, product_rate
from llmctl.runs.folder import runs_folder

REQUIRED = ("torch", "accelerate", "numpy", "safetensors", "sentencepiece", "tokenizers", "gguf")
OPTIONAL = {
    "pyarrow": "parquet files",
    "backports.zstd": "zst files",
    "sacrebleu": "BLEU",
    "transformers": "interop tests",
    "tensorboard": "--track",
    "trackio": "--track",
    "wandb": "--track",
}
"""Optional packages, and what needs each."""


def examine_machine() -> dict[str, Any]:
    """Return the properties of this machine and installation; times matrix products for a tenth of a second."""
    has_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if has_cuda else "cpu")
    dtypes = (torch.float32, torch.bfloat16)
    folder = runs_folder()
    return {
        "llmctl": __version__,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in REQUIRED},
        "optional": {name: version(name) for name in OPTIONAL},
        "device": torch.cuda.get_device_name() if has_cuda else f"cpu ({torch.backends.cpu.get_cpu_capability()})",
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "compiled_step": compiled_step(),
        "dtype": name_of(choose_dtype("auto", on_cpu=not has_cuda)),
        "product_flops": {name_of(dtype): product_rate(dtype, device.type) for dtype in dtypes},
        "free_memory_bytes": available_memory(device),
        "runs_folder": str(folder.resolve()),
        "runs_folder_is_writable": os.access(existing(folder), os.W_OK),
        "free_disk_bytes": shutil.disk_usage(existing(folder)).free,
    }


def compiled_step() -> str | None:
    """Return which decoding library is in use, or why none is; None if none was compiled."""
    path = library_path()
    if path.is_file() and (problem := exposed(path)):
        return f"not used: {problem}"
    if is_disabled():
        return "not used: LLMCTL_NATIVE=0"
    library = find_library()
    if library is not None:
        return f"{variant_of(library)} ({packaged_path() if verdict() == PACKAGED else path})"
    return f"not used: {verdict()}" if verdict() not in ("", PACKAGED, COMPILED) else None


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype as recipes name it."""
    return str(dtype).removeprefix("torch.")


def version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def existing(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that exists."""
    folder = folder.resolve()
    return folder if folder.is_dir() else existing(folder.parent)


def render_machine(record: Mapping[str, Any]) -> list[str]:
    """Return the report on this machine as lines."""
    rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in record["product_flops"].items())
    optional = [f"{name} {installed}" for name, installed in record["optional"].items() if installed]
    absent = [f"{name} ({OPTIONAL[name]})" for name, installed in record["optional"].items() if not installed]
    writable = "" if record["runs_folder_is_writable"] else ", not writable"
    return [
        f"llmctl     {record['llmctl']}, python {record['python']}",
        "packages   " + ", ".join(f"{name} {installed}" for name, installed in record["packages"].items()),
        f"optional   {', '.join(optional) or 'none'}",
        f"missing    {', '.join(absent) or 'none'}",
        f"device     {record['device']}, {record['cores']} cores, {record['threads']} threads",
        f"precision  {record['dtype']} (measured: {rates})",
        f"compiled   {record['compiled_step'] or 'no decoding library; it needs a C++ compiler, such as g++'}",
        f"memory     {record['free_memory_bytes'] / 1e9:,.1f} GB free",
        f"runs       {record['runs_folder']}, {record['free_disk_bytes'] / 1e9:,.1f} GB free{writable}",
    ]
