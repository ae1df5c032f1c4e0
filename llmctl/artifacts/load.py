"""Find the model a command means, and load it.

Finding reads small JSON files only; torch is imported when weights are.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.artifacts.find import Ability, require_family
from llmctl.errors import ArtifactError, UsageError
from llmctl.formats.artifact import Artifact

if TYPE_CHECKING:
    from llmctl.config import ModelConfig
    from llmctl.model.decode import Decoder
    from llmctl.model.transformer import LanguageModel
    from llmctl.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class Loaded:
    """A model ready for use, its tokenizer if it has one, and the artifact it came from.

    is_own: nobody else, such as a training run, works on its weights.
    """

    model: "LanguageModel"
    tokenizer: "Tokenizer | None"
    artifact: "Artifact"
    is_own: bool = False

    @cached_property
    def decoder(self) -> "Decoder | None":
        """The model made ready for decoding; None where its weights must stay as they are, or it is of another kind."""
        from llmctl.kernels.decoder import make_decoder

        return make_decoder(self.model) if self.is_own else None

    @cached_property
    def begins_with_bos(self) -> bool:
        """Whether a text of this model begins with a begin-of-text token.

        Ours always do. Of published ones `tokenizer_config.json` says so, or the template in `tokenizer.json`;
        sentencepiece's do unless it is denied.
        """
        from llmctl.tokenizer.sentencepiece import SentencePieceTokenizer

        is_sentencepiece = isinstance(self.tokenizer, SentencePieceTokenizer)
        if isinstance(self.tokenizer, SentencePieceTokenizer) and self.tokenizer.is_lossless:
            return True
        said = self.json_file("tokenizer_config.json").get("add_bos_token")
        if said is not None:
            return bool(said)
        return is_sentencepiece or begins_with_special(self.json_file("tokenizer.json").get("post_processor"))

    def json_file(self, name: str) -> dict[str, Any]:
        """Return what a JSON file beside the weights holds; nothing where it is missing or no JSON object."""
        try:
            content = json.loads(self.artifact.files.get(name, b"{}"))
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}


def begins_with_special(post_processor: Any) -> bool:
    """Tell whether a `tokenizer.json` puts a special token before every text (Llama 3 says it only there)."""
    if not isinstance(post_processor, dict):
        return False
    if post_processor.get("type") == "Sequence":
        return any(map(begins_with_special, post_processor.get("processors") or []))
    single = post_processor.get("single")
    return isinstance(single, list) and bool(single) and isinstance(single[0], dict) and "SpecialToken" in single[0]


def load_model(
    path: Path, *, device: str = "auto", dtype: str = "auto", able: Ability = "any", packed: bool = False
) -> Loaded:
    """Load a model folder or file for use: on the device, in the dtype, in evaluation mode.

    An adapter's folder is loaded as its base with the adapter merged into the weights.
    packed: what is held in few bits stays so, as is right for use; else it is multiplied out, as training needs it.
    dtype: float32, bfloat16, float16, or auto: float32 on a CPU, bfloat16 on a GPU.
    Raises: NotFoundError, ArtifactError (damaged, or a tokenizer that does not fit), UsageError for a device or dtype
    that is not there, or a model that is not `able`; the latter before weights are read.
    """
    import torch

    from llmctl.artifacts.with_adapters import read_model
    from llmctl.model.transformer import load_tensors

    artifact = read_model(path)
    require_family(artifact.config, able, path)
    place = choose_device(device)
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    names["auto"] = torch.float32 if place == "cpu" else torch.bfloat16
    if dtype not in names:
        raise UsageError(f"`--dtype {dtype}` is not known", "float32, bfloat16, float16 or auto")
    tokenizer = fitting_tokenizer(artifact)
    model = without_weights(artifact.config)
    schemes = artifact.schemes if packed else {}
    model.quantize(schemes)
    model.to_empty(device=place)
    materialize_buffers(model)
    model.tie()
    model.to(names[dtype])
    load_tensors(model, artifact.packed_state() if schemes else artifact.state(names[dtype]))
    return Loaded(model.eval(), tokenizer, artifact, is_own=True)


def fitting_tokenizer(artifact: "Artifact") -> "Tokenizer | None":
    """Return the tokenizer of an artifact, or None.

    Raises: ArtifactError for one that has more tokens than the model.
    """
    from llmctl.tokenizer.load import find_tokenizer

    tokenizer = find_tokenizer(artifact.files)
    if tokenizer is not None and tokenizer.vocab_size > artifact.config.vocab_size:
        raise ArtifactError(
            f"the tokenizer of `{artifact.path}` has {tokenizer.vocab_size:,} tokens, its model "
            f"{artifact.config.vocab_size:,}",
            "the two do not belong together; import the model again",
        )
    return tokenizer


def without_weights(config: "ModelConfig") -> "LanguageModel":
    """Return a model on the meta device; its weights have shapes and no numbers.

    Drawing them is left out: on that device torch answers a draw by importing its compiler, most of a second.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    from llmctl.model.transformer import LanguageModel

    class Undrawn(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__module__", None) == "torch.nn.init":
                return args[0] if args else kwargs["tensor"]
            return func(*args, **(kwargs or {}))

    with torch.device("meta"), Undrawn():
        return LanguageModel(config)


def materialize_buffers(model: "LanguageModel") -> None:
    """Fill the tables that are computed, not stored; building on the meta device left them empty."""
    from llmctl.model.positions import sinusoidal_table

    for module in model.modules():
        if "sinusoids" in dict(module.named_buffers(recurse=False)):
            table = sinusoidal_table(model.config.max_positions, model.config.d_model)
            module.sinusoids.copy_(table)  # type: ignore[operator]


def choose_device(name: str) -> str:
    """Return `cpu` or `cuda`.

    Raises: UsageError for a device that is not there.
    """
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"`--device {name}` is not known", "auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("`--device cuda` is asked for, but no CUDA device is visible", "--device cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def is_bare(artifact: Artifact) -> bool:
    """Tell whether a model predicts nothing: an encoder that is published without a head, as sentence encoders are."""
    return artifact.config.family == "encoder" and "For" not in artifact.architecture
