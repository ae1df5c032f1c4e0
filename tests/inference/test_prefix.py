"""What prompts begin with is read once: the logits, the tokens and the draws are those of each prompt on its own."""

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from llmctl.config import GenerateConfig
from llmctl.inference import prefix as prefix_module
from llmctl.inference import session as session_module
from llmctl.inference.chat import Chat
from llmctl.inference.generate import Prompt, generate
from llmctl.inference.prefix import Prefix, n_common
from llmctl.inference.session import Session
from llmctl.model.decode import Decoder
from tests.support.models import KINDS

HEADER = [2, *range(250, 269)]
TAILS = [[300, 301, 302], [303], [280, 281, 282, 283, 284, 285], [299, 298]]
PROMPTS = [[*HEADER, *tail] for tail in TAILS]
GREEDY = GenerateConfig(max_tokens=12, temperature=0.0)
DRAWN = GenerateConfig(max_tokens=12, temperature=1.0, top_p=0.95, repetition_penalty=1.2, seed=5)
DECODERS = [kind for kind, fields in KINDS.items() if "family" not in fields]


@pytest.fixture(autouse=True)
def anything_pays(monkeypatch) -> None:
    monkeypatch.setattr(prefix_module, "LEAST_KNOWN", 1)
    monkeypatch.setattr(prefix_module, "LEAST_SAVED", 1)


@pytest.fixture
def n_read(monkeypatch) -> list[tuple[int, int]]:
    """Return the shapes of what models read, as it is read."""
    shapes: list[tuple[int, int]] = []
    plain, fast = Session._decode, Decoder.read

    def decode(self, ids_BT, **inputs):
        shapes.append(tuple(ids_BT.shape))
        return plain(self, ids_BT, **inputs)

    def read(self, ids_BT, cache, **inputs):
        shapes.append(tuple(ids_BT.shape))
        return fast(self, ids_BT, cache, **inputs)

    monkeypatch.setattr(Session, "_decode", decode)
    monkeypatch.setattr(Decoder, "read", read)
    return shapes


def prompts(ids: Sequence[Sequence[int]] = PROMPTS) -> list[Prompt]:
    return [Prompt(index, list(row)) for index, row in enumerate(ids)]


def alone(loaded, prompt: Prompt, config: GenerateConfig) -> list[int]:
    return next(generate(loaded, [prompt], config)).ids


@torch.inference_mode()
def logits_of(loaded, ids: Sequence[Sequence[int]], prefix: Prefix | None) -> list[torch.Tensor]:
    """Return the logits after the prompts and after each of some more tokens."""
    session = Session(loaded.model, ids, 9, decoder=loaded.decoder, prefix=prefix)
    logits = [session.begin()]
    logits += [session.step(torch.full((len(ids),), token)) for token in (300, 7, 301)]
    session.select(torch.tensor([len(ids) - 1, 0]))
    return [*logits, session.step(torch.tensor([302, 303]))]


@pytest.mark.parametrize("is_own", [True, False])
@pytest.mark.parametrize("ids", [PROMPTS, [[*HEADER, 300 + n] for n in range(3)], [HEADER, HEADER], [HEADER, [2]]])
@pytest.mark.parametrize("kind", DECODERS)
def test_logits_are_those_of_reading_all_of_it(make_loaded, kind: str, ids: list[list[int]], is_own: bool):
    loaded = make_loaded(kind, is_own=is_own)
    expected, prefix = logits_of(loaded, ids, None), Prefix()
    for _ in range(2):  # made, and then found
        for one, other in zip(expected, logits_of(loaded, ids, prefix), strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-4)
    assert prefix.ids == ids[0][: min(n_common(ids[0], row) for row in ids)]


@pytest.mark.parametrize("config", [GREEDY, DRAWN, dataclasses.replace(GREEDY, beams=3, max_tokens=6)])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_prompts_completion_stays_its_own(make_loaded, kind: str, config: GenerateConfig):
    loaded = make_loaded(kind)
    expected = [alone(loaded, prompt, config) for prompt in prompts()]
    for size in (1, 2, 16):
        settings = dataclasses.replace(config, batch_size=size)
        assert [found.ids for found in generate(loaded, prompts(), settings)] == expected


@pytest.mark.parametrize("kind", ["rope", "windows", "relative"])
def test_keys_and_values_in_eight_bits_are_held_as_they_are(make_loaded, kind: str):
    loaded, config, prefix = make_loaded(kind), dataclasses.replace(GREEDY, kv="int8"), Prefix()
    expected = [alone(loaded, prompt, config) for prompt in prompts()]
    for _ in range(2):
        assert [found.ids for found in generate(loaded, prompts(), config, prefix=prefix)] == expected
    assert {part.dtype for part in prefix.parts} == {torch.int8, torch.float32}


@pytest.mark.parametrize("kind", ["rope", "windows", "query-layer", "relative"])
def test_a_long_header_is_read_in_parts(make_loaded, monkeypatch, kind: str):
    loaded = make_loaded(kind)
    expected = [alone(loaded, prompt, GREEDY) for prompt in prompts()]
    monkeypatch.setattr(session_module, "PREFILL_TOKENS", 3)
    assert [found.ids for found in generate(loaded, prompts(), GREEDY)] == expected


