"""Signals that stand in for a teacher: the same in any order and after a kill, as good as the teacher, refused if not its own."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llmctl.config import DistillConfig, ModelConfig
from llmctl.distilling.settings import settle
from llmctl.distilling.teacher import Teacher, Teachers
from llmctl.distilling.teacher_cache import CachedBatches, InOrder, Spec, fixed_batches, signals_of, states_of
from llmctl.errors import ArtifactError, DivergedError, NotFoundError, UsageError
from llmctl.formats.artifact import read_artifact
from llmctl.formats.artifact_write import write_artifact
from llmctl.formats.teacher_signals import SignalStore
from llmctl.jobs import distill as module
from llmctl.jobs.begin import begin
from llmctl.jobs.distill import part_of
from llmctl.jobs.distill_cache import encode, make_cache
from llmctl.losses.base import IGNORE
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.recipe import load
from tests.jobs.test_distill import TINY, here, pairs  # noqa: F401
from tests.support.jobs import environment, finish, running, weights
from tests.support.warm import WARM


def config_of(teacher: Path, *settings: str) -> DistillConfig:
    given = [*TINY, f"model={teacher}", "data.paths=[text.txt]", "student.shape=layers=1", *settings]
    return load(DistillConfig, settings=given, environment={}).config


def made(teacher: Path, out: str, *settings: str) -> SignalStore:
    return make_cache(config_of(teacher, *settings), Path(out), print)


def run(teacher: Path, *settings: str):
    return begin("distill", config_of(teacher, *settings), quiet=True)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def job_of(teacher: Path, *settings: str) -> SimpleNamespace:
    config = settle(config_of(teacher, *settings))
    teachers = Teachers(config)
    return SimpleNamespace(teachers=teachers, data=encode(config, teachers, Path("job-data"), print))


def exact(job: SimpleNamespace, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the teacher's probabilities at the labels of fixed rows, and the labels."""
    batch = fixed_batches(job.data).batch(numbers)
    ids = {name: torch.from_numpy(array) for name, array in batch.items() if name != "labels"}
    with torch.no_grad():
        probabilities = job.teachers.original().model(**ids).softmax(-1).flatten(0, 1)
    labels = torch.from_numpy(batch["labels"]).flatten()
    vocabulary = job.data.corpus.tokenizer.vocab_size
    assert vocabulary == job.teachers.original().model.config.vocab_size
    return probabilities[labels != IGNORE], labels[labels != IGNORE]


def test_rows_stay_what_they_are_in_any_order(teachers):
    source = fixed_batches(job_of(teachers["decoder"]).data)
    n = source.n_rows
    first = {source.address(number): source.batch([number])["input_ids_BT"] for number in range(n)}
    assert sorted(first) == list(range(n))
    orders = [[source.address(number) for number in range(start, start + n)] for start in (0, n, 2 * n)]
    assert len({tuple(order) for order in orders}) == 3
    for number in range(n, 2 * n):
        assert np.array_equal(first[source.address(number)], source.batch([number])["input_ids_BT"])


@pytest.mark.parametrize("kind", ["sampled", "topk", "hidden"])
def test_a_batch_is_its_rows_however_it_is_cut(teachers, kind):
    """A process or a micro-batch gets some of a step's rows: what it is told is what the whole step would be."""
    store = made(teachers["decoder"], "signals", f"teacher.kind={kind}")
    source = CachedBatches(fixed_batches(job_of(teachers["decoder"]).data), store)
    numbers = list(range(source.n_rows - 3, source.n_rows + 5))  # over the end of an epoch
    whole = source.batch(numbers)
    counts = [int((row != IGNORE).sum()) for row in whole["labels"]]
    assert all(len(array) == sum(counts) for name, array in whole.items() if name.startswith("teacher_"))
    for ways in (1, 2, 4):
        for rank in range(ways):
            own = source.batch(numbers[rank::ways])
            for name in (name for name in whole if name.startswith("teacher_")):
                parts = np.split(whole[name], np.cumsum(counts)[:-1])
                expected = np.concatenate(parts[rank::ways])
                if kind == "sampled":  # padded to the widest label of the batch, with shares of nothing
                    width = own[name].shape[1]
                    assert name == "teacher_ids" or not expected[:, width:].any()
                    expected = expected[:, :width]
                assert np.array_equal(own[name], expected)


