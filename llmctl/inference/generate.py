"""Generate text with decoders and encoder-decoders: batched, cached and streamed, by sampling or beam search.

The result of a prompt does not depend on the texts in the rest of its batch: rows are padded on the left and masked, and
every prompt has its own random generator, seeded by (seed, prompt number). A prefix shared by all prompts of a batch is
computed once. This and the shape of the batch change how sums are rounded, which in bfloat16 often changes a sample, in
float32 hardly ever.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from llmctl.artifacts.load import Loaded
from llmctl.config import GenerateConfig
from llmctl.errors import UsageError
from llmctl.formats import generation_settings
from llmctl.inference import sampling, settings
from llmctl.inference.beam import beam_search
from llmctl.inference.prefix import Prefix
from llmctl.inference.session import Session
from llmctl.inference.text_stream import TextStream

WINDOW_BATCHES = 8
"""Batches whose prompts are sorted by length together to reduce padding; results keep the order of the prompts."""

OnText = Callable[[int, str], None]


@dataclass(frozen=True)
class Prompt:
    """A numbered prompt as token ids, special tokens included."""

    index: int
    ids: list[int]
    text: str = ""


@dataclass(frozen=True)
class Completion:
    """The completion of a prompt: new ids without the end token, their text, and why generation ended.

    finish: `eos`, `stop` (a stop string), `length` (max_tokens), or `context` (the model's context is full).
    """

    index: int
    prompt: str
    ids: list[int]
    text: str
    finish: str


def end_ids(loaded: Loaded) -> set[int]:
    """Return the ids that end generation, from the config and `generation_config.json`."""
    return set(generation_settings.end_ids(loaded.model.config, loaded.artifact.files))


def check_prompts(loaded: Loaded, prompts: Sequence[Prompt], config: GenerateConfig) -> None:
    """Refuse invalid settings and prompts before anything runs.

    Raises: UsageError naming the prompt, its length and the limit.
    """
    settings.check(config)
    if config.stop and loaded.tokenizer is None:
        raise UsageError(
            f"`{loaded.artifact.path}` has no tokenizer, which `--stop {config.stop[0]}` needs", "omit `--stop`"
        )
    model = loaded.model.config
    limit, n_vocabulary = model.max_positions, model.source_vocab_size or model.vocab_size
    is_decoder = model.family == "decoder"
    for prompt in prompts:
        if not prompt.ids:
            raise UsageError(
                f"prompt {prompt.index + 1} is empty, and the model has no beginning-of-text token", "give it some text"
            )
        if len(prompt.ids) > limit - int(is_decoder):
            raise UsageError(
                f"prompt {prompt.index + 1} has {len(prompt.ids)} tokens, the model's context is {limit}",
                "shorten it, or use a model with a longer context",
            )
        wrong = [index for index in prompt.ids if not 0 <= index < n_vocabulary]
        if wrong:
            raise UsageError(
                f"prompt {prompt.index + 1} has the token id {wrong[0]}, outside the vocabulary",
                f"ids are 0 to {n_vocabulary - 1}",
            )


def generate(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    config: GenerateConfig,
    on_text: OnText | None = None,
    *,
    ends: Collection[int] = (),
    prefix: Prefix | None = None,
) -> Iterator[Completion]:
    """Yield the completions of prompts in order; `on_text` gets (index, new text) while they are generated.

    ends: ids that end generation in addition to the model's own, such as the end-of-turn token of a chat template.
    prefix: cached keys and values to reuse across calls, valid while the weights do not change; by default they are
    reused only within the call.

    Raises: UsageError as `check_prompts`.
    """
    check_prompts(loaded, prompts, config)
    prefix = Prefix() if prefix is None else prefix
    step = config.batch_size * WINDOW_BATCHES
    for start in range(0, len(prompts), step):
        window = sorted(prompts[start : start + step], key=lambda prompt: len(prompt.ids))
        done: dict[int, Completion] = {}
        for batch in batches(window, config.batch_size, ragged=loaded.model.pads_left):
            for completion in run_batch(loaded, batch, config, on_text, ends, prefix):
                done[completion.index] = completion
        yield from (done[prompt.index] for prompt in prompts[start : start + step])


def batches(prompts: Sequence[Prompt], size: int, *, ragged: bool) -> Iterator[Sequence[Prompt]]:
    """Yield at most `size` prompts at a time, of the same length unless `ragged`; they are sorted by length."""
    groups = [prompts] if ragged else [list(same) for _, same in groupby(prompts, key=lambda prompt: len(prompt.ids))]
    for group in groups:
        for first in range(0, len(group), size):
            yield group[first : first + size]


@torch.inference_mode()
def run_batch(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    config: GenerateConfig,
    on_text: OnText | None,
    more_ends: Collection[int] = (),
    prefix: Prefix | None = None,
) -> list[Completion]:
    """Complete a batch of prompts; without `prefix` each prompt is prefilled in full."""
    ends = end_ids(loaded) | set(more_ends)
    ids = [prompt.ids for prompt in prompts]
    excluded = without_text(loaded, ends)
    session = Session(
        loaded.model,
        ids,
        config.max_tokens,
        copies=config.beams,
        excluded=excluded,
        decoder=loaded.decoder,
        prefix=prefix,
        kv=config.kv,
        first=generation_settings.forced_first_id(loaded.model.config, loaded.artifact.files),
    )
    if config.beams > 1:
        results = beam_search(session, len(prompts), config, ends)
        session.keep(ids[0])
        return [
            finish_beam(loaded, prompt, beam, config, session.limit(prompt.ids), ends)
            for prompt, beam in zip(prompts, results, strict=True)
        ]
    rows = [Row(prompt, make_stream(loaded, prompt, config)) for prompt in prompts]
    try:
        return sample(session, rows, config, ends, on_text)
    finally:  # also after an interrupt: the next turn of a chat starts with what was generated
        session.keep([*ids[0], *rows[0].ids])


def without_text(loaded: Loaded, ends: Collection[int]) -> list[int]:
    """Return the ids beyond the tokenizer's vocabulary, which only pad the embedding; end tokens among them are allowed."""
    if loaded.tokenizer is None:
        return []
    config = loaded.model.config
    n_known = loaded.tokenizer.for_output(config.family).vocab_size
    return [index for index in range(n_known, config.vocab_size) if index not in ends]


@dataclass
class Row:
    """A prompt being completed."""

    prompt: Prompt
    stream: "TextStream"
    ids: list[int] = field(default_factory=list)
    generator: torch.Generator = field(default_factory=torch.Generator)

    def completion(self, finish: str) -> Completion:
        """Return the row as a completion."""
        return Completion(self.prompt.index, self.prompt.text, self.ids, self.stream.text, finish)


def sample(
    session: Session, rows: list[Row], config: GenerateConfig, ends: set[int], on_text: OnText | None
) -> list[Completion]:
    """Sample token by token; finished rows leave the batch."""
    done = []
    for row in rows:
        # Seed by (seed, index): the factor keeps (0, 1) and (1, 0) apart.
        row.generator.manual_seed((config.seed * 1_000_003 + row.prompt.index) % (1 << 63))
    logits_BV = session.begin()
    seen_BV = None
    if config.repetition_penalty != 1.0:
        # Tokens of an encoder-decoder's source do not count as repetition in the target.
        texts = [row.prompt.ids if session.is_decoder else [] for row in rows]
        seen_BV = mark_seen(texts, logits_BV)
    while rows:
        tokens_B = sampling.choose(logits_BV, seen_BV, config, [row.generator for row in rows])
        running = []
        for position, token in enumerate(tokens_B.tolist()):
            row = rows[position]
            finish = advance(row, token, config, ends, session.limit(row.prompt.ids), on_text)
            if finish:
                done.append(row.completion(finish))
            else:
                running.append(position)
        if len(running) < len(rows):
            rows = [rows[position] for position in running]
            kept = torch.tensor(running, dtype=torch.long, device=tokens_B.device)
            tokens_B = tokens_B[kept]
            seen_BV = None if seen_BV is None else seen_BV[kept]
            if rows:
                session.select(kept)
        if rows:
            if seen_BV is not None:
                seen_BV.scatter_(1, tokens_B[:, None], True)
            logits_BV = session.step(tokens_B)
    return done


def advance(row: Row, token: int, config: GenerateConfig, ends: set[int], limit: int, on_text: OnText | None) -> str:
    """Append a token to a row and return the finish reason, or an empty string."""
    finish = ""
    if token in ends:
        finish = "eos"
    else:
        row.ids.append(token)
        new = row.stream.feed(token)
        if row.stream.is_stopped:
            finish = "stop"
        elif len(row.ids) >= config.max_tokens:
            finish = "length"
        elif len(row.ids) >= limit:
            finish = "context"
        if on_text is not None and new:
            on_text(row.prompt.index, new)
    if finish:
        rest = row.stream.close()
        if on_text is not None and rest:
            on_text(row.prompt.index, rest)
    return finish


def mark_seen(texts: Sequence[Sequence[int]], logits_BV: Tensor) -> Tensor:
    """Return a mask (B, V) of the tokens in each text, on the device of the logits."""
    seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool)
    for row, ids in enumerate(texts):
        seen_BV[row, list(ids)] = True
    return seen_BV


