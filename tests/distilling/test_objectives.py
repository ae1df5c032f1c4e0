"""What a student learns, on models small enough to work out by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from llmctl.config import DistillLossConfig, ModelConfig
from llmctl.data.batches import CausalBatches, Ids
from llmctl.data.stream import PackedRows
from llmctl.distilling.matching import Matching, StateDistillation
from llmctl.distilling.objectives import Distillation, calibration_error
from llmctl.distilling.on_policy import Writer
from llmctl.distilling.teacher import Teacher
from llmctl.losses.base import IGNORE
from llmctl.model.transformer import LanguageModel, initialize
from llmctl.training.batch import to_device

SHAPE = ModelConfig(vocab_size=23, d_model=16, n_layers=2, n_heads=2, max_positions=32, init_std=0.3)
FKL = DistillLossConfig(name="fkl", temperature=1.0)


def model(seed: int = 0, **fields) -> LanguageModel:
    made = LanguageModel(replace(SHAPE, **fields))
    initialize(made, seed)
    return made


def batch(rows: int = 3, tokens: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 23, (rows, tokens + 1), generator=torch.Generator().manual_seed(seed))
    labels = ids[:, 1:].clone()
    labels[0, 4:] = IGNORE
    return {"input_ids_BT": ids[:, :-1], "labels": labels}


def objective(student, teachers, config=FKL, **extra) -> Distillation:
    return Distillation(
        student, [Teacher(one) for one in teachers], config, torch.ones(student.config.vocab_size), **extra
    )


class Successor(LanguageModel):
    """Predicts that a token is followed by the next number."""

    def __init__(self) -> None:
        super().__init__(replace(SHAPE, d_model=32, tie_embeddings=False))
        eye = torch.zeros(23, 32)
        eye[torch.arange(23), torch.arange(23)] = 1.0
        self.model.embed_tokens.weight.data = eye
        for block in self.model.layers:
            block.self_attn.o_proj.weight.data.zero_()
            block.mlp.down_proj.weight.data.zero_()
        self.lm_head.weight.data = 20 * eye.roll(1, 0)


def test_a_label_is_compared_with_what_comes_next():
    tokens = np.arange(1, 22)

    class Text:
        lengths = np.array([len(tokens)])

        def document(self, index):
            del index
            return tokens

    rows = PackedRows(Text(), np.array([0]), seq_len=10, overlap=1, seed=0, shuffle=False)
    ids = Ids(pad=0, eos=0, decoder_start=0, special=np.zeros(23, dtype=bool))
    source = CausalBatches(rows, ids)
    learned = objective(Successor(), [Successor()]).eval()
    with torch.no_grad():
        found = learned(to_device(source.batch([0, 1]), torch.device("cpu")))
    assert float(found.parts["nats"] / found.count) < 1e-3
    moved = source.batch([0, 1])
    moved["labels"] = np.roll(moved["labels"], 1, axis=1)
    with torch.no_grad():
        wrong = learned(to_device(moved, torch.device("cpu")))
    assert float(wrong.parts["nats"] / wrong.count) > np.log(23) / 2


def test_only_labels_count():
    student, teacher = model(1), model(2)
    one = batch()
    learned = objective(student, [teacher])
    whole = learned(one)
    assert float(whole.count) == float((one["labels"] != IGNORE).sum())
    other = {name: tensor.clone() for name, tensor in one.items()}
    other["input_ids_BT"][0, 5:] = 7  # behind the last label of its row
    torch.testing.assert_close(learned(other).sum, whole.sum)
    nothing = learned(one | {"labels": torch.full_like(one["labels"], IGNORE)})
    assert float(nothing.sum.detach()) == 0 == float(nothing.count)


def test_rows_twice_are_the_same_mean():
    learned = objective(model(1), [model(2)])
    one = batch()
    twice = {name: tensor.repeat(2, 1) for name, tensor in one.items()}
    single, double = learned(one), learned(twice)
    torch.testing.assert_close(double.sum / double.count, single.sum / single.count)


def test_a_teacher_with_a_padded_vocabulary_says_the_same():
    student, teacher = model(1), model(2)
    padded = model(3, vocab_size=151)
    state = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        wide = torch.randn(151, 16, generator=torch.Generator().manual_seed(5)) * 9
        wide[:23] = state[name]
        state[name] = wide
    padded.load_state_dict(state)
    plain = objective(student, [teacher], vocab_size=23)(batch())
    found = objective(student, [padded], vocab_size=23)(batch())
    torch.testing.assert_close(found.sum, plain.sum, rtol=1e-6, atol=0)


def test_dropout_of_the_teacher_is_off_and_of_the_student_on():
    student, teacher = model(1), model(2, dropout=0.5)
    learned = objective(student, [teacher]).train()
    assert torch.equal(learned(batch()).sum, learned(batch()).sum)
    assert not any(one.model.training for one in learned.teachers)
    assert set(learned.state_dict()) == {f"model.{name}" for name in student.state_dict()}


def test_parts_of_what_is_learned_add_up():
    student, teacher = model(1), model(2)
    plain = objective(student, [teacher], replace(FKL, weight=0.0)).eval()
    with torch.no_grad():
        found = plain(batch())
    torch.testing.assert_close(found.sum, found.parts["nats"])
    figures = plain.figures(
        float(found.sum),
        float(found.count),
        {name: float(part) for name, part in found.parts.items()},
        np.zeros((0, 0)),
    )
    assert figures["loss"] == pytest.approx(float(found.parts["nats"] / found.count))
    assert figures["kl"] > 0
    assert 0 < figures["overlap"] < 1
    matched = objective(student, [teacher], matching=Matching("hidden", weight=2.0, labels_frac=0.5))
    other = objective(student, [teacher])
    one = batch()
    hidden = [each.hidden(one["input_ids_BT"]).flatten(0, 1) for each in (student, teacher)]
    cosines = torch.nn.functional.cosine_similarity(*hidden, dim=1)
    torch.testing.assert_close((matched(one).sum - other(one).sum).float(), (1 - cosines).sum(), rtol=1e-4, atol=1e-4)


def test_relations_move_a_student_towards_its_teacher():
    student, teacher = model(1), model(2)
    learned = objective(student, [teacher], matching=Matching("relation", layer=2, relation_heads=4))
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    one, values = batch(), []
    for _ in range(30):
        loss = learned(one).sum
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < 0.7 * values[0]


def test_a_sentence_encoder_reads_what_was_masked():
    student, teacher = model(1, family="encoder", mask_id=0), model(2, family="encoder", mask_id=0)
    ids = batch()["input_ids_BT"]
    labels = torch.full_like(ids, IGNORE)
    labels[:, 2] = ids[:, 2]
    masked = ids.clone()
    masked[:, 2] = 0
    learned = StateDistillation(student, [Teacher(teacher)], Matching("hidden"))
    other = StateDistillation(student, [Teacher(teacher)], Matching("hidden"))
    assert torch.equal(
        learned({"input_ids_BT": masked, "labels": labels}).sum, other({"input_ids_BT": ids, "labels": labels}).sum
    )


def test_what_a_student_writes_is_its_own():
    student = model(1)
    one = batch(rows=4, tokens=16)
    writer = Writer(share=1.0, n_tokens=8)
    found = writer.write(student, one)
    again = writer.write(student, one)
    assert torch.equal(found["input_ids_BT"], again["input_ids_BT"])
    assert torch.equal(found["input_ids_BT"][:, :8], one["input_ids_BT"][:, :8])
    assert not torch.equal(found["input_ids_BT"][:, 8:], one["input_ids_BT"][:, 8:])
    assert torch.equal(found["labels"][:, 7:15], found["input_ids_BT"][:, 8:])
    assert (found["labels"][:, :7] == IGNORE).all()
    # Drawn as the model predicts: over many rows the first token has its shares.
    many = {name: tensor[:1].repeat(3000, 1) for name, tensor in batch(tokens=4).items()}
    drawn = Writer(1.0, 1).write(student, many)["input_ids_BT"][:, 3]
    expected = student(many["input_ids_BT"][:1, :3])[0, -1].softmax(-1)
    shares = torch.bincount(drawn, minlength=23) / 3000
    assert float((shares - expected.detach()).abs().max()) < 0.05
    never = Writer(share=0.0, n_tokens=8).write(student, one)
    assert torch.equal(never["input_ids_BT"], one["input_ids_BT"])


def test_calibration_error():
    # 10 labels at 0.9 of which 5 are right, 10 at 0.2 of which 2 are.
    bins = np.array([[10.0, 10.0], [9.0, 2.0], [5.0, 2.0]])
    assert calibration_error(bins) == pytest.approx((4.0 + 0.0) / 20)
