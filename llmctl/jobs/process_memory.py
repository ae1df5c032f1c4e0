"""What a process that trains or quantizes holds before it has a model: Python, torch, and what else a run imports."""

from llmctl.benchmarking.bench import resident_bytes

RUN_BYTES = 240_000_000
"""What a training run holds besides its step: tokenizer and encoded data, libraries' own code and buffers on first use, and
freed blocks that the allocator keeps. Measured as the rest of the peak of runs with 1, 6 and 17 M parameters in float32 and
bfloat16: 220 to 275 MB."""


def process_bytes() -> int:
    """Return this process's resident memory, with everything imported that a run imports; 0 if the system does not say."""
    import llmctl.distributed.runtime
    import llmctl.tokenizer.sentencepiece
    import llmctl.training.loop

    del llmctl
    return resident_bytes()
