"""Pretraining objectives. To add one: a row here, and its batches in training/batches.py unless they exist."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ObjectiveRow:
    """An objective.

    families: the models it trains, the default first. batches: the function of training/batches.py that makes its batches.
    default_steps: about a minute on two cores with the built-in corpus and the default model. prompt: for samples of the
    built-in corpus. reads_pairs: source and target texts instead of plain text. needs: a token kind of the tokenizer:
    `mask` or `sentinels`. is_masked: only masked positions have labels.
    """

    families: tuple[str, ...]
    summary: str
    source: str
    batches: str
    default_steps: int
    prompt: str
    reads_pairs: bool = False
    needs: str = ""
    is_masked: bool = False


OBJECTIVES: dict[str, ObjectiveRow] = {
    "clm": ObjectiveRow(
        ("decoder",), "predict the next token", "GPT, Radford et al. 2018", "causal", 300, "The function returns"
    ),
    "mlm": ObjectiveRow(
        ("encoder",),
        "predict masked tokens",
        "BERT, arXiv:1810.04805",
        "masked",
        350,
        "Return a <mask> of strings.",
        needs="mask",
        is_masked=True,
    ),
    "span": ObjectiveRow(
        ("encoder_decoder",),
        "generate the spans removed from a text",
        "T5, arXiv:1910.10683",
        "span",
        200,
        "Return a <extra_id_0> of strings.",
        needs="sentinels",
    ),
    "seq2seq": ObjectiveRow(
        ("encoder_decoder",),
        "map a source text to a target text",
        "Vaswani et al., arXiv:1706.03762",
        "pairs",
        400,
        "os.path.join(a, *p)",
        reads_pairs=True,
    ),
}

TEXT_OBJECTIVES = {"decoder": "clm", "encoder": "mlm", "encoder_decoder": "span"}
"""The objective of `--task text` by model family, unless a model says what it was pretrained on."""
