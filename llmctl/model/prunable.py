"""Which models can be pruned, and what follows from a smaller width. Without torch, so that settings are checked first."""

from llmctl.config import ModelConfig
from llmctl.errors import UsageError
from llmctl.model.supports import AROUND_MATRICES, BLOCK, BLOCK_CHOICES, describe, unsupported

NAMED = (
    BLOCK
    | AROUND_MATRICES
    | {
        "norm_weight",
        "first_norm",
        "relative_bias",
        "relative_bias_per_layer",
        "d_embedding",
        "source_vocab_size",
        "parallel",
    }
)
CHOICES = BLOCK_CHOICES | {
    "positions": (*BLOCK_CHOICES["positions"], "disentangled"),
    "norm_position": ("pre", "post", "output", "both"),
    "activation": (*BLOCK_CHOICES["activation"], "relu2"),
}


def check_supported(config: ModelConfig, doing: str) -> None:
    """Reject a model with a setting that pruning and refitting do not support.

    Raises: UsageError naming the settings.
    """
    names = unsupported(config, NAMED, CHOICES)
    if names:
        raise UsageError(
            f"{doing} does not support models with {describe(config, names)}",
            "train a student of its own shape: pass a preset or a model folder as `--student`",
        )


def scales_at(config: ModelConfig, d_model: int) -> dict[str, float]:
    """Return the factors that follow from the width, at another one; any other factor is a constant of the model."""
    scales = {}
    if config.logits_scale != 1.0 and config.logits_scale == config.d_model**-0.5:  # T5
        scales["logits_scale"] = d_model**-0.5
    # Gemma, mBART: the embedding makes up for it, and the final norm for a tied head, unless there is none.
    has_final_norm = config.norm_position != "post" and config.norm_weight and not config.head_transform
    if config.embedding_scale == config.d_model**0.5 and (has_final_norm or not config.tie_embeddings):
        scales["embedding_scale"] = d_model**0.5
    return scales