def test_draws_have_the_teachers_shares(teachers):
    teacher = teachers["decoder"]
    job = job_of(teacher)
    shares = []
    for seed in range(6):
        store = made(teacher, f"signals-{seed}", "teacher.draws=200", f"train.seed={seed}")
        own = job_of(teacher, f"train.seed={seed}")
        found = store.signals([fixed_batches(own.data).address(0)])
        addresses = fixed_batches(own.data).address(0)
        assert found["teacher_probs"].sum(axis=1) == pytest.approx(1, abs=1e-5)
        shares.append((addresses, found))
    del job
    for seed, (_, found) in enumerate(shares):
        p, _ = exact(job_of(teacher, f"train.seed={seed}"), [0])
        drawn = np.zeros(p.shape)
        np.add.at(drawn, (np.arange(len(p))[:, None], found["teacher_ids"]), found["teacher_probs"])
        p = p.double().numpy()
        deviation = (drawn - p) / np.sqrt(np.maximum(p * (1 - p), 1e-12) / 200)
        # Sums over rows of what is drawn independently: the mean of squares is one.
        likely = p > 0.02
        assert (deviation[likely] ** 2).mean() == pytest.approx(1, abs=0.25)
        assert np.abs(deviation[likely].mean()) < 0.2


def test_the_likeliest_are_kept_and_the_rest_is_counted(teachers):
    store = made(teachers["decoder"], "signals", "teacher.kind=topk", "teacher.top_k=5")
    job = job_of(teachers["decoder"])
    p, _ = exact(job, [2])
    found = store.signals([fixed_batches(job.data).address(2)])
    values, ids = p.topk(5, dim=-1)
    assert np.array_equal(found["teacher_ids"], ids.numpy())
    assert found["teacher_probs"] == pytest.approx(values.numpy(), rel=4e-3)
    assert found["teacher_tail"] == pytest.approx((1 - values.sum(-1)).numpy(), rel=4e-3, abs=1e-5)


def test_a_soft_cap_is_in_the_stored_probabilities():
    """Gemma 2's logits are capped before the softmax."""
    config = ModelConfig(vocab_size=50, d_model=16, n_heads=2, n_layers=1, logits_softcap=2.0)
    model = LanguageModel(config)
    initialize(model, 0)
    states_LD = 40 * torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    found = signals_of(Teacher(model), states_LD, Spec("topk", top_k=50), 0, 50)
    expected = model.head(states_LD).log_softmax(dim=1).gather(1, torch.from_numpy(found["ids"].astype("int64")))
    np.testing.assert_allclose(found["logs"].astype("float32"), expected.detach().numpy(), atol=5e-3)
    assert expected.amax() < -2, "without the cap one token takes all"


def test_states_are_the_teacher_itself(teachers, monkeypatch):
    """Training from hidden states is training beside the teacher: the same rows, the same targets."""
    store = made(teachers["decoder"], "signals", "teacher.kind=hidden")
    job = job_of(teachers["decoder"])
    p, _ = exact(job, [1])
    head = store.head()
    hidden = torch.from_numpy(store.signals([fixed_batches(job.data).address(1)])["teacher_hidden"])
    torch.testing.assert_close((hidden @ head["weight"].T).softmax(-1), p, rtol=1e-4, atol=1e-6)
    cached = run(teachers["decoder"], "teacher.cache=signals")

    def fixed(session, plan, student, cache):
        part = part_of(session, plan, student, cache)

        def batches(*, shuffle):
            return fixed_batches(plan.data) if shuffle else part.batches(shuffle=False)

        return replace(part, batches=batches)

    monkeypatch.setattr(module, "part_of", fixed)
    online = begin("distill", config_of(teachers["decoder"]), quiet=True)
    ours, theirs = (read_artifact(found.path).state() for found in (cached, online))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5)
    assert cached.summary["report"]["models"]["student"]["kl"] == pytest.approx(
        online.summary["report"]["models"]["student"]["kl"], rel=1e-3
    )
    assert cached.summary["report"]["flops"]["teachers"] == 0


@pytest.mark.parametrize("kind", ["sampled", "topk", "hidden"])
def test_students_learn_from_signals(teachers, kind):
    store = made(teachers["decoder"], "signals", f"teacher.kind={kind}")
    trained = run(teachers["decoder"], "teacher.cache=signals", "train.steps=24")
    report = trained.summary["report"]
    assert report["models"]["student"]["loss"] < report["student_before_training"]["loss"]
    assert store.bytes_per_token > 0