def finish_beam(
    loaded: Loaded, prompt: Prompt, ids: list[int], config: GenerateConfig, limit: int, ends: Collection[int]
) -> Completion:
    """Turn the best beam into a completion; `limit` is the number of new tokens that fit in the context."""
    ended = bool(ids) and ids[-1] in ends
    ids = ids[:-1] if ended else ids
    stream = make_stream(loaded, prompt, config)
    for position, token in enumerate(ids):
        stream.feed(token)
        if stream.is_stopped:
            return Completion(prompt.index, prompt.text, ids[: position + 1], stream.text, "stop")
    stream.close()
    full = "length" if len(ids) >= config.max_tokens or len(ids) < limit else "context"
    return Completion(prompt.index, prompt.text, ids, stream.text, "eos" if ended else full)


def make_stream(loaded: Loaded, prompt: Prompt, config: GenerateConfig) -> "TextStream":
    """Return the text stream of a completion; it starts a new text unless it continues the text of the prompt."""
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        return TextStream(None, config.stop)
    if loaded.model.config.family == "encoder_decoder":
        return TextStream(tokenizer.for_target, config.stop, begins=True)
    known = [index for index in prompt.ids if index < tokenizer.vocab_size]
    return TextStream(tokenizer, config.stop, begins=not tokenizer.decode_bytes(known), context=known)


def parse_ids(text: str, index: int) -> list[int]:
    """Parse a prompt of token ids (`--ids`).

    Raises: UsageError naming the first word that is not a number.
    """
    try:
        return [int(word) for word in text.split()]
    except ValueError as error:
        raise UsageError(
            f"prompt {index + 1} is not token ids: {error}", "`--ids` takes numbers separated by spaces"
        ) from None
