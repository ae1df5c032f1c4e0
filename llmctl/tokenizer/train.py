"""Train a tokenizer on a stream of texts: lossless, reproducible byte for byte, in bounded memory."""

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from llmctl.config import TokenizerConfig
from llmctl.errors import UsageError
from llmctl.tokenizer.sentencepiece import SentencePieceTokenizer

VOCAB_SIZES = (2048, 4096, 8192, 16_384, 32_768)
SIZE_STEPS = ((8_000_000, 2048), (40_000_000, 8192))
"""(bytes of text, vocabulary size up to that much text); more text gets the largest of `VOCAB_SIZES`."""

N_BYTE_PIECES = 256
N_SPECIALS = 5
MAX_VOCAB_SIZE = (1 << 31) - 1  # sentencepiece counts pieces in an int32

MAX_SENTENCE_CHARACTERS = 4000
"""The trainer's cost grows with sentence length, so longer lines are split."""

LINES = re.compile(r"[^\n]*\n|[^\n]+")
RESERVED = re.compile("[\0\u2581\u2585]")
"""sentencepiece drops training sentences that contain NUL or its symbols for spaces and unknown characters."""


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> SentencePieceTokenizer:
    """Train a lossless sentencepiece model: byte fallback, no normalization, no dummy prefix, all spaces kept.

    Special tokens <pad> <unk> <s> </s> <mask>, then `n_sentinels` of <extra_id_i>, are control pieces: text never
    encodes to them. If the corpus has fewer pieces than `vocab_size`, the vocabulary is smaller than requested.
    Raises: UsageError for an invalid setting, an empty corpus, or a vocabulary too small for the corpus's characters.
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
            vocab_size=1_000_000 if is_char else vocab_size,  # char: no limit, the corpus decides
            character_coverage=1.0 if is_char else config.character_coverage,
            byte_fallback=True,
            # In a corpus without spaces (Chinese), the space would otherwise fall back to the bytes of U+2581.
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
            num_threads=1,  # the result depends on the number of threads
            minloglevel=2,
        )
    except RuntimeError as error:
        raise explain(error, config) from None
    return SentencePieceTokenizer(model.getvalue())


def check(config: TokenizerConfig) -> None:
    """Check settings for which the trainer's own errors are unclear or missing.

    Raises: UsageError naming the setting and its value.
    """
    if config.n_sentinels < 0:
        raise UsageError(
            f"`tokenizer.n_sentinels` is {config.n_sentinels}, but must be at least 0", "span corruption needs 100"
        )
    if not 0.98 <= config.character_coverage <= 1:  # the range that sentencepiece accepts
        raise UsageError(
            f"`tokenizer.character_coverage` is {config.character_coverage}, not between 0.98 and 1",
            "0.9995 suits Chinese, 1 keeps every character",
        )
    if config.max_train_bytes < 1:
        raise UsageError(
            f"`tokenizer.max_train_bytes` is {config.max_train_bytes}, but must be positive", "use a million or more"
        )
    floor = N_BYTE_PIECES + N_SPECIALS + config.n_sentinels
    if config.vocab_size and config.model_type != "char" and config.vocab_size <= floor:
        raise UsageError(
            f"`tokenizer.vocab_size` {config.vocab_size} is too small: bytes and special tokens alone need {floor}",
            f"--set tokenizer.vocab_size={2 * floor}, or 0 to choose it from the text",
        )
    if config.vocab_size > MAX_VOCAB_SIZE:
        raise UsageError(
            f"`tokenizer.vocab_size` {config.vocab_size} is too large: at most {MAX_VOCAB_SIZE}",
            "0 chooses it from the text",
        )


def fitting_vocab_size(sample: Sequence[str], config: TokenizerConfig) -> int:
    """Choose a vocabulary size: larger for more text, and for scripts with many characters.

    Covered characters, bytes and special tokens take at most two thirds of it, leaving a third for longer pieces.
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
    """Convert an error of the trainer into one that names our setting."""
    text = str(error)
    needed = re.search(r"required_chars\. \d+ vs (\d+)", text)
    if needed:
        return UsageError(
            f"`tokenizer.vocab_size` {config.vocab_size} is too small: bytes, special tokens and the corpus's "
            f"characters need {needed[1]}",
            f"--set tokenizer.vocab_size={max(512, 2 * int(needed[1]))}, or a lower tokenizer.character_coverage",
        )
    if "sentences_.empty" in text:
        return UsageError("the corpus contains no text to train a tokenizer on", "pass files with text")
    return UsageError(f"the tokenizer cannot be trained: {text}", "try another --vocab-size or model type")


def sampled(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Return the texts, or every second, fourth, ... of them if they exceed `max_bytes`.

    The sample is spread evenly over the whole stream, and memory never exceeds `max_bytes` by more than one text.
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
    """Split texts into chunks of whole lines for the trainer, so that line ends are learned like other characters.

    Longer lines are split. Characters reserved by the trainer become spaces, since it would drop the whole chunk.
    """
    for text in texts:
        chunk: list[str] = []
        size = 0
        for line in LINES.findall(RESERVED.sub(" ", text)):
            for start in range(0, len(line), MAX_SENTENCE_CHARACTERS):
                chunk.append(line[start : start + MAX_SENTENCE_CHARACTERS])
                size += len(chunk[-1])
                if size >= MAX_SENTENCE_CHARACTERS:
                    yield "".join(chunk)
                    chunk, size = [], 0
        if chunk:
            yield "".join(chunk)
