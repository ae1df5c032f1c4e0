"""Verify a GGUF file by reading it back: compare weights, logits, token ids and, if installed, llama.cpp.

Weights must equal the quantizer's output bit for bit; logits must equal those of our model with the same rounding; token
ids must be equal for texts of many kinds. The distance of the quantized model from the original is only measured.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from io import StringIO
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmctl.artifacts.load import Loaded, without_weights
from llmctl.config import ModelConfig
from llmctl.converting.convert import read_gguf
from llmctl.errors import ArtifactError
from llmctl.formats.artifact import Artifact
from llmctl.formats.sentence_encoder import sentence_encoder
from llmctl.inference.encoding import encode_prompt
from llmctl.model.shapes import complete, theta_of, window_of
from llmctl.model.transformer import LanguageModel, with_tied
from llmctl.tokenizer.base import Tokenizer
from llmctl.tokenizer.load import tokenizer_from_files

PROSE = (
    """The river had risen in the night, and by morning the lower fields lay under a sheet of grey water. Nobody in the
village spoke of leaving. They carried the grain up to the loft, tied the boats to the oak, and waited.""",
    """To sort a list of n numbers, split it in half, sort both halves the same way, and merge them: compare the first
elements, take the smaller one, and go on until both are empty. The work is proportional to n log n.""",
    """def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)
