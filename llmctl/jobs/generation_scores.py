"""Held-out examples in the words of the model that is trained: a few to look at, and scores of many."""

from collections.abc import Callable, Mapping, Sequence

import torch

from llmctl.artifacts.load import Loaded
from llmctl.config import GenerateConfig
from llmctl.distributed.runtime import Runtime
from llmctl.formats.artifact import Artifact
from llmctl.inference.generate import Prompt, generate
from llmctl.jobs.job import Job
from llmctl.metrics import scores
from llmctl.metrics.scores import References
from llmctl.training.samples import SAMPLE_TOKENS, Sampler

TEXT_SCORES: Mapping[str, Callable[[Sequence[str], References], float]] = {
    "bleu": scores.bleu,
    "chrf": scores.chrf,
    "rouge_l": scores.rouge_l,
    "exact_match": scores.exact_match,
    "token_f1": scores.token_f1,
}
"""Figures that need the model to write, by name."""

N_SAMPLES = 2
EXTRA_TOKENS = 16
"""Tokens by which an answer may be longer than the longest wanted one."""


def prompts_of(job: Job, numbers: Sequence[int]) -> tuple[list[Prompt], list[str], int]:
    """Return the prompts of examples, the answers that are wanted, and how many tokens the longest of them has."""
    corpus, tokenizer = job.corpus, job.corpus.tokenizer
    assert corpus.targets is not None
    prompts, answers, longest = [], [], 0
    for place, number in enumerate(numbers):
        ids, target = corpus.documents.document(number).tolist(), corpus.targets.document(number).tolist()
        if job.model.config.family == "encoder_decoder":
            ids = [*ids, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]
        else:
            begins = target.index(1)
            given, target = ids[:begins], [index for index, is_trained in zip(ids, target, strict=True) if is_trained]
            # Of a conversation only the first answer is asked for.
            turns = next((place for place, index in enumerate(target) if index == tokenizer.eos_id), len(target))
            ids, target = given, target[: turns + 1]
        prompts.append(Prompt(place, ids, tokenizer.decode(ids)))
        answers.append(tokenizer.decode(target).strip())
        longest = max(longest, len(target))
    return prompts, answers, longest


def write(job: Job, artifact: Artifact, prompts: Sequence[Prompt], n_tokens: int) -> list[str]:
    """Return what the model answers, greedily; training goes on as if nothing had happened.

    artifact: the base, whose files say how texts begin and end.
    """
    loaded = Loaded(job.model, job.corpus.tokenizer, artifact)
    settings = GenerateConfig(max_tokens=n_tokens, temperature=0.0)
    job.model.eval()
    try:
        with torch.inference_mode():
            return [completion.text.strip() for completion in generate(loaded, prompts, settings)]
    finally:
        job.model.train()


def make_sampler(job: Job, artifact: Artifact) -> Sampler | None:
    """Return what answers the first held-out examples; None where there is nothing to answer."""
    if job.corpus.targets is None:
        return None
    prompts, _, _ = prompts_of(job, job.corpus.held_out[:N_SAMPLES].tolist())

    def sample() -> list[dict[str, str]]:
        texts = write(job, artifact, prompts, SAMPLE_TOKENS)
        return [{"prompt": prompt.text, "text": text} for prompt, text in zip(prompts, texts, strict=True)]

    return sample


def make_score(job: Job, artifact: Artifact, runtime: Runtime) -> Callable[[int | None], dict[str, float]] | None:
    """Return what scores the model's answers to held-out examples, all processes sharing the work; None without one."""
    name = job.config.train.metric or job.metric
    if name not in TEXT_SCORES or job.corpus.targets is None:
        return None

    def score(max_tokens: int | None) -> dict[str, float]:
        held_out = job.corpus.held_out
        wanted = len(held_out)
        if max_tokens is not None:
            wanted = min(wanted, max(1, max_tokens // job.config.train.seq_len))
        chosen = [int(held_out[index * len(held_out) // wanted]) for index in range(wanted)]
        prompts, answers, longest = prompts_of(job, chosen[runtime.rank :: runtime.world_size])
        texts = write(job, artifact, prompts, longest + EXTRA_TOKENS) if prompts else []
        told = runtime.gather([texts, answers])
        found = [text for own, _ in told for text in own]
        references = [[text] for _, own in told for text in own]
        return {name: TEXT_SCORES[name](found, references)}

    return score