@pytest.mark.parametrize("family", ["encoder", "encoder_decoder"])
def test_signals_of_other_families(teachers, family):
    extra = [pairs(), "task=translate"] if family == "encoder_decoder" else []
    made(teachers[family], "signals", *extra)
    trained = run(teachers[family], "teacher.cache=signals", "train.steps=24", *extra)
    report = trained.summary["report"]
    assert report["models"]["student"]["loss"] < report["student_before_training"]["loss"]


def test_a_kill_leaves_no_trace(teachers, here):  # noqa: F811
    Path("long.txt").write_text("\n\n".join(f"the good cat {i} 猫坐在 mat." * 12 for i in range(900)), encoding="utf-8")
    flags = [part for setting in TINY for part in ("--set", setting)]
    command = [
        *WARM,
        "distill",
        "cache",
        str(teachers["decoder"]),
        "-d",
        "long.txt",
        *flags,
        "--set",
        "train.seq_len=24",
    ]
    with running([*command, "-o", "whole"], [*command, "-o", "killed"], env=environment()) as (whole, killed):
        killed.wait_for("cached teacher outputs of")
        killed.kill()
        killed.end()
        assert whole.end() == 0, whole.err
    assert not (here / "killed" / "manifest.json").exists()
    with pytest.raises(NotFoundError, match="is unfinished"):
        SignalStore.open(here / "killed")
    done = finish([*command, "-o", "killed", "--json"], env=environment())
    assert json.loads(done.out)["n_labels"] > 0
    assert content(here / "killed") == content(here / "whole")


