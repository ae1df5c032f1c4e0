"""CPU time of what is measured before a run: the precision of training, the rate of products, `doctor`'s table.

    python benchmarks/choosing.py
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python benchmarks/choosing.py

The second line is a processor without bfloat16 and VNNI, on which both are 30 times slower than float32.
"""

import os
import tempfile
import time

import torch

from llmctl.kernels.product_table import render_survey, survey
from llmctl.machine import choose_dtype, name_of, processor_name, product_rate


def main() -> None:
    print(f"{processor_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    begun = time.process_time()
    dtype = choose_dtype("auto", on_cpu=True)
    print(f"precision  {name_of(dtype)}: {time.process_time() - begun:.4f} CPU-seconds")
    for dtype in (torch.float32, torch.bfloat16):
        begun = time.process_time()
        rate = product_rate(dtype)
        print(f"rate       {name_of(dtype)} {rate / 1e9:.0f} GFLOP/s: {time.process_time() - begun:.4f} CPU-seconds")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LLMCTL_CACHE"] = folder
        begun = time.process_time()
        rows = survey()
        print(f"products   {time.process_time() - begun:.2f} CPU-seconds")
    print("\n".join(render_survey(rows)))


if __name__ == "__main__":
    main()