def test_a_batch_reads_its_header_once_and_the_next_ones_not_at_all(make_loaded, n_read):
    prefix = Prefix()
    settings = dataclasses.replace(GREEDY, max_tokens=1)
    list(generate(make_loaded("rope"), prompts(), settings, prefix=prefix))
    assert n_read == [(1, len(HEADER)), (4, 6)]
    n_read.clear()
    list(generate(make_loaded("rope"), prompts([[*HEADER, 9], [*HEADER, 8, 7]]), settings, prefix=prefix))
    assert n_read == [(2, 2)]
    n_read.clear()  # the longest rest decides, and what is held stays held for those that come after it
    list(generate(make_loaded("rope"), prompts([[*HEADER, 9], [2, 300, 301]]), settings, prefix=prefix))
    assert n_read == [(2, 2)]
    n_read.clear()
    list(generate(make_loaded("rope"), prompts([[*HEADER, 9], [5, *range(100, 130)]]), settings, prefix=prefix))
    assert n_read == [(2, 31)]
    assert prefix.ids == HEADER


def test_a_header_that_becomes_longer_is_read_on(make_loaded, n_read):
    prefix = Prefix()
    settings = dataclasses.replace(GREEDY, max_tokens=1)
    loaded = make_loaded("rope")
    list(generate(loaded, prompts([[*HEADER[:8], 9], [*HEADER[:8], 7]]), settings, prefix=prefix))
    n_read.clear()
    list(generate(loaded, prompts(), settings, prefix=prefix))
    assert n_read == [(1, len(HEADER) - 8), (4, 6)]


@pytest.mark.parametrize("least_saved", [len(HEADER), len(HEADER) + 1])
def test_little_in_common_is_not_read_on_its_own(make_loaded, n_read, monkeypatch, least_saved: int):
    monkeypatch.setattr(prefix_module, "LEAST_SAVED", least_saved)
    list(generate(make_loaded("rope"), prompts(PROMPTS[:2]), dataclasses.replace(GREEDY, max_tokens=1)))
    whole = [(2, len(HEADER) + 3)]
    assert n_read == (whole if least_saved > len(HEADER) else [(1, len(HEADER)), (2, 3)])


def test_a_conversation_reads_what_is_new_of_it(make_loaded, n_read):
    loaded = make_loaded("rope", max_positions=400)
    chat = Chat(loaded, GREEDY, system="a list of strings")
    answers = []
    for text in ("a", "of strings", "a list"):
        n_read.clear()
        answers.append(chat.ask(text, lambda _: None).text)
        assert n_read[0][0] == 1
    assert n_read[0][1] < len(chat.prefix.ids) / 2
    fresh = Chat(loaded, GREEDY, system="a list of strings")
    for text, answer in zip(("a", "of strings", "a list"), answers, strict=True):
        fresh.prefix = Prefix()
        assert fresh.ask(text, lambda _: None).text == answer


def test_an_interrupted_answer_is_held_as_far_as_it_was_read(make_loaded):
    loaded, prefix = make_loaded("rope", eos_id=-1), Prefix()
    heard: list[str] = []

    def stop(_: int, new: str) -> None:
        heard.append(new)
        if len(heard) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(generate(loaded, prompts(PROMPTS[:1]), GREEDY, stop, prefix=prefix))
    whole = alone(loaded, prompts()[0], GREEDY)
    assert len(PROMPTS[0]) <= len(prefix.ids) < len(PROMPTS[0]) + 12
    assert [*PROMPTS[0], *whole][: len(prefix.ids)] == prefix.ids
    again = Prompt(0, [*prefix.ids, 305])
    assert next(generate(loaded, [again], GREEDY, prefix=prefix)).ids == alone(loaded, again, GREEDY)


def test_what_is_held_is_one_text(make_loaded):
    loaded, prefix = make_loaded("rope"), Prefix()
    list(generate(loaded, prompts(), GREEDY, prefix=prefix))
    assert {tuple(part.shape) for part in prefix.parts} == {(4, len(HEADER), 8)}
    list(generate(loaded, [Prompt(0, [5, 6, 7])], dataclasses.replace(GREEDY, max_tokens=1), prefix=prefix))
    assert prefix.ids == [5, 6, 7]
    assert {tuple(part.shape) for part in prefix.parts} == {(4, 3, 8)}


def test_an_encoder_decoder_has_no_beginning_to_hold(make_loaded):
    loaded, prefix = make_loaded("t5"), Prefix()
    together = [found.ids for found in generate(loaded, prompts(), GREEDY, prefix=prefix)]
    assert together == [alone(loaded, prompt, GREEDY) for prompt in prompts()]
    assert prefix.ids == []


@pytest.mark.parametrize(("one", "other", "n"), [([], [1], 0), ([1, 2], [1, 2], 2), ([1, 2], [1, 3], 1), ([3], [1], 0)])
def test_common_tokens(one: list[int], other: list[int], n: int):
    assert n_common(one, other) == n_common(other, one) == n
