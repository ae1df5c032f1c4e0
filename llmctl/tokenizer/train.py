"""Train a tokenizer on a stream of texts: lossless for every text, reproducible byte for byte, in bounded memory."""

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from llmctl.config import TokenizerConfig
from llmctl.errors import UsageError
from llmctl.tokenizer.sentencepiece import SentencePieceTokenizer

VOCAB_SIZES = (2048, 4096, 8192, 16_384, 32_768)
SIZE_STEPS = ((8_000_000, 2048), (40_000_000, 8192))
"""Bytes of text up to which a vocabulary is enough; a full sample takes the largest one."""

N_BYTE_PIECES = 256
N_SPECIALS = 5
MAX_VOCAB_SIZE = (1 << 31) - 1  # sentencepiece counts pieces in an int32

MAX_SENTENCE_CHARACTERS = 4000
"""The trainer's work grows with the length of a sentence; longer lines are handed over in pieces."""

LINES = re.compile(r"[^\n]*\n|[^\n]+")
RESERVED = re.compile("[\0\u2581\u2585]")
"""sentencepiece drops a training sentence with NUL, its mark for spaces, or its mark for unknown characters."""


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> SentencePieceTokenizer:
    """Train a sentencepiece model with byte fallback that changes nothing: no normalization, no prefix, every space.

    Special tokens <pad> <unk> <s> </s> <mask>, then `n_sentinels` of <extra_id_i>, are control pieces: text never
    encodes to them. Where the corpus has fewer pieces than `vocab_size`, the vocabulary is smaller than asked.
    Raises: UsageError if a setting cannot be, the corpus is empty, or the vocabulary too small for its characters.
    Source: BPE, Sennrich et al. 2016, arXiv:1508.07909; unigram, Kudo 2018, arXiv:1804.10959; sentencepiece,
    arXiv:1808.06226.
    """
    from sentencepiece import SentencePieceTrainer

    check(config)
    model = io.BytesIO()
    controls = ["<mask>", *(f"<extra_id_{index}>" for index in range(config.n_sentinels))]
    is_char = config.model_type == "char"
    sample = list(sampled(texts, config.max_train_bytes))
    vocab_size = config.vocab_size or fitting_vocab_size(sample, config)
    try:
        SentencePieceTrainer.train(
            sentence_iterator=sentences(sample),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=1_000_000 if is_char else vocab_size,
            character_coverage=1.0 if is_char else config.character_coverage,
            byte_fallback=True,
            # A text without spaces (Chinese) must not leave the space to the bytes of the mark that stands for it.
            required_chars="\u2581",
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            hard_vocab_limit=False,
            max_sentence_length=1 << 30,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece="<pad>",
            control_symbols=controls,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise explain(error, config) from None
    return SentencePieceTokenizer(model.getvalue())


def check(config: TokenizerConfig) -> None:
    """Refuse settings that the trainer would complain of in its own words, or not at all.

    Raises: UsageError naming the setting and its value.
    """
    if config.n_sentinels < 0:
        raise UsageError(f"`tokenizer.n_sentinels` is {config.n_sentinels}", "0 is none; span corruption wants 100")
    if not 0.98 <= config.character_coverage <= 1:  # the range that sentencepiece accepts
        raise UsageError(
            f"`tokenizer.character_coverage` is {config.character_coverage}, not between 0.98 and 1",
            "0.9995 suits Chinese, 1 keeps every character",
        )
    if config.max_train_bytes < 1:
        raise UsageError(f"`tokenizer.max_train_bytes` is {config.max_train_bytes}", "give it a million or more")
    floor = N_BYTE_PIECES + N_SPECIALS + config.n_sentinels
    if config.vocab_size and config.model_type != "char" and config.vocab_size <= floor:
        raise UsageError(
            f"`tokenizer.vocab_size` {config.vocab_size} is too small: bytes and special tokens alone need {floor}",
            f"--set tokenizer.vocab_size={2 * floor}, or 0 to fit it to the text",
        )
    if config.vocab_size > MAX_VOCAB_SIZE:
        raise UsageError(
            f"`tokenizer.vocab_size` {config.vocab_size} is too large: at most {MAX_VOCAB_SIZE}",
            "0 fits it to the text",
        )


def fitting_vocab_size(sample: Sequence[str], config: TokenizerConfig) -> int:
    """Return the vocabulary that a text asks for: larger for more text, and for scripts with many characters.

    The characters that get a piece of their own, with bytes and special tokens, take at most two thirds of it.
    """
    counts = Counter[str]()
    for text in sample:
        counts.update(text)
    total, covered, n_characters = sum(counts.values()), 0, 0
    for _, count in counts.most_common():
        if covered >= config.character_coverage * total:
            break
        covered += count
        n_characters += 1
    n_bytes = sum(len(text.encode()) for text in sample)
    by_size = next((size for limit, size in SIZE_STEPS if n_bytes <= limit), VOCAB_SIZES[-1])
    needed = 1.5 * (n_characters + N_BYTE_PIECES + N_SPECIALS + config.n_sentinels)
    return max(by_size, next((size for size in VOCAB_SIZES if size >= needed), VOCAB_SIZES[-1]))


def explain(error: RuntimeError, config: TokenizerConfig) -> UsageError:
    """Turn the trainer's complaint into one that names our setting."""
    text = str(error)
    needed = re.search(r"required_chars\. \d+ vs (\d+)", text)
    if needed:
        return UsageError(
            f"`tokenizer.vocab_size` {config.vocab_size} is too small: bytes, special tokens and the corpus's "
            f"characters need {needed[1]}",
            f"--set tokenizer.vocab_size={max(512, 2 * int(needed[1]))}, or a lower tokenizer.character_coverage",
        )
    if "sentences_.empty" in text:
        return UsageError("the corpus holds no text to train a tokenizer on", "name files with text")
    return UsageError(f"the tokenizer cannot be trained: {text}", "try another --vocab-size or model type")


def sampled(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Return the texts, or every second, fourth, ... of them if they are more than `max_bytes`.

    The sample is spread evenly over the whole stream, however long, and never more than `max_bytes` are held.
    """
    kept: list[str] = []
    size, stride = 0, 1
    for number, text in enumerate(texts):
        if number % stride:
            continue
        kept.append(text[:max_bytes])
        size += len(kept[-1].encode())
        while size > max_bytes and len(kept) > 1:
            stride *= 2
            kept = kept[::2]
            size = sum(len(each.encode()) for each in kept)
    return iter(kept)


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Cut texts into runs of whole lines for the trainer, so that line ends are learned like any other character.

    A line longer than a run is cut; signs that the trainer keeps for itself would cost it the whole run and are left out.
    """
    for text in texts:
        run: list[str] = []
        size = 0
        for line in LINES.findall(RESERVED.sub(" ", text)):
            for start in range(0, len(line), MAX_SENTENCE_CHARACTERS):
                run.append(line[start : start + MAX_SENTENCE_CHARACTERS])
                size += len(run[-1])
                if size >= MAX_SENTENCE_CHARACTERS:
                    yield "".join(run)
                    run, size = [], 0
        if run:
            yield "".join(run)
