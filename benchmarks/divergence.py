"""Distillation loss compared with other implementations: CPU time, peak memory and gradient error in one run.

    pip install --no-deps --target PEERS trl==1.16.0 liger-kernel==0.8.5
    python benchmarks/divergence.py --peers PEERS [--vocab 128000] [--rows 2048] [--threads 1]
                                                          [--dtype float32]

Forward KL, forward and backward pass, of a student (width 512) and a teacher (width 768) in bfloat16; on a CPU without
bfloat16 instructions (lscpu: avx512_bf16, amx_bf16) add --dtype float32. Every measurement runs in its own process: the
minimum CPU time of the repetitions, the growth of the resident memory beyond inputs and gradients, and the relative error
of the gradient of the hidden states against float64 on the same inputs. `far` is a student unrelated to its teacher;
`near` has the teacher's hidden states with 1 % noise, so that the gradient is in the last digits. TRL and Liger run as
they do without a GPU; only the two loss files of each are imported. `naive` is F.kl_div over logits converted to float32
after the matrix product, as in most code.
"""

import argparse
import json
import resource
import subprocess
import sys
import types
from pathlib import Path

D_STUDENT, D_TEACHER = 512, 768
IMPLEMENTATIONS = ("ours", "ours-512", "naive", "trl", "liger")


def inputs(vocab, rows, *, near, dtype):
    """Return random hidden states and heads of student and teacher."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    h, w = normal(rows, D_STUDENT), normal(vocab, D_STUDENT) / D_STUDENT**0.5
    th, tw = normal(rows, D_TEACHER), normal(vocab, D_TEACHER) / D_TEACHER**0.5
    if near:
        th = torch.cat([h + 0.01 * normal(rows, D_STUDENT), torch.zeros(rows, D_TEACHER - D_STUDENT)], dim=1)
        tw = torch.cat([w, torch.zeros(vocab, D_TEACHER - D_STUDENT)], dim=1)
    return [tensor.to(dtype) for tensor in (h, w, th, tw)]


def without_init(root, *names):
    """Register empty packages, so that single modules can be imported without running their `__init__` files."""
    for name in names:
        package = types.ModuleType(name)
        package.__path__ = [str(Path(root, *name.split(".")))]
        sys.modules[name] = package


def make(name, peers):
    """Return an implementation: (h, w, th, tw) -> the summed loss."""
    import torch
    from torch.nn import functional as F

    if name.startswith("ours"):
        from llmctl.losses.divergences import Divergence
        from llmctl.losses.linear_divergence import linear_divergence
        from llmctl.losses.teachers import DenseTeacher

        chunk = 512 if name.endswith("512") else 256
        labels = torch.zeros(1, dtype=torch.long)
        return lambda h, w, th, tw: (
            linear_divergence(
                h, w, [DenseTeacher(th, tw)], labels.expand(len(h)), Divergence("fkl"), chunk_tokens=chunk
            ).total
        )
    if name == "naive":
        return lambda h, w, th, tw: F.kl_div(
            (h @ w.T).float().log_softmax(-1), (th @ tw.T).float().log_softmax(-1), reduction="sum", log_target=True
        )
    sys.path.insert(0, str(peers))
    if name == "trl":
        import contextlib

        without_init(peers, "trl", "trl.kernels", "trl.trainer")
        utils = types.ModuleType("trl.trainer.utils")
        utils.maybe_gather_lm_head_ctx = lambda *_: contextlib.nullcontext()
        sys.modules["trl.trainer.utils"] = utils
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        return lambda h, w, th, tw: ChunkedDivergenceFunction.apply(h, w, None, th, tw, None, 0.0)[0].sum()
    without_init(peers, "liger_kernel", "liger_kernel.chunked_loss")
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    def liger(h, w, th, tw):
        labels = torch.zeros(len(h), dtype=torch.long)
        options = (0.0, 1.0, 0.0, -100, 1.0, False, 256)
        return LigerFusedLinearJSDFunction.apply(h, w, th, tw, labels, None, None, *options) * len(h)

    return liger


def exact_gradient(h, w, th, tw):
    """Return the gradient of the hidden states in float64, in chunks."""
    import torch

    parts = []
    for start in range(0, len(h), 64):
        q = (h[start : start + 64].double() @ w.double().T).softmax(-1)
        p = (th[start : start + 64].double() @ tw.double().T).softmax(-1)
        parts.append((q - p) @ w.double())
    return torch.cat(parts)


def measure(name, peers, vocab, rows, threads, repetitions, dtype):
    """Measure an implementation in this process."""
    import torch

    from llmctl.machine import forget_peak_memory, peak_since_forgotten

    torch.set_num_threads(threads)
    dtype = getattr(torch, dtype)
    function = make(name, peers)
    device, figures = torch.device("cpu"), {}
    for regime in ("far", "near"):
        few = inputs(vocab, 128, near=regime == "near", dtype=dtype)
        h, w = few[0].requires_grad_(), few[1].requires_grad_()
        function(h, w, *few[2:]).backward()
        exact = exact_gradient(h.detach(), w.detach(), *few[2:])
        figures[f"error_{regime}"] = float((h.grad.double() - exact).norm() / exact.norm())
        del few, h, w, exact
    h, w, th, tw = inputs(vocab, rows, near=False, dtype=dtype)
    h.requires_grad_()
    w.requires_grad_()
    h.grad, w.grad = torch.zeros_like(h), torch.zeros_like(w)
    seconds = []
    forget_peak_memory(device)
    before = peak_since_forgotten(device)
    for _ in range(repetitions):
        begun = resource.getrusage(resource.RUSAGE_SELF)
        function(h, w, th, tw).backward()
        ended = resource.getrusage(resource.RUSAGE_SELF)
        seconds.append(ended.ru_utime + ended.ru_stime - begun.ru_utime - begun.ru_stime)
    figures |= {"cpu_seconds": min(seconds), "peak_mib": (peak_since_forgotten(device) - before) / 2**20}
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path)
    for name, value in (("vocab", 32000), ("rows", 2048), ("threads", 1), ("repetitions", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--only", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = (options.vocab, options.rows, options.threads, options.repetitions, options.dtype)
    if options.only:
        print(json.dumps(measure(options.only, options.peers, *sizes)))
        return
    results = {}
    for name in IMPLEMENTATIONS:
        if name in ("trl", "liger") and options.peers is None:
            print(f"{name}: skipped, --peers is not set", file=sys.stderr)
            continue
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--only", name], stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            print(f"{name}: failed", file=sys.stderr)
            continue
        results[name] = json.loads(done.stdout)
        print(
            json.dumps({"name": name, **{key: float(f"{value:.3g}") for key, value in results[name].items()}}),
            flush=True,
        )
    ours = results["ours"]
    for name, row in results.items():
        ratios = {key: round(row[key] / ours[key], 2) for key in ("cpu_seconds", "peak_mib")}
        print(json.dumps({"name": name, "times_ours": ratios}))


if __name__ == "__main__":
    main()
