"""Losses on preferences, and their gradients, are those of TRL in float64."""

import numpy as np
import pytest
import torch

from llmctl.artifacts.load import load_model
from llmctl.data.batches import Ids
from llmctl.data.preference_batches import PreferenceBatches
from llmctl.data.stream import ExampleRows
from llmctl.losses.preferences import Preference
from llmctl.training.batch import to_device
from llmctl.training.preference_objective import PreferencePrediction

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]
transformers = pytest.importorskip("transformers", reason="needs the extra `interop`")
trl = pytest.importorskip("trl", reason="needs trl: pip install trl")
datasets = pytest.importorskip("datasets", reason="needs trl: pip install trl")

V, N = 61, 6
LIMIT = 1e-6
"""transformers computes norms, and TRL some log probabilities, in float32."""


class Documents:
    """Token sequences in memory."""

    def __init__(self, rows):
        self.rows = [np.array(row) for row in rows]
        self.lengths = np.array([len(row) for row in rows])

    def document(self, index):
        return self.rows[index]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return the model and its reference, each in transformers and here, in float64."""
    folder = tmp_path_factory.mktemp("models")
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        own = transformers.LlamaForCausalLM(config)
        own.save_pretrained(folder / str(seed))
        ours = load_model(folder / str(seed), device="cpu", dtype="float32").model.double().eval()
        found.append((own.double().eval(), ours))
    return found


@pytest.fixture(scope="module")
def examples():
    """Return prompts with two answers of different lengths."""
    rng = np.random.default_rng(0)
    return [
        {
            name: rng.integers(3, V, int(rng.integers(2, 9))).tolist()
            for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        }
        for _ in range(N)
    ]


def batches_of(examples, *, single=None, reference=None):
    """Return the examples as our batches; single: whether each one is an answer of the first kind."""
    tokens, trained, first_lengths = [], [], []
    for one in examples:
        prompt = one["prompt_ids"]
        answers = [one["chosen_ids"]] if single is not None else [one["chosen_ids"], one["rejected_ids"]]
        tokens.append([index for answer in answers for index in (*prompt, *answer)])
        trained.append([flag for answer in answers for flag in (*(len(prompt) * [0]), *(len(answer) * [1]))])
        first_lengths.append(len(prompt) + len(answers[0]))
    documents, order = Documents(tokens), np.arange(N)
    return PreferenceBatches(
        documents,
        Documents(trained),
        np.array(first_lengths),
        np.ones(N, bool) if single is None else np.array(single),
        ExampleRows(documents.lengths, order, seed=0, batch_size=N, shuffle=False),
        Ids(0, 2, 1, np.zeros(V, bool)),
        counts_answers=single is not None,
        # TRL joins a prompt and the answer before it.
        mismatched=None if single is None else np.roll(order, 1),
        reference=reference,
    )


def ours(models, batches, preference):
    """Return our mean loss, and the gradients by transformers' names."""
    (_, model), (_, reference) = models
    batch = to_device(batches.batch(range(N)), torch.device("cpu"))
    for prefix in ("", "other_") if not PreferencePrediction(model, preference, 0.0, 7).row.is_paired else ("",):
        with torch.no_grad():
            batch[f"{prefix}reference_BS"] = PreferencePrediction(reference, preference, 0.0, 7).log_probs(
                batch, prefix
            )[0]
    model.zero_grad()
    loss = PreferencePrediction(model, preference, 0.0, 7)(batch)
    mean = loss.sum / loss.count
    mean.backward()
    return float(mean), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def compare(model, theirs, mean, gradients):
    model.zero_grad()
    theirs.backward()
    assert float(theirs) == pytest.approx(mean, abs=LIMIT)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=LIMIT, rtol=0, msg=name)


