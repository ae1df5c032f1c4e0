"""CPU time saved by prefix caching: prompts with a shared prefix, and a conversation, in one run.

    python benchmarks/prefix.py --shape 30M --scheme fp32,bf16,int4 [--prompts 64] [--header 400] [--rest 20] [-n 16]

Random weights, greedy decoding. `pipe`: prompts with a shared header and an individual rest, in batches of 16 as in
`llmctl generate -`. `talk`: a conversation of 8 turns with `--rest` user tokens and `-n` answer tokens, where each prompt
starts with the whole conversation. Rounds alternate and the minimum CPU time of all threads counts. The compiled step is
off, as it would hide the effect.
"""

import argparse
import time
from collections.abc import Callable

import torch

from llmctl.benchmarking.random_models import random_model, shape_config
from llmctl.inference.prefix import Prefix
from llmctl.inference.session import Session
from llmctl.kernels.decoder import make_decoder
from llmctl.model.decode import Decoder
from llmctl.model.transformer import LanguageModel

BATCH, N_TURNS = 16, 8


def ids(n: int, start: int) -> list[int]:
    return [(7 * position + start) % 997 for position in range(n)]


@torch.inference_mode()
def answer(
    model: LanguageModel, decoder: Decoder, rows: list[list[int]], n_new: int, prefix: Prefix | None
) -> list[int]:
    """Return the continuation of the first row."""
    session = Session(model, rows, n_new, decoder=decoder, prefix=prefix)
    tokens_B, generated = session.begin().argmax(dim=1), []
    for _ in range(n_new - 1):
        generated.append(int(tokens_B[0]))
        tokens_B = session.step(tokens_B).argmax(dim=1)
    session.keep([*rows[0], *generated])
    return [*generated, int(tokens_B[0])]


Answer = Callable[[list[list[int]]], list[int]]


def pipe(reply: Answer, options: argparse.Namespace) -> None:
    rows = [[*ids(options.header, 3), *ids(options.rest, row)] for row in range(options.prompts)]
    for start in range(0, len(rows), BATCH):
        reply(rows[start : start + BATCH])


def talk(reply: Answer, options: argparse.Namespace) -> None:
    conversation = ids(options.header, 3)
    for turn in range(N_TURNS):
        conversation = [*conversation, *ids(options.rest, turn)]
        conversation = [*conversation, *reply([conversation])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="30M")
    parser.add_argument("--scheme", default="fp32")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--header", type=int, default=400)
    parser.add_argument("--rest", type=int, default=20)
    parser.add_argument("-n", "--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for scheme in options.scheme.split(","):
        model = random_model(shape_config(options.shape), scheme)
        decoder = make_decoder(model)
        assert decoder is not None
        decoder.native = None
        for work in (pipe, talk):
            best = {"without": float("inf"), "with": float("inf")}
            for _ in range(options.rounds):
                for name in ("without", "with"):
                    prefix, begun = Prefix() if name == "with" else None, time.process_time()
                    work(lambda rows, prefix=prefix: answer(model, decoder, rows, options.tokens, prefix), options)  # noqa: B023
                    best[name] = min(best[name], time.process_time() - begun)
            ratio = best["without"] / best["with"]
            print(
                f"{options.shape} {scheme:<5} {work.__name__}: {best['without']:7.2f} s without, "
                f"{best['with']:7.2f} s with prefix caching, {ratio:.2f}x"
            )


if __name__ == "__main__":
    main()
