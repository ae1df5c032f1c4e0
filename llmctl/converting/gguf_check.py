"""The proof of a GGUF file: it is read back, and weights, logits, tokenizer and, where it is installed, llama.cpp agree.

Weights must be, bit for bit, what the quantizer meant; logits those of our own model with the same rounding; ids the
same for texts of many kinds. How far the rounded model is from the original is measured, not judged.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmctl.artifacts.load import Loaded, without_weights
from llmctl.config import ModelConfig
from llmctl.converting.convert import read_gguf
from llmctl.errors import ArtifactError
from llmctl.formats.artifact import Artifact
from llmctl.inference.encoding import encode_prompt
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
"""Texts whose next tokens are predicted."""

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
"""Texts whose ids are compared; U+2581 is not among them, which sentencepiece writes a space as."""

ROW_TOKENS = 96
LOGITS_BOUND = 1e-4
"""Largest difference of logits, as a share of the largest logit."""

N_GREEDY = 16
NEAR_TIE = 0.5
"""How far below our best logit a token of llama.cpp's may lie, in standard deviations of the logits: it rounds what it
multiplies, which turns over near ties; a wrong model is several away."""

NOT_IN_GGUF = ("dropout", "init_std", "mask_id", "decoder_start_id", "bos_id", "eos_id", "pad_id")
ROLES = {"bos_id": "bos", "eos_id": "eos", "pad_id": "padding"}


@dataclass(frozen=True)
class Proof:
    """What was found equal, and how far the rounded model is from the original.

    logits_max_difference: read back against meant. kl: nats per token, of the original from the rounded; top1: share of
    the tokens with the same best next token. llama_cpp_tokens: of N_GREEDY greedy tokens how many are ours too; None
    where `llama_cpp` is not installed.
    """

    tensors_equal: int
    texts_equal: int
    logits_max_difference: float
    tokens: int
    kl: float
    top1: float
    llama_cpp_tokens: int | None

    def record(self) -> dict[str, Any]:
        """Return it as plain data."""
        told = {name: rounded(value) if isinstance(value, float) else value for name, value in asdict(self).items()}
        return told | {"llama_cpp_of": N_GREEDY}


def rounded(value: float) -> float:
    """Return a figure in five digits."""
    return float(f"{value:.5g}")


def prove(
    path: Path,
    out: Path,
    original: Loaded,
    state: Mapping[str, Tensor],
    meant: Mapping[str, Tensor],
    ids: Mapping[str, int],
) -> Proof:
    """Read a GGUF file back and compare; `path` is where it lies, `out` what it is to be called.

    original: the model it was made from, its weights apart in `state`; meant: its weights after rounding; ids: role ->
    token, as written.
    Raises: ArtifactError saying what differs.
    """
    try:
        config, found, files, _ = read_gguf(path)
    except ArtifactError as error:
        raise failure(out, str(error)) from error
    check_config(out, original.model.config, config, ids)
    check_weights(out, meant, found)
    back = Loaded(
        with_weights(config, found),
        tokenizer_from_files(files),
        Artifact(path=path, architecture="", config=config, files=files, provenance={}),
    )
    n_texts = check_tokenizer(out, original, back)
    rows = rows_of(original)
    before = logits_of(with_weights(original.model.config, state), rows)
    wanted = logits_of(with_weights(original.model.config, meant), rows)
    after = logits_of(back.model, rows)
    difference = check_logits(out, wanted, after)
    prose = slice(len(rows) - 1)  # the last row is of tokens, not of text
    kl, top1 = distance(before[prose], after[prose])
    n_tokens = sum(len(row) for row in rows[prose])
    agreed = ask_llama_cpp(path, out, back)
    return Proof(len(meant), n_texts, difference, n_tokens, kl, top1, agreed)


def failure(out: Path, what: str) -> ArtifactError:
    """Return the error for a file that is not what it should be."""
    return ArtifactError(
        f"`{out}` was not written: read back, {what}",
        "this is a defect of llmctl or of the package `gguf`; other types (--type f16) may do",
    )


def check_config(out: Path, config: ModelConfig, found: ModelConfig, ids: Mapping[str, int]) -> None:
    """Compare configurations as far as a GGUF file holds them."""
    wanted = {field.name: getattr(config, field.name) for field in fields(ModelConfig)}
    wanted = {key: value for key, value in wanted.items() if key not in NOT_IN_GGUF}
    wanted |= {key: ids.get(role, -1) for key, role in ROLES.items()}
    for key, value in wanted.items():
        other = getattr(found, key)
        is_same = math.isclose(value, other, rel_tol=1e-6) if isinstance(value, float) else value == other
        if not is_same:
            raise failure(out, f"`{key}` is {other!r}, not {value!r}")


def check_weights(out: Path, meant: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Compare weights bit for bit."""
    for name, wanted in meant.items():
        if not torch.equal(wanted, found[name]):
            worst = float((wanted - found[name]).abs().max())
            raise failure(out, f"`{name}` differs by up to {worst:.3g} from what was meant")


def with_weights(config: ModelConfig, state: Mapping[str, Tensor]) -> LanguageModel:
    """Return a model over these very tensors."""
    model = without_weights(config)
    model.load_state_dict(with_tied(config, state), assign=True)
    model.tie()
    return model.eval()