""",
    "夜里下了一场大雨，早晨河水漫过了石桥。孩子们站在岸边，看着树叶被水带走。老人说，三十年前也有过这样的一天。",
)
"""Texts on which logits are compared."""

PROBES = (
    "",
    " ",
    "Hello, world! It's 5 o'clock; they'll say we're late.",
    "  two  spaces,\ta tab\n\nand an empty line\r\n  ",
    "0123456789 3.14159 1,234,567 2024-02-29 x86_64",
    "我们今天去北京，明天回来。繁體字也可以嗎？",
    "Straße, naïve café, Ελληνικά, русский, العربية, हिन्दी, 日本語かな, 한국어",
    "🙂👩‍👩‍👧‍👦🇨🇳 → ∑ ½ €",
    "<s> </s> <unk> <pad> <mask> <|im_start|>user<|im_end|> <|endoftext|> [INST] <0x41> [PAD7]",
    "if (a[i] >= b) { return f(a, i++); } // ok",
    "CamelCase snake_case SHOUTING \\n {{ braces }} %s",
    "\x00\x07\u200b\ufeff",
    *PROSE,
)
"""Texts whose token ids are compared; without U+2581, which sentencepiece uses for a space."""

ROW_TOKENS = 96
LOGITS_BOUND = 1e-4
"""Maximum difference of logits, relative to the largest logit."""

N_GREEDY = 16
NEAR_TIE = 0.5
"""How far below our top logit the logit of llama.cpp's token may be, in standard deviations of the logits: its rounding of
activations flips near ties; a wrong model is several deviations away."""

NOT_IN_GGUF = ("dropout", "init_std", "mask_id", "decoder_start_id", "bos_id", "eos_id", "pad_id", "architecture")
PER_LAYER = {"attention_windows": window_of, "rope_thetas": theta_of}
ROLES = {"bos_id": "bos", "eos_id": "eos", "pad_id": "padding"}


@dataclass(frozen=True)
class Proof:
    """Results of the verification, and the distance of the quantized model from the original.

    logits_max_difference: of the file read back and the expected weights (of an encoder: of its states). kl:
    KL(original || quantized) in nats per token; top1: top-1 agreement with the original; cosine: the least similarity of
    an encoder's vectors to the original's. llama_cpp_tokens: how many of N_GREEDY greedy tokens agree with llama.cpp;
    llama_cpp_kl: KL(original || llama.cpp's predictions); llama_cpp_cosine: the least similarity of its vectors,
    llama_cpp_texts: how many texts have our ids there (of an encoder); None if `llama_cpp` is not installed.
    """

    tensors_equal: int
    texts_equal: int
    logits_max_difference: float
    tokens: int
    kl: float | None
    top1: float | None
    cosine: float | None
    llama_cpp_tokens: int | None
    llama_cpp_kl: float | None
    llama_cpp_cosine: float | None
    llama_cpp_texts: int | None

    def record(self) -> dict[str, Any]:
        """Return the proof as JSON-compatible data."""
        values = {name: rounded(value) if isinstance(value, float) else value for name, value in asdict(self).items()}
        return values | {"llama_cpp_of": N_GREEDY}


def rounded(value: float) -> float:
    """Round a metric to five significant digits."""
    return float(f"{value:.5g}")


def prove(
    path: Path,
    out: Path,
    original: Loaded,
    state: Mapping[str, Tensor],
    meant: Mapping[str, Tensor],
    ids: Mapping[str, int],
) -> Proof:
    """Read the GGUF file at `path` back and compare it; `out` is its final name, for errors.

    original: the source model, with its weights in `state`; meant: the weights after quantization; ids: role -> token id
    as written.
    Raises: ArtifactError naming the difference.
    """
    try:
        config, weights, files, _ = read_gguf(path)
    except ArtifactError as error:
        raise failure(out, str(error)) from error
    check_config(out, original.model.config, config, ids)
    check_weights(out, meant, weights)
    back = Loaded(
        with_weights(config, weights),
        tokenizer_from_files(files),
        Artifact(path=path, architecture="", config=config, files=files, provenance={}),
    )
    n_texts = check_tokenizer(out, original, back)
    rows = rows_of(original)
    before = logits_of(with_weights(original.model.config, state), rows)
    if not all(bool(logits.isfinite().all()) for logits in before):
        raise ArtifactError(
            "the model's outputs are not finite", "its weights are damaged or too large: train it again"
        )
    expected = logits_of(with_weights(original.model.config, meant), rows)
    after = logits_of(back.model, rows)
    difference = check_logits(out, expected, after)
    prose = slice(len(rows) - 1)  # the last row is not text, see rows_of
    n_tokens = sum(len(row) for row in rows[prose])
    if config.family == "encoder":
        cosine = min(similarity(one, two) for one, two in zip(before[prose], after[prose], strict=True))
        asked, n_equal = ask_for_vectors(path, out, back)
        return Proof(len(meant), n_texts, difference, n_tokens, None, None, cosine, None, None, asked, n_equal)
    kl, top1 = distance(before[prose], after[prose])
    agreed, measured = ask_llama_cpp(path, out, back, rows[prose], before[prose])
    return Proof(len(meant), n_texts, difference, n_tokens, kl, top1, None, agreed, measured, None, None)


def failure(out: Path, what: str) -> ArtifactError:
    """Return the error for a file that differs from what was meant to be written."""
    return ArtifactError(
        f"`{out}` was not written, verification failed: {what}",
        "this is a bug in llmctl or in the package `gguf`; try another type, such as `--type f16`",
    )


def check_config(out: Path, config: ModelConfig, back: ModelConfig, ids: Mapping[str, int]) -> None:
    """Compare the config fields that a GGUF file stores."""
    expected = {field.name: getattr(config, field.name) for field in fields(ModelConfig)}
    expected = {key: value for key, value in expected.items() if key not in NOT_IN_GGUF}
    expected |= {key: ids.get(role, -1) for key, role in ROLES.items()}
    back = complete(back)
    for key, value in expected.items():
        other = getattr(back, key)
        if key in PER_LAYER:
            is_same = all(
                PER_LAYER[key](config, layer) == PER_LAYER[key](back, layer) for layer in range(config.n_layers)
            )
        else:
            is_same = is_equal(value, other)
        if not is_same:
            raise failure(out, f"`{key}` is {other!r}, not {value!r}")


def is_equal(value: Any, other: Any) -> bool:
    """Tell whether two values of a field are the same, numbers as float32."""
    if isinstance(value, tuple) and isinstance(other, tuple) and len(value) == len(other):
        return all(is_equal(one, two) for one, two in zip(value, other, strict=True))
    return math.isclose(value, other, rel_tol=1e-6) if isinstance(value, float) else bool(value == other)


def check_weights(out: Path, meant: Mapping[str, Tensor], back: Mapping[str, Tensor]) -> None:
    """Compare weights bit for bit."""
    for name, expected in meant.items():
        if not torch.equal(expected, back[name]):
            worst = float((expected - back[name]).abs().max())
            raise failure(out, f"`{name}` differs by up to {worst:.3g} from the quantized weights")


def with_weights(config: ModelConfig, state: Mapping[str, Tensor]) -> LanguageModel:
    """Return a model that uses these tensors without copying them."""
    model = without_weights(config)
    model.load_state_dict(with_tied(config, state), assign=True)
    model.tie()
    return model.eval()


def check_tokenizer(out: Path, original: Loaded, back: Loaded) -> int:
    """Compare encoding, decoding and the special tokens of a prompt; return the number of texts."""
    ours, theirs = tokenizer_of(original), tokenizer_of(back)
    for text in PROBES:
        expected, ids = ours.encode(text), theirs.encode(text)
        if expected != ids:
            raise failure(out, f"the text {text[:40]!r} has the ids {ids[:12]}, not {expected[:12]}")
        if ours.decode(expected) != theirs.decode(expected):
            raise failure(out, f"the ids of {text[:40]!r} decode to {theirs.decode(expected)[:40]!r}")
    if encode_prompt(original, PROSE[0]) != encode_prompt(back, PROSE[0]):
        raise failure(out, "a prompt begins with different special tokens")
    return len(PROBES)


def tokenizer_of(loaded: Loaded) -> Tokenizer:
    """Return the tokenizer of a model that has one."""
    assert loaded.tokenizer is not None
    return loaded.tokenizer


def rows_of(loaded: Loaded) -> list[list[int]]:
    """Return the rows to compare: prose, and last ids spread over the whole vocabulary."""
    config = loaded.model.config
    longest = min(ROW_TOKENS, config.max_positions)
    texts = [encode_prompt(loaded, text)[:longest] for text in PROSE]
    if config.family == "encoder":  # as it reads them: with its tokens at both ends
        texts = [[*ids[: longest - len(loaded.frame.after)], *loaded.frame.after] for ids in texts]
    spread = torch.linspace(0, config.vocab_size - 1, longest).long().tolist()
    return [*(row for row in texts if row), spread]


@torch.inference_mode()
def logits_of(model: LanguageModel, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the logits (T, V) of every row, or the states (T, D) of an encoder."""
    run = model.hidden if model.config.family == "encoder" else model
    return [run(torch.tensor([row]))[0] for row in rows]


def similarity(one_TD: Tensor, other_TD: Tensor) -> float:
    """Return the cosine of two texts' mean states."""
    return float(torch.cosine_similarity(one_TD.mean(0), other_TD.mean(0), dim=0))


def check_logits(out: Path, expected: Sequence[Tensor], back: Sequence[Tensor]) -> float:
    """Compare logits and return the largest difference."""
    difference = float(torch.stack([(a - b).abs().max() for a, b in zip(expected, back, strict=True)]).max())
    largest = float(torch.stack([logits.abs().max() for logits in expected]).max())
    if not difference <= LOGITS_BOUND * max(largest, 1e-6):  # also true for NaN
        raise failure(out, f"logits of up to {largest:.3g} differ by up to {difference:.3g}")
    return difference


def distance(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[float, float]:
    """Return KL(before || after) in nats per token, and the top-1 agreement."""
    n_tokens = sum(len(row) for row in before)
    total = agreeing = 0.0
    for p_TV, q_TV in zip(before, after, strict=True):
        log_p_TV, log_q_TV = p_TV.log_softmax(-1), q_TV.log_softmax(-1)
        total += float((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(dtype=torch.float64))
        agreeing += float((p_TV.argmax(-1) == q_TV.argmax(-1)).sum())
    return max(total / n_tokens, 0.0), agreeing / n_tokens


# --- llama.cpp -------------------------------------------------------------------------------------------------------


def ask_llama_cpp(
    path: Path, out: Path, back: Loaded, rows: Sequence[Sequence[int]], original: Sequence[Tensor]
) -> tuple[int | None, float | None]:
    """Compare tokenization and greedy decoding with llama.cpp, and its predictions with the original model's.

    Returns how many of N_GREEDY tokens agree, and KL(original || llama.cpp) on rows of ids; None if it is not installed.
    Raises: ArtifactError if its token ids differ, or its tokens are far below our top logits.
    """
    longest = min(ROW_TOKENS, back.model.config.max_positions) - N_GREEDY
    if find_spec("llama_cpp") is None or longest < 1:
        return None, None
    prompt = encode_prompt(back, PROSE[0])[:longest]
    tokenizer = tokenizer_of(back)
    with llama_cpp(path, out, longest + N_GREEDY, logits_all=True) as llama:
        compare_ids(out, tokenizer, llama)
        tokens = list(greedy(llama, prompt))
        kl, _ = distance(original, [predicted(llama, row) for row in rows])
    logits_TV = logits_of(back.model, [[*prompt, *tokens]])[0][len(prompt) - 1 : -1]
    chosen_T1 = torch.tensor(tokens)[:, None]
    below_T = (logits_TV.amax(-1) - logits_TV.gather(1, chosen_T1)[:, 0]) / logits_TV.std(dim=-1)
    if bool((below_T > NEAR_TIE).any()):
        raise failure(
            out, f"llama.cpp generates tokens {float(below_T.max()):.1f} standard deviations below our top logit"
        )
    return int((below_T == 0).sum()), kl


def predicted(llama: Any, row: Sequence[int]) -> Tensor:
    """Return llama.cpp's logits (T, V) of a row."""
    llama.reset()
    llama.eval(list(row))
    return torch.tensor(llama.scores[: len(row)])


def compare_ids(out: Path, tokenizer: Tokenizer, llama: Any) -> None:
    """Compare tokenization with llama.cpp.

    Raises: ArtifactError naming a text with other ids.
    """
    for text in PROBES:
        expected, ids = tokenizer.encode(text), llama.tokenize(text.encode(), add_bos=False, special=False)
        if expected != ids:
            pairs = enumerate(zip_longest(expected, ids))
            first = max(0, next(at for at, (own, other) in pairs if own != other) - 2)
            shown = slice(first, first + 8)
            where = f"llama.cpp gives {text[:40]!r} from token {first} the ids {ids[shown]}"
            raise failure(out, f"{where}, not {expected[shown]}")


def n_equal_texts(tokenizer: Tokenizer, llama: Any) -> int:
    """Return of how many texts llama.cpp's ids are ours: its WordPiece treats some marks of other scripts otherwise.

    It drops vowel signs and Hangul syllables that BERT's normalization keeps; that is not a matter of the file.
    """
    return sum(tokenizer.encode(text) == llama.tokenize(text.encode(), add_bos=False, special=False) for text in PROBES)


VECTOR_BOUND = 0.999
"""Least similarity of llama.cpp's vectors to ours: it approximates GELU, and rounds activations to 8 bits with some blocks."""


def ask_for_vectors(path: Path, out: Path, back: Loaded) -> tuple[float | None, int | None]:
    """Compare tokenization and the vectors of texts with llama.cpp.

    Returns the least similarity, and of how many texts the ids are equal; None if it is not installed.
    Raises: ArtifactError if a vector is another one.
    """
    if find_spec("llama_cpp") is None:
        return None, None
    own = sentence_encoder(back.artifact.files).pooling or "mean"
    longest = min(ROW_TOKENS, back.model.config.max_positions)
    least = 1.0
    with llama_cpp(path, out, longest, embedding=True) as llama:
        n_equal = n_equal_texts(tokenizer_of(back), llama)
        for text in PROSE:
            words = text[: longest - 2]  # a character is a token of WordPiece at most
            ids = [*encode_prompt(back, words), *back.frame.after]
            with torch.inference_mode():
                expected_D = back.model.pooled(torch.tensor([ids]), pooling=own)[0]
            found_D = torch.tensor(llama.embed(words))
            least = min(least, float(torch.cosine_similarity(expected_D, found_D, dim=0)))
    if not least >= VECTOR_BOUND:
        raise failure(out, f"llama.cpp gives a text a vector whose cosine to ours is {least:.4f}")
    return least, n_equal


@contextmanager
def llama_cpp(path: Path, out: Path, n_positions: int, **options: Any) -> Iterator[Any]:
    """Yield a file opened by llama.cpp.

    Raises: ArtifactError if llama.cpp cannot open it.
    """
    from llama_cpp import Llama

    with redirect_stderr(StringIO()):  # it warns about short contexts
        try:
            llama = Llama(model_path=str(path), n_ctx=n_positions, n_gpu_layers=0, verbose=False, **options)
        except ValueError as error:
            raise failure(out, f"llama.cpp cannot open it: {error}") from error
        try:
            yield llama
        finally:
            llama.close()


def greedy(llama: Any, prompt: Sequence[int]) -> Iterator[int]:
    """Yield N_GREEDY greedy tokens from llama.cpp."""
    tokens = llama.generate(list(prompt), temp=0.0, top_k=1, repeat_penalty=1.0)
    for _, token in zip(range(N_GREEDY), tokens, strict=False):
        yield int(token)
