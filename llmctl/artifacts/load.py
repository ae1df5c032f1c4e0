"""Load a model with its tokenizer.

torch is imported inside functions, so that importing this module is fast.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.artifacts.find import Ability, require_family, usage
from llmctl.errors import ArtifactError, UsageError
from llmctl.formats.artifact import Artifact
from llmctl.formats.quantization import PARTS
from llmctl.formats.transformers_backend import TransformersArtifact
from llmctl.tables.dtypes import full_name

if TYPE_CHECKING:
    from llmctl.config import ModelConfig
    from llmctl.model.decode import Decoder
    from llmctl.model.transformer import LanguageModel
    from llmctl.tokenizer.base import Frame, Tokenizer


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer if it has one, and the artifact they came from.

    is_own: nothing else, such as a training loop, changes the weights.
    """

    model: "LanguageModel"
    tokenizer: "Tokenizer | None"
    artifact: "Artifact"
    is_own: bool = False

    @cached_property
    def decoder(self) -> "Decoder | None":
        """The model prepared for cached decoding; None if its weights may still change or it is not a decoder."""
        from llmctl.kernels.decoder import make_decoder

        return make_decoder(self.model) if self.is_own else None

    @cached_property
    def frame(self) -> "Frame":
        """The special tokens around a text of this model, as its tokenizer says."""
        from llmctl.tokenizer.base import Frame

        return self.tokenizer.frame(self.model.config.family) if self.tokenizer else Frame()


def load_model(
    path: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    able: Ability = "any",
    packed: bool = False,
    backend: str = "native",
) -> Loaded:
    """Load a model folder or file in evaluation mode.

    An adapter folder is loaded as its base with the adapter merged into the weights.
    packed: keep quantized weights packed, for inference; otherwise dequantize them, as training needs.
    dtype: float32, bfloat16, float16, or auto: float32 on a CPU, bfloat16 on a GPU. backend: see `read_model`.
    Raises: NotFoundError, ArtifactError (damaged, or the tokenizer does not fit), UsageError for an unavailable device
    or dtype, or a model that is not `able` (checked before weights are read).
    """
    import torch

    from llmctl.artifacts.with_adapters import read_model
    from llmctl.model.quantized import quantize
    from llmctl.model.transformer import assign_tensors

    artifact = read_model(path, backend)
    require_family(artifact.config, able, path)
    if able == "fill" and is_bare(artifact):
        raise UsageError(
            f"`{path}` is a sentence encoder without a prediction head, which cannot fill",
            f"use it with `{usage(artifact.config, str(path), is_bare=True)}`",
        )
    target = choose_device(device)
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    names["auto"] = torch.float32 if target == "cpu" else torch.bfloat16
    dtype = full_name(dtype)
    if dtype not in names:
        raise UsageError(f"unknown dtype: `--dtype {dtype}`", "use float32, bfloat16, float16 or auto")
    tokenizer = fitting_tokenizer(artifact)
    if isinstance(artifact, TransformersArtifact):
        from llmctl.artifacts.transformers_model import load_through_transformers

        return Loaded(load_through_transformers(artifact, device=target, dtype=names[dtype]), tokenizer, artifact)
    model = without_weights(artifact.config)
    schemes = artifact.schemes if packed else {}
    with torch.device("meta"):
        quantize(model, schemes)
    materialize_buffers(model, target)
    # In float32 without a conversion, these are views of the file: only what may be written into is copied.
    state = artifact.packed_state() if schemes else artifact.state(names[dtype])
    if artifact.config.tie_embeddings and not artifact.config.n_labels:
        state.pop("lm_head.weight", None)
    for name, tensor in state.items():
        # Codes and scales of quantized weights keep their dtype.
        kind = tensor.dtype if name.rpartition(".")[2] in PARTS else names[dtype]
        state[name] = tensor.to(target, kind, copy=not packed)
    assign_tensors(model, state)
    return Loaded(model.eval(), tokenizer, artifact, is_own=True)


def fitting_tokenizer(artifact: "Artifact") -> "Tokenizer | None":
    """Return the tokenizer of an artifact, or None.

    Raises: ArtifactError if it has more tokens than the model.
    """
    from llmctl.tokenizer.load import find_tokenizer

    tokenizer = find_tokenizer(artifact.files)
    config = artifact.config
    pairs = [(tokenizer, config.source_vocab_size or config.vocab_size)]
    if tokenizer is not None and config.source_vocab_size:
        pairs.append((tokenizer.for_target, config.vocab_size))
    for own, size in pairs:
        if own is not None and own.vocab_size > size:
            raise ArtifactError(
                f"the tokenizer of `{artifact.path}` has {own.vocab_size:,} tokens, its model {size:,}",
                "model and tokenizer do not match: import the model again",
            )
    return tokenizer


def without_weights(config: "ModelConfig") -> "LanguageModel":
    """Build a model on the meta device: its weights have shapes but no storage.

    Initialization is skipped: on the meta device, torch's random functions import its compiler (about a second).
    """
    import torch
    from torch.overrides import TorchFunctionMode

    from llmctl.model.transformer import LanguageModel

    class SkipInit(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__module__", None) == "torch.nn.init":
                return args[0] if args else kwargs["tensor"]
            return func(*args, **(kwargs or {}))

    with torch.device("meta"), SkipInit():
        return LanguageModel(config)


def materialize_buffers(model: "LanguageModel", device: str = "cpu") -> None:
    """Create the buffers that files do not store (sinusoidal positions): on the meta device they have no storage."""
    import torch

    from llmctl.model.positions import sinusoidal_table
    from llmctl.quant.linear import QuantEmbedding

    for module in model.modules():
        if isinstance(module, QuantEmbedding) and module.like.is_meta:
            module.like = torch.zeros((), device=device)
        if "sinusoids" in dict(module.named_buffers(recurse=False)):
            empty: Any = module.sinusoids
            n_positions, width = empty.shape
            module.sinusoids = sinusoidal_table(n_positions, width, model.config.sinusoid_rates).to(device)


def choose_device(name: str) -> str:
    """Return `cpu` or `cuda`; `auto` prefers `cuda`.

    Raises: UsageError if the device is unknown or unavailable.
    """
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"unknown device: `--device {name}`", "use auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("`--device cuda`: no CUDA device is visible", "use --device cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def is_bare(artifact: Artifact) -> bool:
    """Tell whether an encoder was published without a prediction head, as sentence encoders are."""
    if isinstance(artifact, TransformersArtifact):  # only those with a head are read
        return False
    architecture = artifact.architecture
    has_head = re.search(r"For[A-Z]", architecture) is not None  # not the one in RoFormer
    return artifact.config.family == "encoder" and bool(architecture) and not has_head