def test_a_damaged_shard_is_named_and_made_again(teachers, here):  # noqa: F811
    made(teachers["decoder"], "signals")
    whole = content(here / "signals")
    path = next((here / "signals").glob("signals-*"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=path.name):
        run(teachers["decoder"], "teacher.cache=signals")
    made(teachers["decoder"], "signals")
    assert content(here / "signals") == whole


def test_shards_come_out_the_same_in_any_order(teachers, here):  # noqa: F811
    text = "\n\n".join(f"the good cat {i} 猫坐在 mat." * 12 for i in range(300))
    Path("text.txt").write_text(text, encoding="utf-8")
    made(teachers["decoder"], "signals", "train.seq_len=16")
    whole = content(here / "signals")
    shards = [name for name in whole if name.startswith("signals-")]
    assert len(shards) > 2
    for name in (shards[0], shards[-1], "manifest.json"):
        (here / "signals" / name).unlink()
    assert made(teachers["decoder"], "signals", "train.seq_len=16").n_labels > 0
    assert content(here / "signals") == whole


def test_a_folder_with_other_signals_is_left_alone(teachers, here):  # noqa: F811
    made(teachers["decoder"], "signals")
    whole = content(here / "signals")
    for settings, word in (
        (["teacher.draws=8"], "draws 32, not 8"),
        (["teacher.kind=topk"], "kind sampled, not topk"),
        (["teacher.dtype=bf16"], "teacher_dtype float32, not bfloat16"),
        (["train.seq_len=32"], "seq_len 48, not 32"),
    ):
        with pytest.raises(UsageError, match=word):
            made(teachers["decoder"], "signals", *settings)
        assert content(here / "signals") == whole
    # One that was not finished is known by its shards.
    (here / "signals" / "manifest.json").unlink()
    with pytest.raises(UsageError, match="draws 32, not 8"):
        made(teachers["decoder"], "signals", "teacher.draws=8")


def test_text_of_an_attempt_with_other_data_is_not_gone_on_with(teachers, here):  # noqa: F811
    """What stays behind of a killed attempt is the encoded text, and no shard yet."""
    other = "\n\n".join(f"a wholly other text {i} 猫." for i in range(60))
    Path("other.txt").write_text(other, encoding="utf-8")
    config = settle(config_of(teachers["decoder"]))
    encode(config, Teachers(config), here / "signals" / "data", print)
    (here / "signals" / "data" / "asked.json").write_text("{}\n")
    made(teachers["decoder"], "signals", "data.paths=[other.txt]")
    run(teachers["decoder"], "teacher.cache=signals", "data.paths=[other.txt]")


def test_states_in_bfloat16_are_the_teachers_own(teachers):
    wide = made(teachers["decoder"], "wide", "teacher.kind=hidden")
    narrow = made(teachers["decoder"], "narrow", "teacher.kind=hidden", "teacher.dtype=bf16")
    assert narrow.bytes_per_token < 0.55 * wide.bytes_per_token
    assert narrow.head()["weight"].dtype == torch.bfloat16
    job = job_of(teachers["decoder"])
    batch = fixed_batches(job.data).batch([0])
    teacher = Teacher(job.teachers.original().model).to(torch.device("cpu"), "bf16", torch.float32)
    own = states_of(teacher, InOrder(fixed_batches(job.data)).batch(range(8)), torch.device("cpu"))
    found = narrow.signals(range(8))["teacher_hidden"]
    assert np.array_equal(found, own.float().numpy())
    assert (
        len(narrow.signals([fixed_batches(job.data).address(0)])["teacher_hidden"]) == (batch["labels"] != IGNORE).sum()
    )
    trained = run(teachers["decoder"], "teacher.cache=narrow", "train.steps=24")
    report = trained.summary["report"]
    assert report["models"]["student"]["loss"] < report["student_before_training"]["loss"]


def test_a_teacher_that_is_not_finite_is_refused(teachers, here):  # noqa: F811
    artifact = read_artifact(teachers["decoder"])
    state = {name: tensor * float("nan") for name, tensor in artifact.state().items()}
    write_artifact(here / "broken", artifact.config, state, files=artifact.files, provenance={})
    with pytest.raises(DivergedError, match="not finite"):
        made(here / "broken", "signals")


def test_other_targets_in_the_same_file_are_other_data(teachers):
    rows = [{"source": f"the cat {i}", "first": f"猫 {i} good", "second": f"bad {i} 猫 on"} for i in range(60)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = ["data.paths=[pairs.jsonl]", "task=translate", "columns.source=source"]
    made(teachers["encoder_decoder"], "signals", *given, "columns.target=first")
    with pytest.raises(UsageError, match="does not match this run: data"):
        run(teachers["encoder_decoder"], "teacher.cache=signals", *given, "columns.target=second")


def test_signals_of_something_else_are_refused(teachers, here):  # noqa: F811
    made(teachers["decoder"], "signals")
    artifact = read_artifact(teachers["decoder"])
    other = LanguageModel(artifact.config)
    initialize(other, 5)
    write_artifact(here / "other", other.config, other.state_dict(), files=artifact.files, provenance={})
    Path("more.txt").write_text("\n\n".join(f"another cat {i} 猫 sat on the mat." for i in range(60)), encoding="utf-8")
    for settings, word in (
        ([f"model={here / 'other'}"], "teacher"),
        (["data.paths=[more.txt]"], "data"),
        (["train.seq_len=32"], "seq_len"),
        (["data.isolate=false"], "isolate"),
        (["data.val_frac=0.3"], "data"),
    ):
        with pytest.raises(UsageError, match=f"does not match this run: .*{word}") as caught:
            run(teachers["decoder"], "teacher.cache=signals", *settings)
        shown = [part.split(" ")[-3:] for part in str(caught.value).split("this run: ")[1].split("; ")]
        assert all(there.rstrip(",") != wanted for there, _, wanted in shown)
    with pytest.raises(NotFoundError, match="is no teacher cache"):
        run(teachers["decoder"], "teacher.cache=text.txt.folder")


@pytest.mark.parametrize(
    "settings", [["loss.name=rkl"], ["loss.temperature=2"], ["loss.match=hidden"], ["loss.on_policy=0.5"]]
)
def test_what_signals_cannot_teach(teachers, settings):
    made(teachers["decoder"], "signals")
    with pytest.raises(UsageError, match=settings[0].split("=")[0]):
        run(teachers["decoder"], "teacher.cache=signals", *settings)


def test_resumed_from_signals_is_the_same(teachers, here):  # noqa: F811
    made(teachers["decoder"], "signals")
    settings = [*TINY, "train.save_every=1", "student.shape=layers=1", "train.steps=12", "teacher.cache=signals"]
    flags = [part for setting in settings for part in ("--set", setting)]
    command = [*WARM, "distill", str(teachers["decoder"]), "-d", "text.txt", *flags, "-v"]
    with running([*command, "-o", "whole"], [*command, "-o", "killed"], env=environment()) as (whole, killed):
        killed.wait_for("step 6/12")
        killed.kill()
        killed.end()
        assert whole.end() == 0, whole.err
    finish([*WARM, "distill", "--resume", "killed"], env=environment())
    assert weights(here / "killed") == weights(here / "whole")