def check_tokenizer(out: Path, original: Loaded, back: Loaded) -> int:
    """Compare ids of texts, of beginnings of prompts, and texts of ids; return how many texts."""
    ours, theirs = tokenizer_of(original), tokenizer_of(back)
    for text in PROBES:
        wanted, found = ours.encode(text), theirs.encode(text)
        if wanted != found:
            raise failure(out, f"the text {text[:40]!r} has the ids {found[:12]}, not {wanted[:12]}")
        if ours.decode(wanted) != theirs.decode(wanted):
            raise failure(out, f"the ids of {text[:40]!r} are the text {theirs.decode(wanted)[:40]!r}")
    if encode_prompt(original, PROSE[0]) != encode_prompt(back, PROSE[0]):
        raise failure(out, "a prompt begins with other special tokens")
    return len(PROBES)


def tokenizer_of(loaded: Loaded) -> Tokenizer:
    """Return the tokenizer, which is there."""
    assert loaded.tokenizer is not None
    return loaded.tokenizer


def rows_of(loaded: Loaded) -> list[list[int]]:
    """Return the rows of ids that are predicted: prose, and last a walk over the whole vocabulary."""
    config = loaded.model.config
    longest = min(ROW_TOKENS, config.max_positions)
    texts = [encode_prompt(loaded, text)[:longest] for text in PROSE]
    walk = torch.linspace(0, config.vocab_size - 1, longest).long().tolist()
    return [*(row for row in texts if row), walk]


@torch.inference_mode()
def logits_of(model: LanguageModel, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the logits (T, V) of every row."""
    return [model(torch.tensor([row]))[0] for row in rows]


def check_logits(out: Path, wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Compare logits and return the largest difference."""
    difference = float(torch.stack([(a - b).abs().max() for a, b in zip(wanted, found, strict=True)]).max())
    largest = float(torch.stack([one.abs().max() for one in wanted]).max())
    if not difference <= LOGITS_BOUND * max(largest, 1e-6):  # nan is a difference too
        raise failure(out, f"logits of up to {largest:.3g} differ by up to {difference:.3g}")
    return difference


def distance(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[float, float]:
    """Return KL(before || after) in nats per token, and the share of tokens with the same best next one."""
    n_tokens = sum(len(row) for row in before)
    total = agreeing = 0.0
    for p_TV, q_TV in zip(before, after, strict=True):
        log_p_TV, log_q_TV = p_TV.log_softmax(-1), q_TV.log_softmax(-1)
        total += float((log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(dtype=torch.float64))
        agreeing += float((p_TV.argmax(-1) == q_TV.argmax(-1)).sum())
    return max(total / n_tokens, 0.0), agreeing / n_tokens


# --- llama.cpp itself ------------------------------------------------------------------------------------------------


def ask_llama_cpp(path: Path, out: Path, back: Loaded) -> int | None:
    """Let llama.cpp tokenize and go on greedily; return how many of N_GREEDY tokens are ours too, None without it.

    Raises: ArtifactError where it reads other ids, or tokens that are far from our best.
    """
    longest = min(ROW_TOKENS, back.model.config.max_positions) - N_GREEDY
    if find_spec("llama_cpp") is None or longest < 1:
        return None
    prompt = encode_prompt(back, PROSE[0])[:longest]
    tokenizer = tokenizer_of(back)
    with llama_cpp(path, out, len(prompt) + N_GREEDY) as llama:
        for text in PROBES:
            wanted, found = tokenizer.encode(text), llama.tokenize(text.encode(), add_bos=False, special=False)
            if wanted != found:
                raise failure(out, f"llama.cpp gives the text {text[:40]!r} the ids {found[:12]}, not {wanted[:12]}")
        tokens = list(greedy(llama, prompt))
    logits_TV = logits_of(back.model, [[*prompt, *tokens]])[0][len(prompt) - 1 : -1]
    chosen_T1 = torch.tensor(tokens)[:, None]
    below_T = (logits_TV.amax(-1) - logits_TV.gather(1, chosen_T1)[:, 0]) / logits_TV.std(dim=-1)
    if bool((below_T > NEAR_TIE).any()):
        raise failure(
            out, f"llama.cpp goes on with tokens {float(below_T.max()):.1f} standard deviations below our best"
        )
    return int((below_T == 0).sum())


@contextmanager
def llama_cpp(path: Path, out: Path, n_positions: int) -> Iterator[Any]:
    """Yield a file opened by llama.cpp.

    Raises: ArtifactError when it does not open it.
    """
    from llama_cpp import Llama

    with redirect_stderr(StringIO()):  # it warns of contexts shorter than its own smallest
        try:
            llama = Llama(model_path=str(path), n_ctx=n_positions, n_gpu_layers=0, verbose=False)
        except ValueError as error:
            raise failure(out, f"llama.cpp refuses it: {error}") from error
        try:
            yield llama
        finally:
            llama.close()


def greedy(llama: Any, prompt: Sequence[int]) -> Iterator[int]:
    """Yield what llama.cpp goes on with."""
    tokens = llama.generate(list(prompt), temp=0.0, top_k=1, repeat_penalty=1.0)
    for _, token in zip(range(N_GREEDY), tokens, strict=False):
        yield int(token)
