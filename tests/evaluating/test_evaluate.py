"""Figures equal those of plain forward passes, do not depend on the batch, and models are held against the first."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llmctl.artifacts.load import Loaded
from llmctl.config import EvaluateConfig
from llmctl.data.examples import Example
from llmctl.errors import GateError, UsageError
from llmctl.evaluating import evaluate as module
from llmctl.evaluating.answers import evaluate_answers
from llmctl.evaluating.choices import continuations, evaluate_choice, evaluate_lastword, without_last_word
from llmctl.evaluating.evaluate import (
    Evaluation,
    check_gate,
    default_task,
    evaluate,
    supports,
    tokenizers_differ,
)
from llmctl.evaluating.labels import evaluate_classify, evaluate_similarity
from llmctl.evaluating.result import Measured
from llmctl.evaluating.text import evaluate_mask, evaluate_text, windows
from llmctl.formats.artifact_write import write_artifact
from llmctl.inference.encoding import encode_prompt
from llmctl.inference.generate import Prompt, generate
from llmctl.metrics import scores
from llmctl.metrics.gate import parse_gate
from llmctl.tables.tasks import TASKS, measured_tasks

TEXT = "a list of strings 中文，诗。 \n" * 12


def rows(*pairs: tuple[dict, object], column: str = "label", choices: tuple[str, ...] = ()) -> list[Example]:
    return [Example(f"`d` line {n}", inputs, wanted, choices, column) for n, (inputs, wanted) in enumerate(pairs, 1)]


def close(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value == pytest.approx(right[name], rel=1e-5, abs=1e-6, nan_ok=True), name


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_tokens", "width", "stride"), [(100, 16, 16), (100, 16, 5), (33, 16, 15), (7, 16, 16)])
def test_windows_count_each_token_once(n_tokens: int, width: int, stride: int):
    counted = [place for begin, first, end in windows(n_tokens, width, stride) for place in range(first, end)]
    uncounted = set(range(n_tokens)) - set(counted)
    assert len(counted) == len(set(counted))
    # Side by side every window loses its first token; overlapping, only the text does.
    assert uncounted == (set(range(0, n_tokens, width)) if stride == width else {0})
    assert all(end - begin <= width for begin, _, end in windows(n_tokens, width, stride))


def test_windows_of_nothing():
    assert list(windows(0, 8, 8)) == list(windows(1, 8, 8)) == []
    assert list(windows(9, 8, 8)) == [(0, 1, 8)], "a last window of one token predicts none"


@pytest.mark.parametrize("stride", [0, 5])
def test_text_equals_a_loop_over_windows(make_loaded, stride: int):
    loaded = make_loaded("rope")
    config = EvaluateConfig(seq_len=16, stride=stride)
    ids = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(TEXT)]
    nats, count, n_bytes, done = 0.0, 0, 0, 0
    for begin in range(0, len(ids), stride or 16):
        end = min(begin + 16, len(ids))
        with torch.no_grad():
            logits_TV = loaded.model(torch.tensor([ids[begin:end]]))[0].double()
        for place in range(max(done, begin + 1), end):
            nats -= float(logits_TV[place - 1 - begin].log_softmax(0)[ids[place]])
            n_bytes += len(loaded.tokenizer.decode_bytes([ids[place]]))
            count += 1
        done = end
        if end == len(ids):
            break
    figures = evaluate_text(loaded, [TEXT], config).figures
    assert figures["n_labels"] == count
    assert figures["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    if stride:
        assert n_bytes == len(TEXT.encode()), "with a begin token every byte is predicted"
    for batch_size in (1, 3):
        close(evaluate_text(loaded, [TEXT], dataclasses.replace(config, batch_size=batch_size)).figures, figures)


def test_texts_do_not_see_each_other(make_loaded):
    loaded, config = make_loaded("learned"), EvaluateConfig()
    apart = [evaluate_text(loaded, [text], config) for text in ("a list", TEXT)]
    together = evaluate_text(loaded, ["a list", "", TEXT], config)
    assert together.n_rows == sum(part.n_rows for part in apart)
    nats = sum(part.figures["loss"] * part.figures["n_labels"] for part in apart)
    assert together.figures["loss"] == pytest.approx(nats / together.figures["n_labels"], rel=1e-6)
    assert evaluate_text(loaded, [TEXT], EvaluateConfig(limit=1)).n_rows == 1


@pytest.mark.parametrize(
    ("settings", "part"), [({"stride": 17, "seq_len": 16}, "--stride 17"), ({"seq_len": 1}, "windows of 1")]
)
def test_windows_that_cannot_be(make_loaded, settings: dict, part: str):
    with pytest.raises(UsageError, match=part):
        evaluate_text(make_loaded("rope"), [TEXT], EvaluateConfig(**settings))


def test_text_that_predicts_nothing(make_loaded):
    with pytest.raises(UsageError, match="no text"):
        evaluate_text(make_loaded("rope"), [""], EvaluateConfig())


def test_masks_are_those_of_the_seed_whatever_the_batch(make_loaded):
    loaded = make_loaded("learned", family="encoder")
    figures = evaluate_mask(loaded, [TEXT, "诗。"], EvaluateConfig(seq_len=20)).figures
    for batch_size in (1, 3):
        config = EvaluateConfig(seq_len=20, batch_size=batch_size)
        close(evaluate_mask(loaded, [TEXT, "诗。"], config).figures, figures)
    other = evaluate_mask(loaded, [TEXT, "诗。"], EvaluateConfig(seq_len=20, seed=1)).figures
    assert other["loss"] != figures["loss"]
    n_text = len(loaded.tokenizer.encode(TEXT))
    assert figures["n_labels"] == pytest.approx(0.15 * n_text, abs=n_text / 18 / 2 + 1)


def test_masked_loss_equals_a_forward_pass(make_loaded):
    from llmctl.data.masking import Masking, mask_tokens

    loaded = make_loaded("learned", family="encoder")
    tokenizer = loaded.tokenizer
    ids = np.array(tokenizer.encode("a list of strings", bos=True, eos=True))
    masking = Masking(tokenizer.mask_id, 0.5, tokenizer.token_bytes() == 0)
    inputs, labels = mask_tokens(ids, np.random.default_rng([3, 0]), masking)
    with torch.no_grad():
        logits_TV = loaded.model(torch.from_numpy(inputs)[None])[0]
    figures = evaluate_mask(loaded, ["a list of strings"], EvaluateConfig(mask_frac=0.5, seed=3)).figures
    expected = F.cross_entropy(logits_TV, torch.from_numpy(labels), ignore_index=-100)
    assert figures["loss"] == pytest.approx(float(expected), rel=1e-5)
    assert figures["n_labels"] == int((labels != -100).sum())


# --- labels ----------------------------------------------------------------------------------------------------------

TEXTS = ["a list", "诗", "strings of a list", "", "中文，诗。" * 30, "of"]


@pytest.mark.parametrize("problem", ["single", "multi", "regression"])
def test_a_classifier_s_figures(make_loaded, problem: str):
    n_labels = 1 if problem == "regression" else 3
    loaded = make_loaded("learned", family="encoder", n_labels=n_labels, problem=problem, labels=())
    wanted = {
        "single": [0, 1, 2, 2, 1, 0],
        "multi": [[0], [1, 2], [], [2], [0, 1, 2], [1]],
        "regression": [0.5, 1, 2, -1, 3, 0],
    }[problem]
    examples = rows(*[({"text": text}, label) for text, label in zip(TEXTS, wanted, strict=True)])
    measured = evaluate_classify(loaded, examples, EvaluateConfig())
    assert (measured.n_rows, measured.n_empty, measured.n_cut) == (6, 1, 1)
    close(evaluate_classify(loaded, examples, EvaluateConfig(batch_size=1)).figures, measured.figures)
    tokenizer = loaded.tokenizer
    outputs = []
    for text in TEXTS:
        ids = [tokenizer.bos_id, *tokenizer.encode(text)[:46], tokenizer.eos_id]
        with torch.no_grad():
            outputs.append(loaded.model.classify(torch.tensor([ids]))[0])
    outputs_NL = torch.stack(outputs)
    if problem == "single":
        assert measured.figures["loss"] == pytest.approx(float(F.cross_entropy(outputs_NL, torch.tensor(wanted))))
        assert measured.figures["accuracy"] == scores.accuracy(outputs_NL.argmax(1), wanted)
        assert {"f1", "mcc"} < measured.figures.keys()
    elif problem == "multi":
        targets = torch.tensor([[float(n in some) for n in range(3)] for some in wanted])
        loss = F.binary_cross_entropy_with_logits(outputs_NL, targets)
        assert measured.figures["loss"] == pytest.approx(float(loss), rel=1e-5)
        assert measured.figures["f1"] == scores.f1_score((outputs_NL > 0).long(), targets, 3)
    else:
        assert measured.figures["spearman"] == pytest.approx(scores.spearman(outputs_NL[:, 0], wanted))
        similar = evaluate_similarity(loaded, rows(*[({"text": t, "pair": "a"}, 1) for t in TEXTS]), EvaluateConfig())
        assert math.isnan(similar.figures["pearson"]), "all the wanted numbers are equal"


def test_labels_have_the_model_s_names_or_those_of_a_file(make_loaded, tmp_path):
    loaded = make_loaded("learned", family="encoder", n_labels=2, labels=("bad", "good"))
    named = rows(({"text": "a"}, "good"), ({"text": "诗"}, "bad"))
    numbered = rows(({"text": "a"}, 1), ({"text": "诗"}, "0"))
    figures = evaluate_classify(loaded, named, EvaluateConfig()).figures
    assert evaluate_classify(loaded, numbered, EvaluateConfig()).figures == figures
    with pytest.raises(UsageError, match=r"line 1.*`ugly`.*`bad`, `good`"):
        evaluate_classify(loaded, rows(({"text": "a"}, "ugly")), EvaluateConfig())
    (tmp_path / "names.txt").write_text("坏\n好\n")
    chinese = rows(({"text": "a"}, "好"), ({"text": "诗"}, "坏"))
    names = EvaluateConfig(labels=str(tmp_path / "names.txt"))
    assert evaluate_classify(loaded, chinese, names).figures == figures
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    with pytest.raises(UsageError, match=r"3 labels.*has 2"):
        evaluate_classify(loaded, chinese, names)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_similarity_is_the_cosine_of_pooled_states(make_loaded, pooling: str):
    loaded = make_loaded("learned", family="encoder")
    pairs = [("a list", "诗"), ("strings", "strings"), ("a list of", "中文"), ("of", "a"), ("诗诗", "of list")]
    examples = rows(*[({"text": a, "pair": b}, n) for n, (a, b) in enumerate(pairs)])

    def state(text: str) -> torch.Tensor:
        ids = loaded.tokenizer.encode(text, bos=True, eos=True)
        with torch.no_grad():
            hidden_TD = loaded.model.hidden(torch.tensor([ids]))[0]
        return {"mean": hidden_TD.mean(0), "first": hidden_TD[0], "last": hidden_TD[-1]}[pooling]

    cosines = [float(F.cosine_similarity(state(a), state(b), dim=0)) for a, b in pairs]
    measured = evaluate_similarity(loaded, examples, EvaluateConfig(pooling=pooling))
    figures = measured.figures
    assert (measured.n_rows, measured.n_cut) == (5, 0)
    assert figures["spearman"] == pytest.approx(scores.spearman(cosines, range(5)))
    assert figures["pearson"] == pytest.approx(scores.pearson(cosines, range(5)), rel=1e-4)


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "rope"])
@pytest.mark.parametrize("task", ["translate", "summarize", "qa"])
def test_answers_are_what_generate_writes(make_loaded, kind: str, task: str):
    pytest.importorskip("sacrebleu")
    loaded = make_loaded(kind)
    role = "question" if task == "qa" else "source"
    template = f"{{{role}}} =>"
    examples = rows(*[({role: text}, ["a list"] if task == "qa" else "a list") for text in TEXTS])
    config = EvaluateConfig(template=template, max_tokens=6)
    measured = evaluate_answers(loaded, examples, dataclasses.replace(config, task=task))
    assert (measured.n_rows, measured.n_empty, measured.n_cut) == (6, 1, 1)
    close(
        evaluate_answers(loaded, examples, dataclasses.replace(config, task=task, batch_size=1)).figures,
        measured.figures,
    )
    from llmctl.config import GenerateConfig

    prompt = Prompt(0, encode_prompt(loaded, "a list =>"))
    written = next(generate(loaded, [prompt], GenerateConfig(max_tokens=6, temperature=0.0)))
    stop = {"rope": "\n" if task != "summarize" else "\n\n"}.get(kind, "\0")
    assert measured.example == {
        "prompt": "a list =>",
        "found": written.text.split(stop)[0].strip(),
        "wanted": "a list",
    }
    assert ("loss" in measured.figures) == (kind == "t5")
    assert next(iter(measured.figures)) == {"translate": "bleu", "summarize": "rouge_l", "qa": "exact_match"}[task]


def test_the_loss_of_targets_is_that_of_a_forward_pass(make_loaded):
    pytest.importorskip("sacrebleu")
    loaded = make_loaded("t5")
    tokenizer = loaded.tokenizer
    examples = rows(({"source": "a list"}, "诗"), ({"source": "of strings of"}, "a list of"))
    nats, count = 0.0, 0
    for example in examples:
        target = tokenizer.encode(example.target, eos=True)
        source = tokenizer.encode(example.inputs["source"], eos=True)
        with torch.no_grad():
            logits = loaded.model(torch.tensor([source]), decoder_input_ids_BT=torch.tensor([[0, *target[:-1]]]))[0]
        nats += float(F.cross_entropy(logits.double(), torch.tensor(target), reduction="sum"))
        count += len(target)
    figures = evaluate_answers(loaded, examples, EvaluateConfig(task="translate", max_tokens=4)).figures
    assert figures["loss"] == pytest.approx(nats / count, rel=1e-5)


def test_a_model_s_own_template_is_used(make_loaded):
    pytest.importorskip("sacrebleu")
    loaded = make_loaded("rope")
    artifact = dataclasses.replace(loaded.artifact, provenance={"template": "German: {source}"})
    trained = Loaded(loaded.model, loaded.tokenizer, artifact)
    examples = rows(({"source": "a"}, "b"))
    settings = EvaluateConfig(max_tokens=3)
    assert (
        evaluate_answers(trained, examples, dataclasses.replace(settings, task="translate")).example["prompt"]
        == "German: a"
    )
    chosen = dataclasses.replace(settings, template="{source}!")
    assert evaluate_answers(trained, examples, dataclasses.replace(chosen, task="translate")).example["prompt"] == "a!"
    with pytest.raises(UsageError, match="`--max-tokens 48`"):
        evaluate_answers(loaded, examples, EvaluateConfig(task="translate", max_tokens=48))


# --- choices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rope", "t5"])
def test_the_likeliest_choice_is_found(make_loaded, kind: str):
    loaded = make_loaded(kind)
    asked = [("a list", ("诗", "of strings of", "a")), ("诗", ("list", "strings list", "中文"))]
    examples = [
        Example(f"line {n}", {"question": question}, 0, choices, "answer")
        for n, (question, choices) in enumerate(asked)
    ]
    prompts = ["Question: {}\nAnswer:", "question: {}"][kind == "t5"]
    sums = []
    for question, choices in asked:
        context = prompts.format(question)
        for choice in choices:
            with torch.no_grad():
                if kind == "t5":
                    source = loaded.tokenizer.encode(context, eos=True)
                    target = loaded.tokenizer.encode(choice)
                    start = torch.tensor([[0, *target[:-1]]])
                    logits = loaded.model(torch.tensor([source]), decoder_input_ids_BT=start)[0]
                else:
                    space = "" if scores.IS_HAN.match(choice) else " "
                    ids = loaded.tokenizer.encode(context + space + choice, bos=True)
                    target = ids[len(loaded.tokenizer.encode(context, bos=True)) :]
                    logits = loaded.model(torch.tensor([ids]))[0, -len(target) - 1 : -1]
                sums.append(-float(F.cross_entropy(logits.double(), torch.tensor(target), reduction="sum")))
    found = continuations(
        loaded, [(prompts.format(q), choice) for q, choices in asked for choice in choices], EvaluateConfig()
    )
    assert [-part.nats for part in found.likelihoods] == pytest.approx(sums, rel=1e-4)
    best = [int(np.argmax(part)) for part in np.array(sums).reshape(2, 3)]
    lengths = np.array([[len(choice) for choice in choices] for _, choices in asked])
    best_norm = (np.array(sums).reshape(2, 3) / lengths).argmax(axis=1)
    right = [dataclasses.replace(example, target=n) for example, n in zip(examples, best, strict=True)]
    assert evaluate_choice(loaded, right, EvaluateConfig()).figures["accuracy"] == 1.0
    right = [dataclasses.replace(example, target=int(n)) for example, n in zip(examples, best_norm, strict=True)]
    figures = evaluate_choice(loaded, right, EvaluateConfig(batch_size=1)).figures
    assert figures["accuracy_norm"] == 1.0
    assert figures["accuracy"] == scores.accuracy(best, best_norm)


def test_a_question_that_is_cut_counts_once(make_loaded):
    examples = rows(({"question": "of " * 60}, 0), ({"question": "a"}, 0), choices=("x", "y", "z"))
    assert evaluate_choice(make_loaded("rope"), examples, EvaluateConfig()).n_cut == 1


def test_the_last_word():
    assert without_last_word("He went to  the sea. \n") == ("He went to  the", "sea.")
    assert without_last_word("床前明月光") == ("床前明月", "光")
    assert without_last_word("word") == ("wor", "d")
    assert without_last_word("") == ("", "")


def test_lastword_figures(make_loaded):
    loaded = make_loaded("rope")
    texts = ["a list of strings", "of a list", "中文诗", "of " * 60 + "strings", ""]
    measured = evaluate_lastword(loaded, rows(*[({"text": text}, None) for text in texts]), EvaluateConfig())
    assert (measured.n_rows, measured.n_empty, measured.n_cut) == (5, 1, 1)
    with torch.no_grad():
        # What a greedy model would say next is the right last word.
        ids = loaded.tokenizer.encode("a list of", bos=True)
        best = int(loaded.model(torch.tensor([ids]))[0, -1].argmax())
    word = loaded.tokenizer.decode([best])
    alone = evaluate_lastword(loaded, rows(({"text": "a list of strings"}, None)), EvaluateConfig())
    assert alone.figures["accuracy"] == float(word == " strings")
    pairs = [without_last_word(text) for text in texts]
    nats = sum(part.nats for part in continuations(loaded, pairs, EvaluateConfig()).likelihoods)
    assert measured.figures["loss"] == pytest.approx(nats / 5)
    assert measured.figures["perplexity"] == pytest.approx(math.exp(nats / 5))


# --- the table and the gate ------------------------------------------------------------------------------------------


@pytest.fixture
def written(make_loaded, tmp_path):
    """Return a writer of models: (name, kind, fields) -> path."""

    def write(name: str, kind: str, **fields) -> Path:
        loaded = make_loaded(kind, **fields)
        files = loaded.tokenizer.files()
        return write_artifact(
            tmp_path / name, loaded.model.config, loaded.model.state_dict(), files=files, provenance={}
        )

    return write


LABELS = {"span": (), "tokens": ("O", "B-A")}


def test_every_figure_of_the_table_is_given(make_loaded):
    pytest.importorskip("sacrebleu")
    examples = {
        "classify": rows(({"text": "a"}, 0), ({"text": "b"}, 1)),
        "similarity": rows(({"text": "a", "pair": "b"}, 0), ({"text": "c", "pair": "of"}, 1)),
        "translate": rows(({"source": "a"}, "b")),
        "summarize": rows(({"source": "a"}, "b")),
        "qa": rows(({"question": "a"}, ["b"])),
        "extracts qa": rows(({"question": "a", "context": "b"}, ["b"])),
        "extracts tokens": rows(({"tokens": "a\nb"}, ["B-A", "O"])),
        "choice": rows(({"question": "a"}, 0), choices=("x", "y")),
        "lastword": rows(({"text": "a b"}, None)),
    }
    for task in measured_tasks():
        row = TASKS[task]
        given: set[str] = set()
        if row.extracts:
            loaded = make_loaded(
                "learned", family="encoder", n_labels=2, head=row.extracts, labels=LABELS[row.extracts]
            )
            assert supports(row, loaded.artifact)
            measure = getattr(module, row.extractor)
            given |= measure(loaded, examples["extracts " + task], EvaluateConfig(task=task)).figures.keys()
        measure = getattr(module, row.evaluator, None)
        assert measure is not None or row.extracts
        for family in row.measures if measure else ():
            for problem in ("single", "regression") if task == "classify" else ("single",):
                kind = "t5" if family == "encoder_decoder" else "learned"
                n_labels = {"single": 2, "regression": 1}[problem] if row.head == "labels" else 0
                loaded = make_loaded(kind, family=family, n_labels=n_labels, problem=problem)
                assert supports(row, loaded.artifact)
                data = examples.get(task, [TEXT])
                given |= measure(loaded, data, EvaluateConfig(task=task, max_tokens=2)).figures.keys()
        assert set(row.metrics) == {name for name in given if not name.startswith("n_")}, task
        assert row.source


def test_models_side_by_side(written):
    paths = [written("a", "rope"), written("b", "rope", seed=1), written("c", "rope", max_positions=32)]
    said: list[str] = []
    found = list(evaluate(paths, EvaluateConfig(limit=3, device="cpu"), said.append))
    assert [one.model for one in found] == list(map(str, paths))
    assert len({one.main for one in found}) == 3
    for one in found:
        record = one.record()
        assert (one.task, one.metric, record["n_rows"]) == ("text", "perplexity", 3)
        assert record["n_parameters"] == sum(np.prod(t.shape) for t in tensors_of(one.model))
        assert record["size_bytes"] == Path(one.model, "model.safetensors").stat().st_size
        assert record["peak_memory_bytes"] is None or record["peak_memory_bytes"] > 1 << 20
        assert record["tokens_per_second"] > 0
    assert any("built-in corpus" in text for text in said)
    assert any("task: text" in text for text in said)
    again = list(evaluate(paths[1:2], EvaluateConfig(limit=3, device="cpu", batch_size=1), said.append))
    close(again[0].measured.figures, found[1].measured.figures)


def tensors_of(path: str) -> list:
    from llmctl.formats.safetensors import read_header

    return list(read_header(Path(path) / "model.safetensors").tensors.values())


def test_the_task_that_a_model_is_for(make_loaded):
    for kind, fields, task in (
        ("rope", {}, "text"),
        ("learned", {"family": "encoder"}, "mask"),
        ("t5", {}, "translate"),
        ("learned", {"family": "encoder", "n_labels": 2}, "classify"),
        ("rope", {"n_labels": 2}, "classify"),
        ("learned", {"family": "encoder", "n_labels": 2, "head": "tokens"}, "tokens"),
        ("learned", {"family": "encoder", "n_labels": 2, "head": "span"}, "qa"),
    ):
        assert default_task(make_loaded(kind, **fields).artifact) == task


@pytest.mark.parametrize(
    ("kind", "fields", "task", "parts"),
    [
        ("rope", {}, "classify", ["decoder", "finetune", "text"]),
        ("learned", {"family": "encoder"}, "text", ["an encoder", "mask"]),
        ("t5", {}, "text", ["encoder-decoder", "translate"]),
        ("rope", {"n_labels": 2}, "choice", ["classification head", "classify"]),
        ("learned", {"family": "encoder", "n_labels": 2}, "similarity", ["2 labels", "classify"]),
        (
            "learned",
            {"family": "encoder", "n_labels": 1, "head": "tokens"},
            "similarity",
            ["a token classifier", "`--task` tokens"],
        ),
        (
            "learned",
            {"family": "encoder", "n_labels": 2, "head": "span"},
            "classify",
            ["a question-answering", "`--task` qa"],
        ),
        (
            "learned",
            {"family": "encoder", "n_labels": 2, "head": "span"},
            "mask",
            ["a question-answering", "`--task` qa"],
        ),
        ("learned", {"family": "encoder", "n_labels": 2}, "tokens", ["classification head", "classify"]),
        ("learned", {"family": "encoder"}, "tokens", ["an encoder", "mask"]),
        ("learned", {"family": "encoder", "n_labels": 2}, "qa", ["classification head", "classify"]),
        ("rope", {}, "translate", ["needs data", "source, target"]),
    ],
)
def test_what_a_model_does_not_know_is_refused(written, tmp_path, kind: str, fields: dict, task: str, parts: list[str]):
    (tmp_path / "d.jsonl").write_text('{"text": "a", "pair": "b", "label": 1}\n')
    data = (str(tmp_path / "d.jsonl"),) if "needs data" not in parts else ()
    with pytest.raises(UsageError) as caught:
        list(evaluate([written("m", kind, **fields)], EvaluateConfig(task=task, data=data), lambda _: None))
    for part in parts:
        assert part in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"limit": -1}, "`--limit` is -1"),
        ({"batch_size": 0}, "`--batch-size` is 0"),
        ({"seq_len": 4096}, "`--seq-len 4096`"),
        ({"metric": "bleu"}, "no metric `bleu`"),
        ({"beams": 0}, "--beams"),
        ({"mask_frac": 0.0}, "mask_frac"),
    ],
)
def test_settings_out_of_range(written, settings: dict, part: str):
    with pytest.raises(UsageError, match=part):
        list(evaluate([written("m", "rope")], EvaluateConfig(**settings), lambda _: None))


def test_tokenizers_that_differ(written, tmp_path):
    paths = [written("a", "rope"), written("b", "rope", seed=1)]
    assert not tokenizers_differ(paths)
    assert not tokenizers_differ(paths[:1])


def evaluation(name: str, metric: str, value: float) -> Evaluation:
    return Evaluation(name, "classify", metric, Measured({metric: value}, 1, 1), 1, 1, None, 1.0)


@pytest.mark.parametrize(
    ("metric", "values", "gate", "missed"),
    [
        ("accuracy", (0.80, 0.79), "0.02", ""),
        ("accuracy", (0.80, 0.77), "0.02", "m1"),
        ("accuracy", (0.80, 0.99), "0", ""),
        ("accuracy", (0.80, 0.80), "0", ""),
        ("perplexity", (20.0, 20.1), "1%", ""),
        ("perplexity", (20.0, 20.3), "1%", "m1"),
        ("perplexity", (20.0, 10.0), "0%", ""),
        ("accuracy", (0.5, math.nan), "1", "m1"),
        ("accuracy", (math.nan, 0.5), "1", "m1"),
        ("pearson", (-0.5, -0.52), "10%", ""),
        ("accuracy", (0.8, 0.8, 0.1), "0.1", "m2"),
    ],
)
def test_the_gate(metric: str, values: tuple[float, ...], gate: str, missed: str):
    found = [evaluation(f"m{n}", metric, value) for n, value in enumerate(values)]
    if not missed:
        check_gate(found, parse_gate(gate))
        return
    with pytest.raises(GateError, match=f"`{missed}`") as caught:
        check_gate(found, parse_gate(gate))
    assert caught.value.exit_code == 10
