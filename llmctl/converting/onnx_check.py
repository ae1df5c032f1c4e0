"""Verify an ONNX file with ONNX Runtime: compare the outputs of batches with padding, and the token ids.

The outputs for a padded batch must equal those of our model for every text alone. In 8 bits they cannot, not even of our
model with the same rounding: an input that is close to the middle of two codes gets the other one by the last bit of a sum,
and that changes later ones. They must be closer to it than a few times its distance from the original, which is measured.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmctl.artifacts.load import Loaded, is_bare, materialize_buffers, without_weights
from llmctl.converting.gguf_check import PROBES, PROSE, rounded
from llmctl.errors import ArtifactError, LlmctlError, MissingExtraError
from llmctl.formats.artifact import FILES
from llmctl.formats.onnx.encoder import MASK, TYPES
from llmctl.formats.onnx.weights import EMBEDDING, HEAD, IDS, SMALLEST_SCALE, Matrix
from llmctl.inference.encoding import Row, encode_rows
from llmctl.model.transformer import LanguageModel, assign_tensors
from llmctl.tokenizer.load import find_tokenizer

if TYPE_CHECKING:
    import numpy as np

LONGEST_ROW = 256
"""Tokens of the longest row, if the model has as many positions: more than published local attention reaches."""

BOUND = 1e-5
"""Maximum difference of the outputs, relative to the largest."""

ROUNDED_BOUND = 3.0
"""The same for 8 bits: maximum distance from our model with the same rounding, relative to its distance from the original.
About 0.7 in all-MiniLM-L6-v2, whose rounding errors are independent after a few layers; a wrong graph is tens away."""

N_OUTLIERS = 4
"""Channels of every input that are not rounded in 8 bits. In all-MiniLM-L6-v2, 1 - cosine of sentence vectors falls from
10.4e-4 to 4.1e-4 with one, 2.9e-4 with 4 and 2.7e-4 with 8; each is 4 bytes for every output."""

SMALLEST = 1e-6
"""The least size of outputs, for a model of zeros."""

QUIET = 3
"""ONNX Runtime's level of messages: errors only."""


@dataclass(frozen=True)
class Proof:
    """Results of the verification.

    difference: the largest between an output and our model's, relative to its largest output. cosine: in 8 bits, the least
    similarity of a text's outputs to the original's. padded: rows that were compared in a batch with longer ones.
    """

    tensors_equal: int
    texts_equal: int
    rows: int
    padded: int
    tokens: int
    difference: float
    cosine: float | None

    def record(self) -> dict[str, Any]:
        """Return the proof as JSON-compatible data."""
        return {name: rounded(value) if isinstance(value, float) else value for name, value in asdict(self).items()}


