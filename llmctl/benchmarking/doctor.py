"""What a machine offers, and whether processes that are to train together can: found out in seconds, not at step one.

Ranks answer a roll call first, over the master's store alone, so that who is missing can be named; then they meet
exactly as training does. Knows nothing of models.
"""

import os
import platform
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from llmctl import __version__
from llmctl.kernels.compile import library_path
from llmctl.kernels.compiled_step import find_library
from llmctl.machine import available_cores, available_memory, choose_dtype, product_rate
from llmctl.runs.folder import runs_folder

REQUIRED = ("torch", "accelerate", "numpy", "safetensors", "sentencepiece")
OPTIONAL = {
    "tokenizers": "hub",
    "gguf": "gguf",
    "pyarrow": "data",
    "backports.zstd": "data",
    "transformers": "interop",
    "tensorboard": "--track",
    "trackio": "--track",
    "wandb": "--track",
}
"""Packages that some commands need, and the extra that brings each."""


def examine_machine() -> dict[str, Any]:
    """Return what this machine and its installation offer; measures matrix products for a tenth of a second."""
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
    """Return the file of the compiled decoding step that is used, if there is one."""
    return None if find_library() is None else str(library_path())


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype as recipes name it."""
    return str(dtype).removeprefix("torch.")


def version(package: str) -> str | None:
    """Return an installed package's version, None if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def existing(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that exists."""
    folder = folder.resolve()
    return folder if folder.is_dir() else existing(folder.parent)


def render_machine(found: Mapping[str, Any]) -> list[str]:
    """Return the lines a person reads about a machine."""
    rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in found["product_flops"].items())
    optional = [f"{name} {there}" for name, there in found["optional"].items() if there]
    absent = [f"{name} ({OPTIONAL[name]})" for name, there in found["optional"].items() if not there]
    writable = "" if found["runs_folder_is_writable"] else ", not writable"
    return [
        f"llmctl     {found['llmctl']}, python {found['python']}",
        "packages   " + ", ".join(f"{name} {there}" for name, there in found["packages"].items()),
        f"optional   {', '.join(optional) or 'none'}",
        f"missing    {', '.join(absent) or 'none'}",
        f"device     {found['device']}, {found['cores']} cores, {found['threads']} threads",
        f"precision  {found['dtype']} (measured: {rates})",
        f"compiled   {found['compiled_step'] or 'no decoding step; llmctl doctor --compile makes one'}",
        f"memory     {found['free_memory_bytes'] / 1e9:,.1f} GB free",
        f"runs       {found['runs_folder']}, {found['free_disk_bytes'] / 1e9:,.1f} GB free{writable}",
    ]
