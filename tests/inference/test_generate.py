"""A prompt's completion is its own: whatever else is in the batch, cached or not, streamed or not."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.config import GenerateConfig
from llmctl.errors import ArtifactError, UsageError
from llmctl.formats.artifact_write import write_artifact
from llmctl.inference import session as session_module
from llmctl.inference.beam import beam_search
from llmctl.inference.encoding import encode_prompt
from llmctl.inference.generate import Prompt, generate
from llmctl.inference.session import Session
from llmctl.inference.text_stream import TextStream, overlap
from llmctl.model.cache import CACHES
from llmctl.tokenizer.load import load_tokenizer
from tests.support.models import KINDS

GREEDY = GenerateConfig(max_tokens=12, temperature=0.0)
DRAWN = GenerateConfig(max_tokens=12, temperature=1.0, top_p=0.95, repetition_penalty=1.2, seed=5)
PROMPTS = [[2, 300, 301, 302], [2], [2, 280, 281, 282, 283, 284, 285, 286], [2, 305]]


def prompts(ids=PROMPTS) -> list[Prompt]:
    return [Prompt(index, list(row)) for index, row in enumerate(ids)]


def by_full_forward(loaded, ids: list[int], n: int) -> list[int]:
    """Greedy decoding without any cache."""
    model = loaded.model
    out: list[int] = []
    for _ in range(n):
        with torch.no_grad():
            if model.config.family == "decoder":
                logits = model(torch.tensor([[*ids, *out]]))
            else:
                start = model.config.decoder_start_id
                logits = model(torch.tensor([ids]), decoder_input_ids_BT=torch.tensor([[start, *out]]))
        token = int(logits[0, -1].argmax())
        if token == model.config.eos_id:
            break
        out.append(token)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_cached_and_batched_equals_a_full_forward_for_each(make_loaded, kind: str):
    loaded = make_loaded(kind)
    got = list(generate(loaded, prompts(), GREEDY))
    assert [completion.index for completion in got] == [0, 1, 2, 3]
    for prompt, completion in zip(prompts(), got, strict=True):
        assert completion.ids == by_full_forward(loaded, prompt.ids, 12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_draws_do_not_depend_on_the_batch(make_loaded, kind: str, batch_size: int):
    loaded = make_loaded(kind)
    together = list(generate(loaded, prompts(), DRAWN))
    apart = list(generate(loaded, prompts(), dataclasses.replace(DRAWN, batch_size=batch_size)))
    assert [completion.ids for completion in together] == [completion.ids for completion in apart]
    other = list(generate(loaded, prompts(), dataclasses.replace(DRAWN, seed=6)))
    assert [completion.ids for completion in together] != [completion.ids for completion in other]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_do_not_depend_on_the_texts_in_the_batch(make_loaded, kind: str, dtype: torch.dtype, error: float):
    """To the last bit on those of other rows of the same lengths; on their number and lengths only by rounding."""
    loaded = make_loaded(kind)
    loaded.model.to(dtype)

    def logits(*batch: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            session = Session(loaded.model, batch, 6, decoder=loaded.decoder)
            steps = [session.begin()[0].clone()]
            for token in range(285, 290):
                tokens_B = torch.tensor([token, *(token + sum(row) % 7 for row in batch[1:])])
                steps.append(session.step(tokens_B)[0].clone())
        return torch.stack(steps).float()

    row = [2, 300, 301, 302]
    others = ([2, 280, 281, 282, 283, 284, 285], [2, 305]), ([9, 303, 297, 290, 299, 301, 284], [7, 281])
    first, second = (logits(row, *rest) for rest in others)
    assert torch.equal(first, second)
    alone = logits(row)
    assert (first - alone).norm() < error * alone.norm()


@pytest.mark.parametrize("kind", ["rope", "windows", "query-layer", "relative"])
def test_a_long_prompt_in_parts_gives_the_same(make_loaded, monkeypatch, kind: str):
    loaded = make_loaded(kind)
    whole = [completion.ids for completion in generate(loaded, prompts(), GREEDY)]
    monkeypatch.setattr(session_module, "PREFILL_TOKENS", 3)
    assert [completion.ids for completion in generate(loaded, prompts(), GREEDY)] == whole


@pytest.mark.parametrize("config", [GREEDY, DRAWN, dataclasses.replace(GREEDY, beams=3, max_tokens=6)])
@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_values_in_eight_bits_leave_a_completion_its_own(make_loaded, kind: str, config: GenerateConfig):
    loaded, config = make_loaded(kind), dataclasses.replace(config, kv="int8")
    together = list(generate(loaded, prompts(), config))
    assert together == [next(generate(loaded, [prompt], config)) for prompt in prompts()]


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_values_in_eight_bits_leave_the_logits_near(make_loaded, kind: str):
    loaded, found = make_loaded(kind), []
    for kv in CACHES:
        with torch.inference_mode():
            session = Session(loaded.model, PROMPTS, 8, decoder=loaded.decoder, kv=kv)
            logits = [session.begin(), *[session.step(torch.tensor([5, 300, 280, 7 + n])) for n in range(4)]]
            session.select(torch.tensor([3, 1, 1]))
            found.append(torch.cat([*logits, session.step(torch.tensor([301, 9, 10]))]))
    assert 0 < (found[1] - found[0]).norm() < 0.06 * found[0].norm()  # weights drawn wide: attention is nearly hard


def test_the_context_ends_a_text_where_it_would_alone(make_loaded):
    loaded = make_loaded("rope", eos_id=-1)
    config = dataclasses.replace(GREEDY, max_tokens=100)
    got = list(generate(loaded, prompts(), config))
    for prompt, completion in zip(prompts(), got, strict=True):
        assert completion.finish == "context"
        assert len(completion.ids) == 48 - len(prompt.ids)
        assert completion.ids == next(generate(loaded, [prompt], config)).ids


def test_reasons_to_finish(make_loaded):
    loaded = make_loaded("rope")
    free = next(generate(make_loaded("rope", eos_id=-1), [Prompt(0, [2, 300])], GREEDY))
    assert free.finish == "length"
    assert len(free.ids) == 12
    third = free.ids[3]
    first_time = free.ids.index(third)
    ended = make_loaded("rope", eos_id=third)
    got = next(generate(ended, [Prompt(0, [2, 300])], GREEDY))
    assert (got.finish, got.ids) == ("eos", free.ids[:first_time])
    files = {"generation_config.json": json.dumps({"eos_token_id": [1, third]}).encode()}
    listed = dataclasses.replace(loaded, artifact=dataclasses.replace(loaded.artifact, files=files))
    assert next(generate(listed, [Prompt(0, [2, 300])], GREEDY)).ids == free.ids[:first_time]


def test_stop_strings_are_cut_off(make_loaded):
    loaded = make_loaded("rope", eos_id=-1)
    text = next(generate(loaded, [Prompt(0, [2, 300])], GREEDY)).text
    stop = text[4:6]
    got = next(generate(loaded, [Prompt(0, [2, 300])], dataclasses.replace(GREEDY, stop=("", stop, "never there"))))
    assert got.finish == "stop"
    assert got.text == text[: text.index(stop)]


@pytest.mark.parametrize(
    ("ids", "match"),
    [([], "empty"), ([2] * 48, "48"), ([2, 5000], "5000"), ([-1], "-1")],
)
def test_prompts_that_cannot_work_are_refused_before_anything_runs(make_loaded, ids: list[int], match: str):
    with pytest.raises(UsageError, match=match):
        list(generate(make_loaded("rope"), [Prompt(0, [2]), Prompt(1, ids)], GREEDY))


def test_without_a_tokenizer_ids_work_and_text_does_not(make_loaded):
    loaded = make_loaded("t5", tokenizer=False)
    with pytest.raises(UsageError, match="no tokenizer"):
        encode_prompt(loaded, "a")
    completion = next(generate(loaded, [Prompt(0, [5, 6, 7])], GREEDY))
    assert completion.text == ""
    assert completion.ids == by_full_forward(loaded, [5, 6, 7], 12)


def test_ids_beyond_the_tokenizer_are_read_but_never_written_unless_one_ends_the_text(make_loaded):
    loaded = make_loaded("rope", vocab_size=400, eos_id=-1, logits_bias=True)
    last = loaded.tokenizer.vocab_size
    loaded.model.lm_head.bias.data[last] = 1e4
    configs = (GREEDY, DRAWN, dataclasses.replace(GREEDY, beams=3))
    for config in configs:
        for completion in generate(loaded, prompts([*PROMPTS, [2, last, 399]]), config):
            assert len(completion.ids) == 12
            assert max(completion.ids) < last
    files = {"generation_config.json": json.dumps({"eos_token_id": [7, last]}).encode()}
    ending = dataclasses.replace(loaded, artifact=dataclasses.replace(loaded.artifact, files=files))
    for config in configs:
        assert {(c.finish, len(c.ids)) for c in generate(ending, prompts(), config)} == {("eos", 0)}


@pytest.mark.parametrize(
    "said", [b"[]", b"{broken", b'{"eos_token_id": "x"}', b'{"eos_token_id": [[3], null]}', b"null"]
)
def test_a_strange_generation_config_ends_nothing(make_loaded, said: bytes):
    loaded = make_loaded("rope", eos_id=-1)
    strange = dataclasses.replace(
        loaded, artifact=dataclasses.replace(loaded.artifact, files={"generation_config.json": said})
    )
    assert list(generate(strange, prompts(), GREEDY)) == list(generate(loaded, prompts(), GREEDY))


def test_a_stop_string_without_text_is_refused(make_loaded):
    loaded = make_loaded("rope", tokenizer=False)
    with pytest.raises(UsageError, match="--stop"):
        list(generate(loaded, prompts(), dataclasses.replace(GREEDY, stop=("a",))))


# Streams of text


@given(st.text(st.characters(exclude_categories=("Cs",)), max_size=40), st.data())
@settings(deadline=None, max_examples=200)
def test_chunks_are_whole_characters_and_join_to_the_text(text_tokenizer, text: str, data: st.DataObject):
    stops = data.draw(st.lists(st.text(max_size=3), max_size=2))
    if text and data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(text) - 1))
        stops.append(text[at : at + 2])
    stream = TextStream(text_tokenizer, stops)
    chunks = []
    for token in text_tokenizer.encode(text):
        chunks.append(stream.feed(token))
        if stream.is_stopped:
            break
    chunks.append(stream.close())
    given_out = "".join(chunks)
    assert given_out == stream.text
    places = [text.index(stop) for stop in stops if stop and stop in text]
    assert not any(stop and stop in given_out for stop in stops)
    if not places:
        assert given_out == text
    else:
        assert text.startswith(given_out)
        assert len(given_out) <= max(places)
    assert "\ufffd" not in given_out or "\ufffd" in text


@given(st.lists(st.integers(0, 329), max_size=30), st.data())
@settings(deadline=None, max_examples=200)
def test_whatever_the_tokens_the_text_ends_before_the_first_stop_string(text_tokenizer, ids, data: st.DataObject):
    # Single bytes, halves of characters, specials: any split of any text, valid or not.
    ids = [index % text_tokenizer.vocab_size for index in ids]
    whole = text_tokenizer.decode_bytes(ids).decode("utf-8", "replace")
    stops = [text for text in data.draw(st.lists(st.text("a st中\ufffd", max_size=3), max_size=2)) if text]
    if whole:
        at = data.draw(st.integers(0, len(whole) - 1))
        stops.append(whole[at : at + data.draw(st.integers(1, 4))])
    stream = TextStream(text_tokenizer, stops)
    chunks = [stream.feed(token) for token in ids] + [stream.close()]
    given_out = "".join(chunks)
    assert given_out == stream.text
    assert whole.startswith(given_out)
    assert not any(stop in given_out for stop in stops)
    # What was found first, as the text came, is what cut it.
    ends = [whole.index(stop) for stop in stops if stop in whole]
    assert len(given_out) in ends if ends else given_out == whole
    assert stream.is_stopped == bool(ends)


def test_streamed_pieces_join_to_the_completions(make_loaded):
    loaded = make_loaded("rope")
    got: dict[int, str] = dict.fromkeys(range(4), "")

    def on_text(index: int, text: str) -> None:
        got[index] += text

    config = dataclasses.replace(DRAWN, max_tokens=30, stop=("a", "中"))
    completions = list(generate(loaded, prompts(), config, on_text))
    assert {completion.index: completion.text for completion in completions} == got
    assert any(got.values())


@pytest.mark.parametrize("kind", ["rope", "t5"])
def test_what_was_written_is_not_written_again_and_a_source_is_not_written(make_loaded, kind: str):
    loaded = make_loaded(kind, tokenizer=False, eos_id=-1, logits_bias=True)
    loaded.model.lm_head.bias.data[301] = 1e4  # nothing else is likely, until it is forbidden
    config = dataclasses.replace(GREEDY, max_tokens=30, repetition_penalty=1e9)
    ids = next(generate(loaded, [Prompt(0, [300, 301])], config)).ids
    assert len(set(ids)) == 30
    assert (301 in ids) == (kind == "t5")


def test_an_incomplete_character_at_the_end_is_marked(text_tokenizer):
    stream = TextStream(text_tokenizer, ())
    ids = text_tokenizer.encode("🀄")
    assert [stream.feed(token) for token in ids[:-1]] == ["", "", ""]
    assert stream.close() == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "n"), [("abc", "cd", 1), ("abc", "bcd", 2), ("abc", "x", 0), ("aa", "aab", 2), ("", "a", 0)]
)
def test_what_could_begin_a_stop_string_is_held(text: str, stop: str, n: int):
    assert overlap(text, stop) == n


# Beams


@pytest.mark.parametrize("kind", ["rope", "t5", "marian"])
def test_one_beam_is_greedy(make_loaded, kind: str):
    loaded = make_loaded(kind, eos_id=-1)
    with torch.inference_mode():
        found = beam_search(
            Session(loaded.model, PROMPTS, 6, copies=1), 4, dataclasses.replace(GREEDY, max_tokens=6), set()
        )
    assert found == [by_full_forward(loaded, ids, 6) for ids in PROMPTS]


def score(loaded, ids: list[int], out: list[int]) -> float:
    """Log-probability of a continuation, token by token."""
    model = loaded.model
    with torch.no_grad():
        if model.config.family == "decoder":
            logits = model(torch.tensor([[*ids, *out]]))[0, len(ids) - 1 : -1]
        else:
            start = model.config.decoder_start_id
            logits = model(torch.tensor([ids]), decoder_input_ids_BT=torch.tensor([[start, *out[:-1]]]))[0]
    return float(logits.log_softmax(-1)[torch.arange(len(out)), out].sum())


@pytest.mark.parametrize("kind", ["rope", "t5"])
def test_a_beam_as_wide_as_everything_finds_the_best(make_loaded, kind: str):
    import itertools

    loaded = make_loaded(kind, tokenizer=False, vocab_size=5, eos_id=4, init_std=1.0)
    prompt = [2, 1]
    config = GenerateConfig(max_tokens=3, beams=64, length_penalty=1.0)
    sequences = [seq for n in (1, 2, 3) for seq in itertools.product(range(5), repeat=n)]
    sequences = [s for s in sequences if 4 not in s[:-1] and (len(s) == 3 or s[-1] == 4)]
    best = max(sequences, key=lambda s: score(loaded, prompt, list(s)) / len(s))
    completion = next(generate(loaded, [Prompt(0, prompt)], config))
    assert completion.ids == [token for token in best if token != 4]


@pytest.mark.parametrize("kind", ["rope", "t5", "marian"])
def test_beams_are_at_least_as_likely_as_greedy_and_batched_equals_single(make_loaded, kind: str):
    loaded = make_loaded(kind, eos_id=-1)
    config = GenerateConfig(max_tokens=6, beams=8, length_penalty=0.0)
    together = list(generate(loaded, prompts(), config))
    for prompt, completion in zip(prompts(), together, strict=True):
        assert completion.ids == next(generate(loaded, [prompt], config)).ids
        greedy = by_full_forward(loaded, prompt.ids, 6)
        assert score(loaded, prompt.ids, completion.ids) >= score(loaded, prompt.ids, greedy) - 1e-5


@pytest.mark.parametrize("name", ["hf"])
def test_stories_are_told_as_by_the_reference(shared_data, name: str):
    from llmctl.artifacts.load import load_model

    folder = shared_data / "models" / "stories260K"
    loaded = load_model(folder / name)
    rows = json.loads((folder / "reference.json").read_text(encoding="utf-8"))["prompts"]
    config = GenerateConfig(max_tokens=max(len(row["greedy_new_ids"]) for row in rows), temperature=0.0)
    encoded = [Prompt(n, encode_prompt(loaded, row["text"]), row["text"]) for n, row in enumerate(rows)]
    assert [prompt.ids for prompt in encoded] == [row["ids"] for row in rows]
    for row, completion in zip(rows, generate(loaded, encoded, config), strict=True):
        n = len(row["greedy_new_ids"])
        assert completion.ids[:n] == row["greedy_new_ids"]
        assert (row["text"] + completion.text).strip().startswith(row["greedy_text"].strip()[:200])


@pytest.mark.parametrize("kind", ["learned", "rope", "t5"])
def test_beams_end_where_the_context_of_each_ends(make_loaded, kind: str):
    loaded = make_loaded(kind, eos_id=-1)
    config = GenerateConfig(max_tokens=100, beams=2)
    ragged = prompts([[2], [2] + [300] * 29])
    together = list(generate(loaded, ragged, config))
    assert together == [next(generate(loaded, [prompt], config)) for prompt in ragged]
    room = [47, 18] if kind != "t5" else [48, 48]
    assert [len(completion.ids) for completion in together] == room
    assert {completion.finish for completion in together} == {"context"}
    short = next(generate(loaded, ragged[:1], dataclasses.replace(config, max_tokens=5)))
    assert short.finish == "length"


@pytest.mark.parametrize("beams", [1, 3])
def test_weights_that_are_no_numbers_are_refused(make_loaded, beams: int):
    loaded = make_loaded("rope")
    loaded.model.lm_head.weight.data[7] = float("nan")
    with pytest.raises(ArtifactError, match="not finite"):
        list(generate(loaded, prompts(), dataclasses.replace(GREEDY, beams=beams)))


def test_gaps_of_a_source_are_its_sentinels(make_loaded, text_tokenizer):
    first, second = text_tokenizer.sentinel_ids()[:2]
    ids = encode_prompt(make_loaded("t5"), "a <extra_id_0> of<extra_id_1>")
    encode = text_tokenizer.encode
    assert ids == [*encode("a"), first, *encode(" of"), second, text_tokenizer.eos_id]
    assert first not in encode_prompt(make_loaded("rope"), "a <extra_id_0> of")


def test_a_text_of_its_own_has_no_space_before_it(shared_data):
    tokenizer = load_tokenizer(shared_data / "tokenizers" / "sentencepiece-unigram-en" / "test_model.model")
    for text in ("Once upon a time", "I", ""):
        ids = tokenizer.encode(text)
        begun, going_on = TextStream(tokenizer, ["never"], begins=True), TextStream(tokenizer, ["never"])
        assert "".join(map(begun.feed, ids)) + begun.close() == tokenizer.decode(ids) == text
        assert "".join(map(going_on.feed, ids)) + going_on.close() == tokenizer.decode_bytes(ids).decode()


@pytest.mark.interop
@pytest.mark.parametrize("kind", ["t5", "gqa"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_beams_are_those_of_transformers(make_loaded, tmp_path, kind: str, length_penalty: float):
    transformers = pytest.importorskip("transformers", reason="pip install '.[interop]'")
    fields = {"activation": "gelu_tanh", "norm_eps": 1e-6} if kind == "t5" else {"n_kv_heads": 2}
    loaded = make_loaded(
        "t5" if kind == "t5" else "rope", tokenizer=False, vocab_size=40, init_std=0.6, seed=1, **fields
    )
    write_artifact(tmp_path / "m", loaded.model.config, loaded.model.state_dict(), files={}, provenance={})
    name = "T5ForConditionalGeneration" if kind == "t5" else "LlamaForCausalLM"
    theirs = getattr(transformers, name).from_pretrained(tmp_path / "m").eval()
    # Padded on the side on which each kind of model needs it.
    sources = [[5, 6, 7, 8], [9, 10, 11], [30], [20, 21, 22, 33]]
    padded = [row + [0] * (4 - len(row)) if kind == "t5" else [0] * (4 - len(row)) + row for row in sources]
    expected = theirs.generate(
        input_ids=torch.tensor(padded),
        attention_mask=(torch.tensor(padded) != 0).long(),
        num_beams=4,
        do_sample=False,
        max_new_tokens=8,
        length_penalty=length_penalty,
        early_stopping=False,
    )
    expected = expected[:, 1 if kind == "t5" else 4 :].tolist()
    config = GenerateConfig(max_tokens=8, beams=4, length_penalty=length_penalty)
    got = list(generate(loaded, prompts(sources), config))
    for completion, row in zip(got, expected, strict=True):
        ids = [*completion.ids, *([3] if completion.finish == "eos" else [])]
        assert ids == row[: len(ids)]
        assert set(row[len(ids) :]) <= {0, 3}  # it fills up with either