def trainer_of(kind, config, models, columns, tmp_path, **settings):
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=pytest.importorskip("tokenizers").Tokenizer(
            pytest.importorskip("tokenizers").models.WordLevel({f"<{n}>": n for n in range(V)}, unk_token="<3>")
        ),
        pad_token="<0>",
        bos_token="<1>",
        eos_token="<2>",
    )
    arguments = config(
        output_dir=str(tmp_path),
        report_to=[],
        per_device_train_batch_size=N,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_dropout=False,
        **settings,
    )
    (model, _), (reference, _) = models
    dataset = datasets.Dataset.from_list(columns)
    found = kind(model, ref_model=reference, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    model.double(), reference.double()
    return found


TEXTS = [{"prompt": "<3> <4>", "chosen": " <5>", "rejected": " <6>"}] * N


@pytest.mark.parametrize(
    ("name", "options", "settings"),
    [
        ("dpo", {"beta": 0.3}, {"loss_type": "sigmoid", "beta": 0.3}),
        ("ipo", {"beta": 0.3}, {"loss_type": "ipo", "beta": 0.3}),
    ],
)
def test_losses_with_a_reference_are_those_of_the_trainer(models, examples, tmp_path, name, options, settings):
    trainer = trainer_of(trl.DPOTrainer, trl.DPOConfig, models, TEXTS, tmp_path, **settings)
    batch = trainer.data_collator(examples)
    theirs = trainer._compute_loss(models[0][0], batch, False)
    compare(models[0][0], theirs, *ours(models, batches_of(examples), Preference(name, **options)))


def test_kto_is_that_of_the_trainer(models, examples, tmp_path):
    labels = [True, False, True, True, False, False]
    single = [
        {
            "prompt_ids": one["prompt_ids"],
            "completion_ids": one["chosen_ids"],
            "KL_completion_ids": examples[index - 1]["chosen_ids"],
            "label": label,
        }
        for index, (one, label) in enumerate(zip(examples, labels, strict=True))
    ]
    rows = [{"prompt": "<3> <4>", "completion": " <5>", "label": label} for label in labels]
    settings = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    trainer = trainer_of(trl.KTOTrainer, trl.KTOConfig, models, rows, tmp_path, **settings)
    theirs = trainer._compute_loss(models[0][0], trainer.data_collator(single), False)
    preference = Preference("kto", 0.3, desirable=1.5, undesirable=0.5)
    compare(models[0][0], theirs, *ours(models, batches_of(examples, single=labels), preference))


def test_simpo_and_the_odds_ratio_are_those_of_the_trainers(models, examples):
    # These trainers take log probabilities: only what they make of them is compared.
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    batch = to_device(batches_of(examples).batch(range(N)), torch.device("cpu"))
    with torch.no_grad():
        sums_BS, counts_BS = PreferencePrediction(models[0][1], Preference(), 0.0, 7).log_probs(batch)
    chosen, rejected = (sums_BS / counts_BS).T
    simpo = CPOTrainer.__new__(CPOTrainer)
    for key, value in {
        "beta": 2.0,
        "simpo_gamma": 1.4,
        "alpha": 0.0,
        "label_smoothing": 0.1,
        "loss_type": "simpo",
    }.items():
        setattr(simpo, key, value)
    simpo.accelerator = type("Accelerator", (), {"device": torch.device("cpu")})()
    theirs = simpo.cpo_loss(chosen, rejected)[0].mean()
    preference = Preference("simpo", 2.0, label_smoothing=0.1, gamma=1.4)
    assert float(theirs) == pytest.approx(ours(models, batches_of(examples), preference)[0], abs=LIMIT)
    orpo = ORPOTrainer.__new__(ORPOTrainer)
    orpo.beta, orpo.accelerator = 0.3, simpo.accelerator
    odds = orpo.odds_ratio_loss(chosen, rejected)[0].mean()
    theirs = -chosen.mean() - odds  # TRL's cross-entropy includes the prompt, the paper's does not
    assert float(theirs) == pytest.approx(ours(models, batches_of(examples), Preference("orpo", 0.3))[0], abs=1e-6)
