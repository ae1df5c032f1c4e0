"""A conversation goes on from what was said, fits into the context, survives interrupts, and can be trained on."""

import json

import pytest
import torch

from llmctl.artifacts.load import Loaded
from llmctl.config import GenerateConfig
from llmctl.data.conversations import Message, read_conversations
from llmctl.errors import UsageError
from llmctl.inference.chat import Chat, Lead
from llmctl.inference.chat_ids import encode_conversation, encode_prompt_chat
from llmctl.inference.chat_template import template_of
from llmctl.inference.encoding import encode_prompt
from llmctl.inference.generate import Prompt, generate
from tests.support.chats import MISTRAL, talk

CONFIG = GenerateConfig(max_tokens=12, temperature=0.0)
TAUGHT = talk("a list", "of strings", "诗", "中文\n，诗", system="a")


def ask(chat: Chat, text: str) -> tuple[str, str]:
    """Return an answer and what was shown of it."""
    shown: list[str] = []
    return chat.ask(text, shown.append).text, "".join(shown)


def learn(loaded: Loaded, messages: list[Message]) -> None:
    """Train a model until it says what it is taught, on the ids and the mask of the conversation."""
    encoded = encode_conversation(template_of(loaded), messages)
    ids_BT = torch.tensor([encoded.ids])
    mask_BT = torch.tensor([encoded.is_trained])[:, 1:]
    optimizer = torch.optim.Adam(loaded.model.parameters(), lr=0.01)
    for _ in range(60):
        logits_NV = loaded.model(ids_BT)[:, :-1][mask_BT]
        loss = torch.nn.functional.cross_entropy(logits_NV, ids_BT[:, 1:][mask_BT])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1


@pytest.mark.parametrize("source", [None, MISTRAL])
def test_what_was_taught_is_said(make_loaded, text_tokenizer, source):
    loaded = make_loaded("rope", max_positions=200)
    loaded.artifact.files.update(text_tokenizer.files())
    if source:
        loaded.artifact.files["chat_template.jinja"] = source.encode()
    learn(loaded, TAUGHT)
    chat = Chat(loaded, CONFIG, system="a")
    for question, answer in zip(TAUGHT[1::2], TAUGHT[2::2], strict=True):
        assert ask(chat, question.content) == (answer.content, answer.content)
    assert chat.record() == {"messages": [message.to_dict() for message in TAUGHT]}
    chat.reset()
    assert ask(chat, "a list")[0] == "of strings"


def test_a_saved_conversation_is_read_again(make_loaded, tmp_path):
    chat = Chat(make_loaded("rope", max_positions=200), CONFIG, system="用中文。")
    for text in ("a", "b\nc"):
        ask(chat, text)
    (tmp_path / "talk.jsonl").write_text(json.dumps(chat.record()) + "\n")
    (found,) = read_conversations([str(tmp_path / "talk.jsonl")])
    assert found.messages == [Message("system", "用中文。"), *chat.messages]


def test_the_oldest_turns_are_left_out_of_a_full_context(make_loaded):
    loaded = make_loaded("rope", max_positions=120)
    chat = Chat(loaded, CONFIG, system="a list")
    cuts = []
    for number in range(6):
        before = list(chat.messages)
        answer = chat.ask(f"strings {number}", lambda _: None)
        cuts.append(answer.is_cut)
        seen = [Message("system", "a list"), *before[chat.start :], Message("user", f"strings {number}")]
        ids = encode_prompt_chat(template_of(loaded), seen)
        assert len(ids) + CONFIG.max_tokens <= 120
        prompt = Prompt(number, ids)
        assert next(generate(loaded, [prompt], chat.config)).text == answer.text
    assert cuts.count(True) == 1
    assert chat.start > 0
    assert chat.messages[chat.start].role == "user"
    assert len(chat.messages) == 12  # all of it is kept to be saved


def test_a_message_that_cannot_fit_changes_nothing(make_loaded):
    chat = Chat(make_loaded("rope", max_positions=60), CONFIG)
    ask(chat, "a")
    before = list(chat.messages)
    with pytest.raises(UsageError, match="context is 60"):
        ask(chat, "诗" * 100)
    assert chat.messages == before
    assert ask(chat, "b")[0] == chat.messages[-1].content


def test_an_interrupt_keeps_what_was_written(make_loaded):
    loaded = make_loaded("rope", max_positions=200, eos_id=-1)
    whole = Chat(loaded, CONFIG).ask("a list", lambda _: None).text
    chat = Chat(loaded, CONFIG)
    shown: list[str] = []

    def stop(new: str) -> None:
        shown.append(new)
        if len(shown) == 3:
            raise KeyboardInterrupt

    answer = chat.ask("a list", stop)
    assert (answer.finish, answer.text) == ("interrupted", "".join(shown))
    assert whole.startswith(answer.text)
    assert chat.messages == talk("a list", answer.text)
    hook = loaded.model.model.embed_tokens.register_forward_hook(interrupt)
    assert chat.ask("b", shown.append).finish == "interrupted"
    assert chat.messages == talk("a list", answer.text)
    hook.remove()


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_encoder_decoder_takes_each_message_as_it_is(make_loaded):
    loaded = make_loaded("t5")
    chat = Chat(loaded, CONFIG)
    for number, text in enumerate(("a list", "of strings")):
        expected = next(generate(loaded, [Prompt(number, encode_prompt(loaded, text))], CONFIG)).text
        assert ask(chat, text) == (expected, expected)
    assert len(chat.messages) == 4
    with pytest.raises(UsageError, match="has no system prompt"):
        chat.set_system("Be brief.")


def test_models_that_cannot_talk_are_named(make_loaded):
    with pytest.raises(UsageError, match="no tokenizer"):
        Chat(make_loaded("rope", tokenizer=False), CONFIG)
    with pytest.raises(UsageError, match="has no chat template"):
        template_of(make_loaded("t5"))


@pytest.mark.parametrize("pieces", [[" a b"], [" ", "a b"], ["", " a", " b"], [" a ", "b"]])
def test_the_templates_space_is_no_part_of_the_answer(pieces: list[str]):
    lead = Lead(" ")
    assert "".join(map(lead.cut, pieces)) == "a b"
    assert Lead("").cut(" a") == " a"
