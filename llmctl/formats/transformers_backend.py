"""Models of architectures that llmctl does not read, as transformers describes them: config, files, tensors' entries.

They can teach and be evaluated; what needs their weights by our names (pruning, fine-tuning, quantizing, exporting) is
refused. Code of a model's own folder is never run. transformers is imported inside functions: it takes seconds.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.config import Family, ModelConfig
from llmctl.errors import ArtifactError, MissingExtraError, UnsupportedModelError
from llmctl.families.family import FamilyFormat
from llmctl.formats.artifact import Artifact, check_kind, read_files, read_headers, read_hf
from llmctl.model.shapes import complete

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LONGEST = 32768
"""The context in tokens of a model that has no limit of its own, such as a state-space model."""

MAPPINGS: dict[str, Family] = {
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "encoder_decoder",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "decoder",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "encoder",
}
"""Tables of transformers' auto classes; the first that names an architecture decides, BART's is in all three."""

AUTO_CLASSES: dict[Family, str] = {
    "decoder": "AutoModelForCausalLM",
    "encoder": "AutoModelForMaskedLM",
    "encoder_decoder": "AutoModelForSeq2SeqLM",
}


@dataclass(frozen=True)
class TransformersArtifact(Artifact):
    """A model that transformers computes.

    config: its family, context, vocabulary, width and special tokens, with blocks of ours in place of its own.
    """

    @property
    def family(self) -> FamilyFormat:
        """Refused: the tensors have names of their own."""
        raise self.unread()

    @property
    def n_parameters(self) -> int:
        """The number of stored parameters."""
        return sum(math.prod(entry.shape) for _, _, entry in self.tensors.values())

    def stored_state(self) -> dict[str, "Tensor"]:
        """Refused: the tensors have names of their own."""
        raise self.unread()

    def state(self, dtype: "torch.dtype | None" = None) -> dict[str, "Tensor"]:
        """Refused: the tensors have names of their own."""
        del dtype
        raise self.unread()

    def unread(self) -> UnsupportedModelError:
        """Return the error for work that needs the weights under our names."""
        return UnsupportedModelError(
            f"`{self.path}` is of the architecture `{self.architecture}`, which llmctl does not read",
            "it can teach and be evaluated, through transformers; nothing else",
        )


def is_installed() -> bool:
    """Tell whether transformers is installed."""
    return find_spec("transformers") is not None


def read_through_transformers(path: Path) -> TransformersArtifact:
    """Read a folder as transformers describes it; weights are not loaded.

    Raises: NotFoundError, ArtifactError; MissingExtraError without transformers; UnsupportedModelError for an
    architecture that transformers does not know, or that predicts no tokens.
    """
    check_kind(path)
    if not path.is_dir():
        raise ArtifactError(f"`{path}` is a file, transformers reads folders", "pass the model's folder")
    if not is_installed():
        raise MissingExtraError(f"running `{path}`", "transformers")
    headers = read_headers(path)
    hf, where = read_hf({}, path, path)
    family, architecture = family_and_class(hf, where)
    published = published_config(path)
    return TransformersArtifact(
        path=path,
        architecture=architecture,
        config=described(published, family, where),
        files=read_files({}, path, path),
        provenance={},
        hf=hf,
        tensors={
            name: (file, name, entry) for file, header in headers.items() for name, entry in header.tensors.items()
        },
    )


def family_and_class(hf: Mapping[str, Any], where: str) -> tuple[Family, str]:
    """Return our family of an architecture that predicts tokens, and the name of the class that computes it.

    Raises: UnsupportedModelError.
    """
    from transformers.models.auto import modeling_auto

    named = hf.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    tables = {family: getattr(modeling_auto, mapping) for mapping, family in MAPPINGS.items()}
    for name in names:
        for family, table in tables.items():
            if name in table.values():
                return family, name
    # A multimodal model is read as its text model, if there is a class for that.
    model_type = hf.get("model_type")
    generates = not names or any("ForConditionalGeneration" in name for name in names)
    if isinstance(model_type, str) and generates:
        for family, table in tables.items():
            if model_type in table:
                return family, str(table[model_type])
    raise UnsupportedModelError(
        f"`{where}` is of the architecture `{(', '.join(names) or str(model_type))[:80]}`, which is no language model that "
        "llmctl or transformers reads",
        "a teacher is a causal, masked or sequence-to-sequence language model",
    )


def published_config(path: Path) -> Any:
    """Return a folder's configuration as transformers completes it.

    Raises: ArtifactError.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise refused_by_transformers(path, error) from error


def refused_by_transformers(path: Path, error: Exception) -> ArtifactError:
    """Return the error for a folder that transformers cannot use."""
    return ArtifactError(
        f"transformers cannot read `{path}`: {one_line(error)}", "the folder may need another version of transformers"
    )


def one_line(error: Exception) -> str:
    """Return the first line of an error of another library."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def described(published: Any, family: Family, where: str) -> ModelConfig:
    """Return what the rest of llmctl has to know of a model.

    Raises: ArtifactError if the configuration does not say how large it is.
    """
    text = published if family == "encoder_decoder" else published.get_text_config()

    def first(*keys: str, default: int | None = None) -> int:
        for key in keys:
            value = getattr(text, key, None)
            if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31:
                return value
        if default is None:
            raise ArtifactError(f"`{where}` has no `{keys[0]}`", "download the model again")
        return default

    def token(key: str) -> int:
        value = getattr(text, key, None)
        value = getattr(published, key, None) if value is None else value
        value = value[0] if isinstance(value, list) and value else value
        return value if isinstance(value, int) and 0 <= value < 2**31 else -1

    n_heads = first("num_attention_heads", "num_heads", "n_head", "decoder_attention_heads", default=1)
    d_model = first("hidden_size", "d_model", "n_embd")
    start = token("decoder_start_token_id")
    return complete(
        ModelConfig(
            family=family,
            vocab_size=first("vocab_size"),
            d_model=d_model,
            n_layers=first("num_hidden_layers", "n_layer", "num_layers", "encoder_layers"),
            n_decoder_layers=first("decoder_layers", "num_decoder_layers", default=1)
            if family == "encoder_decoder"
            else 0,
            n_heads=n_heads,
            head_dim=2 * math.ceil(d_model / n_heads / 2),
            max_positions=first("max_position_embeddings", "n_positions", "max_seq_len", default=LONGEST),
            bos_id=token("bos_token_id"),
            eos_id=token("eos_token_id"),
            pad_id=token("pad_token_id"),
            decoder_start_id=start if start >= 0 else token("bos_token_id"),
        )
    )