def runtime_module() -> Any:
    """Import `onnxruntime`.

    Raises: MissingExtraError.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("`--to onnx`", "onnxruntime") from None
    return onnxruntime


def prove(
    path: Path,
    out: Path,
    original: Loaded,
    state: Mapping[str, Tensor],
    matrices: Mapping[str, Matrix],
    constants: "Mapping[str, np.ndarray[Any, Any]]",
) -> Proof:
    """Run the ONNX file at `path` and compare it; `out` is its final name, for errors.

    original: the source model, with its weights in `state`; matrices: those in 8 bits; constants: what the file must
    contain.
    Raises: ArtifactError naming the difference.
    """
    n_texts = check_tokenizer(path.parents[1], out, original)
    check_constants(path, out, constants)
    rows, bare = rows_of(original), is_bare(original.artifact)
    exact = outputs_of(with_tensors(without_weights(original.model.config), state), rows, bare=bare)
    shortest = min(range(len(rows)), key=lambda index: len(rows[index].ids))
    with failing(out):
        session = open_session(path)
        found = run(session, rows, original.model.config.pad_id)
        alone = run(session, [rows[shortest]], original.model.config.pad_id)
    wanted, cosine = exact, None
    if matrices:
        wanted = outputs_of(rounded_model(original, state, matrices), rows, bare=bare)
        check_rounded(out, exact, wanted, found)
        pairs = zip(exact, found, strict=True)
        cosine = min(float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)) for a, b in pairs)
    largest = max(float(torch.stack([output.abs().max() for output in wanted]).max()), SMALLEST)
    pairs = zip([*wanted, wanted[shortest]], [*found, *alone], strict=True)
    difference = float(torch.stack([(a - b).abs().max() for a, b in pairs]).max()) / largest
    if not matrices and not difference <= BOUND:  # also true for NaN
        raise failure(out, f"outputs of up to {largest:.3g} differ by up to {difference * largest:.3g}")
    n_tokens = sum(len(row.ids) for row in rows)
    return Proof(len(constants), n_texts, len(rows), len(rows) - 1, n_tokens, difference, cosine)


def failure(out: Path, what: str) -> ArtifactError:
    """Return the error for a file that differs from what was meant to be written."""
    return ArtifactError(
        f"`{out}` was not written, verification failed: {what}", "this is a bug in llmctl; please report the model"
    )


def check_tokenizer(folder: Path, out: Path, original: Loaded) -> int:
    """Read the tokenizer files of the folder back and compare token ids; return the number of texts."""
    if original.tokenizer is None:
        return 0
    try:
        back = find_tokenizer({name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()})
    except LlmctlError as error:
        raise failure(out, str(error)) from error
    for text in PROBES:
        expected, ids = original.tokenizer.encode(text), back.encode(text) if back else None
        if expected != ids:
            raise failure(out, f"the text {text[:40]!r} has the ids {str(ids)[:60]}, not {expected[:12]}")
    return len(PROBES)


def rows_of(loaded: Loaded) -> list[Row]:
    """Return the rows to compare: prose, one token, and ids spread over the whole vocabulary; in two token types."""
    config = loaded.model.config
    longest = min(LONGEST_ROW, config.max_positions)
    rows = encode_rows(loaded, [(text,) for text in PROSE], longest) if loaded.tokenizer is not None else []
    spread = torch.linspace(0, config.vocab_size - 1, longest).long().tolist()
    if config.position_offset:  # RoBERTa's positions are counted without the padding token
        spread = [index for index in spread if index != config.pad_id]
    ids = [*(row.ids for row in rows), spread[:1], spread[: longest // 3], spread]
    return [Row(row, [0] * (len(row) // 2) + [1] * (len(row) - len(row) // 2)) for row in ids]


def with_tensors(model: LanguageModel, state: Mapping[str, Tensor]) -> LanguageModel:
    """Let a model use these tensors without copying them."""
    materialize_buffers(model)
    assign_tensors(model, state)
    return model.eval()


def rounded_model(original: Loaded, state: Mapping[str, Tensor], matrices: Mapping[str, Matrix]) -> LanguageModel:
    """Return our model with these matrices, whose linear layers round their inputs to 8 bits."""
    config = original.model.config
    decoded = {f"{name}.weight": matrix.decoded() for name, matrix in matrices.items()}
    is_tied = config.tie_embeddings and not config.n_labels
    tensors = {name: tensor for name, tensor in state.items() if not (is_tied and name == "lm_head.weight")} | decoded
    model = with_tensors(without_weights(config), tensors)
    rounded = dict(matrices)
    if is_tied and EMBEDDING in matrices:
        rounded[HEAD] = matrices[EMBEDDING]
    for name, matrix in rounded.items():
        module = model.get_submodule(name)
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(rounding(matrix))
    return model


def rounding(matrix: Matrix) -> Callable[..., tuple[Tensor]]:
    """Return a hook that rounds the inputs of a matrix which are no outliers, between a token's smallest and largest one."""
    inliers_I = matrix.inliers().bool()

    def hook(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        others = inputs[0] * inliers_I
        low, high = others.aminmax(dim=-1, keepdim=True)
        scale = ((high - low) / matrix.levels).clamp_(min=SMALLEST_SCALE)
        return (torch.where(inliers_I, ((others - low) / scale).round_() * scale + low, inputs[0]),)

    return hook


@torch.inference_mode()
def outlier_inputs(original: Loaded, state: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """Return the channels of the largest values that linear layers read on the rows of the verification."""
    model = with_tensors(without_weights(original.model.config), state)
    largest: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
            found_I = inputs[0].flatten(0, -2).abs().amax(dim=0)
            largest[name] = torch.maximum(largest[name], found_I) if name in largest else found_I

        return hook

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(watch(name))
    outputs_of(model, rows_of(original), bare=is_bare(original.artifact))
    return {
        name: found_I.topk(min(N_OUTLIERS, len(found_I) // 4)).indices.sort().values
        for name, found_I in largest.items()
    }


@torch.inference_mode()
def outputs_of(model: LanguageModel, rows: Sequence[Row], *, bare: bool) -> list[Tensor]:
    """Return our outputs for every row alone."""
    config = model.config
    compute: Callable[..., Tensor] = model.hidden if bare and not config.n_labels else model
    if config.n_labels:
        compute = model.classify if config.head == "text" else model.label_tokens
    has_types = config.n_token_types > 1
    return [
        compute(torch.tensor([row.ids]), token_types_BT=torch.tensor([row.types]) if has_types else None)[0]
        for row in rows
    ]


@contextmanager
def failing(out: Path) -> Iterator[None]:
    """Convert the errors of both packages about a file, which have no class in common."""
    import onnx
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    kinds = (errors.Fail, errors.InvalidArgument, errors.InvalidGraph, errors.InvalidProtobuf, errors.NotImplemented)
    try:
        yield
    except (
        *kinds,
        errors.RuntimeException,
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
    ) as error:
        raise failure(out, f"ONNX Runtime cannot run it: {error}") from error


def open_session(path: Path) -> Any:
    """Check the file, and load it into ONNX Runtime."""
    import onnx

    runtime = runtime_module()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = QUIET
    onnx.checker.check_model(path, full_check=True)
    return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(session: Any, rows: Sequence[Row], pad_id: int) -> list[Tensor]:
    """Return the outputs of a batch, those of padding left out."""
    import numpy as np

    longest = max(len(row.ids) for row in rows)

    def filled(lists: Sequence[Sequence[int]], value: int) -> "np.ndarray[Any, Any]":
        return np.array([[*part, *[value] * (longest - len(part))] for part in lists], dtype=np.int64)

    inputs = {
        IDS: filled([row.ids for row in rows], max(pad_id, 0)),
        MASK: filled([[1] * len(row.ids) for row in rows], 0),
        TYPES: filled([row.types for row in rows], 0),
    }
    names = {value.name for value in session.get_inputs()}
    outputs = [torch.from_numpy(output) for output in session.run(None, {key: inputs[key] for key in sorted(names)})]
    whole = torch.stack(outputs, dim=-1) if len(outputs) > 1 else outputs[0]
    has_tokens = whole.dim() == 3
    return [output[: len(row.ids)] if has_tokens else output for row, output in zip(rows, whole, strict=True)]


def check_constants(path: Path, out: Path, constants: "Mapping[str, np.ndarray[Any, Any]]") -> None:
    """Read the weights back and compare them bit for bit."""
    import onnx

    stored = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    for name, array in constants.items():
        if name not in stored or not (onnx.numpy_helper.to_array(stored[name]) == array).all():
            raise failure(out, f"`{name}` is not what was written")


def check_rounded(out: Path, exact: Sequence[Tensor], wanted: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    """Check that outputs are not farther from our model with the same rounding than it is from the original."""
    allowed = ROUNDED_BOUND * distance(wanted, exact) + BOUND * size(exact)
    if not distance(found, wanted) <= allowed:  # also true for NaN
        raise failure(
            out,
            f"outputs are {distance(found, wanted):.3g} from our model in 8 bits, which is {distance(wanted, exact):.3g} "
            "from the original (root mean squares)",
        )


def distance(outputs: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Return the root mean square of differences."""
    return size([a - b for a, b in zip(outputs, others, strict=True)])


def size(outputs: Sequence[Tensor]) -> float:
    """Return the root mean square of outputs."""
    return float(torch.cat([output.flatten() for output in outputs]).square().mean().sqrt())
