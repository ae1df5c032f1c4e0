"""Export an encoder as an ONNX file in a Hugging Face folder: write it aside, verify it, and only then move it there.

The folder has the layout of `optimum`, sentence-transformers and transformers.js: the model's small files, and the graph in
`onnx/`, where a float32 and an 8-bit file may stand side by side.
"""

import math
import secrets
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmctl.artifacts.load import Loaded, fitting_tokenizer, is_bare, without_weights
from llmctl.artifacts.with_adapters import read_model
from llmctl.config import ModelConfig
from llmctl.converting.onnx_check import N_OUTLIERS, outlier_inputs, prove, rounded_model, runtime_module
from llmctl.errors import ArtifactError, OutputError, UsageError
from llmctl.families.native import NATIVE
from llmctl.families.table import family_for
from llmctl.files import atomic_path, discard, sync, writing
from llmctl.formats.artifact import CONFIG, INDEX, WEIGHTS, Artifact
from llmctl.formats.artifact import FILES as SMALL_FILES
from llmctl.formats.artifact_write import refuse_overwrite, small_files
from llmctl.formats.onnx.encoder import Encoder, obstacle_in
from llmctl.formats.onnx.graph import MOST_BYTES, OPSET, Graph, model_of, onnx_module, save
from llmctl.formats.onnx.weights import EMBEDDING, HEAD, SCHEME, Float32, Int8, Matrix, grid_for_pairs, levels_for
from llmctl.formats.quantization import PARTS, fits_bytes, is_inside, packable_modules
from llmctl.model.parameters import parameter_shapes
from llmctl.model.shapes import complete
from llmctl.quant.grid import Codes, encode, whole_range
from llmctl.quant.weight import unpacked

if TYPE_CHECKING:
    from torch import Tensor

    from llmctl.model.transformer import LanguageModel

FOLDER = "onnx"
FILES = {"float32": "model.onnx", "int8": "model_quantized.onnx"}
"""Kind -> the name by which optimum and transformers.js look for it."""
TOKENIZER = "tokenizer.json"


def export_onnx(
    source: Path, out: Path | None, *, int8: bool = False, force: bool = False, most_bytes: int = MOST_BYTES
) -> dict[str, Any]:
    """Write an encoder with its head as ONNX, verify it with ONNX Runtime, and return a record of both.

    int8: weights, and the inputs of products when they run, in 8 bits; a model that is quantized to 8 bits keeps its codes.
    out: a folder, which may have the model already; defaults to NAME-onnx in the current directory. most_bytes: a larger
    model keeps its tensors in a second file. What fails verification is not written.
    Raises: ArtifactError for a model that is no encoder, or a failed verification; MissingExtraError; OutputError; errors
    of reading.
    """
    artifact = as_published(read_model(source))
    if obstacle := obstacle_in(artifact.config):
        raise ArtifactError(
            f"`{source}` {obstacle}, which is not exported as ONNX",
            "what is exported: encoders, with or without a head; --to gguf takes decoders, --to hf every model",
        )
    tokenizer = fitting_tokenizer(artifact)
    onnx_module()
    runtime_module()
    whole = source.resolve()
    out = out or Path(f"{whole.stem if whole.is_file() else whole.name}-onnx")
    kind = "int8" if int8 else "float32"
    file = f"{FOLDER}/{FILES[kind]}"
    state = artifact.state()
    texts = small_files(artifact.config, artifact.stored_state(), artifact.files)
    check_folder(out, file, texts, force=force)
    check_numbers(state, source)
    of_another = is_of_another(out, texts)
    original = Loaded(without_weights(artifact.config), tokenizer, artifact)
    matrices = matrices_of(original, state) if int8 else {}
    with staged(out) as folder:
        for name, data in texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        (folder / FOLDER).mkdir()
        graph = graph_of(artifact, state, matrices)
        written = save(model_of(graph, artifact.architecture), folder / file, graph.n_bytes, most=most_bytes)
        proof = prove(folder / file, out / file, original, state, matrices, graph.constants)
        n_bytes = sum(path.stat().st_size for path in written)
    remove_stale(out, [path.name for path in written], texts, of_another=of_another)
    return {
        "path": str(out),
        "to": "onnx",
        "file": str(out / file),
        "type": kind,
        "bytes": n_bytes,
        "parameters": original.model.n_parameters,
        "opset": OPSET,
        "inputs": list(graph.inputs),
        "outputs": list(graph.outputs),
        "missing": missing(artifact, texts),
        "proof": proof.record(),
    }


def int8_bytes(config: ModelConfig) -> int:
    """Return the bytes of a model's tensors in an 8-bit file: codes, scales, and outliers and others in float32."""
    modules, total = packable_modules(config), 0
    tied = config.tie_embeddings and not config.n_labels
    for name, shape in parameter_shapes(complete(config)).items():
        module, n_weights = name.removesuffix(".weight"), math.prod(shape)
        if module == HEAD and tied:
            continue
        if module not in modules or not (is_inside(module) or module in (EMBEDDING, HEAD)):
            total += 4 * n_weights
            continue
        n_outliers = min(N_OUTLIERS, shape[1] // 4) if is_inside(module) else 0
        total += n_weights + 4 * shape[0] * (1 + n_outliers)
    return total


def overhead_bytes(source: Path) -> int:
    """Return the bytes of a model's 8-bit file that are not those of `int8_bytes`: its graph."""
    with tempfile.TemporaryDirectory() as folder:
        return int(export_onnx(source, Path(folder) / "whole", int8=True)["bytes"]) - int8_bytes(
            read_model(source).config
        )


def rounded_for_onnx(source: Path) -> "LanguageModel":
    """Return a model as its 8-bit file computes: with these codes, and inputs of products in 8 bits."""
    artifact = as_published(read_model(source))
    state = artifact.state()
    original = Loaded(without_weights(artifact.config), fitting_tokenizer(artifact), artifact)
    return rounded_model(original, state, matrices_of(original, state))


def as_published(artifact: Artifact) -> Artifact:
    """Return a quantized model under the architecture of its family, which its packed weights are not stored as."""
    if not artifact.schemes:
        return artifact
    config = replace(artifact.config, architecture="")
    return replace(artifact, config=config, architecture=family_for(complete(config)).architecture)


def graph_of(artifact: Artifact, state: "Mapping[str, Tensor]", matrices: Mapping[str, Matrix]) -> Graph:
    """Return the graph of a model, with weights in 8 bits if there are any."""
    config = complete(artifact.config)
    tied = config.tie_embeddings and not config.n_labels
    weights = Int8(state, matrices, tied=tied) if matrices else Float32(state, tied=tied)
    return Encoder(config, weights, bare=is_bare(artifact)).build()


def matrices_of(original: Loaded, state: "Mapping[str, Tensor]") -> dict[str, Matrix]:
    """Return the matrices to write in 8 bits: those of the layers, the table of tokens, and an untied head over it.

    Codes that a model has are kept, if they have 8 bits and one scale per output.
    """
    import torch

    artifact, config = original.artifact, original.model.config
    packed = artifact.packed_state() if artifact.schemes else {}
    shapes = packable_modules(config)
    names = [name for name in shapes if is_inside(name) or name in (EMBEDDING, HEAD)]
    outliers = outlier_inputs(original, state, [name for name in names if is_inside(name)])
    matrices: dict[str, Matrix] = {}
    for name in names:
        weight_OI = state[f"{name}.weight"]
        outliers_K = outliers.get(first_reader(name, shapes), torch.empty(0, dtype=torch.int64))
        codes = own_codes(artifact, packed, name, shapes[name])
        if codes is None:
            inner_OI = weight_OI.clone()
            inner_OI[:, outliers_K] = 0
            is_only_read = name == EMBEDDING and (is_bare(artifact) or config.n_labels > 0 or not config.tie_embeddings)
            grid = whole_range(inner_OI, SCHEME) if is_only_read else grid_for_pairs(inner_OI)
            codes = Codes(encode(inner_OI, grid, SCHEME), grid)
        codes.codes_OI[:, outliers_K] = SCHEME.middle
        matrices[name] = Matrix(codes, outliers_K, weight_OI[:, outliers_K], levels_for(codes))
    levels: dict[str, int] = {}
    for name, matrix in matrices.items():
        first = first_reader(name, shapes)
        levels[first] = min(levels.get(first, SCHEME.levels), matrix.levels)
    return {name: replace(matrix, levels=levels[first_reader(name, shapes)]) for name, matrix in matrices.items()}


def own_codes(artifact: Artifact, packed: "Mapping[str, Tensor]", name: str, shape: tuple[int, ...]) -> Codes | None:
    """Return the codes that a matrix has, if they have 8 bits and one scale per output."""
    own = artifact.schemes.get(name)
    if own is None or not fits_bytes(own):
        return None
    parts = {part: packed[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in packed}
    n_out, n_in = shape
    return unpacked(parts, own, n_out, n_in)


def first_reader(name: str, names: Collection[str]) -> str:
    """Return the first of the linear layers with the same input, which is rounded once for all.

    DeBERTa's queries and keys also read the distances, which values do not.
    """
    layer, _, part = name.rpartition(".")
    first = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(part, part)
    return f"{layer}.{first}" if f"{layer}.{first}" in names else name


def check_folder(out: Path, file: str, texts: Mapping[str, bytes], *, force: bool) -> None:
    """Check that nothing is overwritten without `force`; the model's small files may be there already.

    Raises: OutputError.
    """
    if out.suffix in (".onnx", ".safetensors", ".gguf"):
        raise UsageError(f"`--to onnx` writes a folder, but `{out}` is the name of a file", "use `-o FOLDER`")
    refuse_overwrite(out, exists=False, force=force)
    weights = next((name for name in (WEIGHTS, INDEX) if (out / name).exists()), None)
    if weights is not None and is_of_another(out, texts):
        raise OutputError(f"`{out}` holds another model (`{weights}`)", "choose another folder with -o")
    for name in (file, *texts):
        path = out / name
        is_same = name in texts and path.is_file() and path.read_bytes() == texts[name]
        if (path.exists() or path.is_symlink()) and not is_same and not force:
            raise OutputError(
                f"`{out}` already exists and contains `{name}`", "choose another path with -o, or replace it with -f"
            )


def check_numbers(state: "Mapping[str, Tensor]", source: Path) -> None:
    """Refuse weights that are not finite.

    Raises: ArtifactError naming the tensor.
    """
    for name, tensor in state.items():
        if not bool(tensor.isfinite().all()):
            raise ArtifactError(f"`{name}` of `{source}` has weights that are not finite", "import the model again")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out`, or whose files move into it one by one if it exists."""
    if not out.exists():
        with atomic_path(out) as temporary:
            temporary.mkdir()
            yield temporary
            synced(temporary)
        return
    temporary = out / f".{secrets.token_hex(4)}.tmp"
    with writing(out):
        try:
            temporary.mkdir()
            yield temporary
            # The graph last, after the tensors that it may name: until then the folder is usable as it was.
            for path in sorted(
                synced(temporary), key=lambda path: (path.parent.name == FOLDER, path.suffix == ".onnx")
            ):
                target = out / path.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
        finally:
            discard(temporary)


def synced(folder: Path) -> list[Path]:
    """Fsync all files of a folder, and return them."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        sync(path)
    return files


def is_of_another(out: Path, texts: Mapping[str, bytes]) -> bool:
    """Tell whether a folder has small files of a model that are not these."""
    there = [name for name in {*SMALL_FILES, CONFIG} if (out / name).is_file()]
    return any(name not in texts or (out / name).read_bytes() != texts[name] for name in there)


def remove_stale(out: Path, written: Collection[str], texts: Mapping[str, bytes], *, of_another: bool) -> None:
    """Remove what a replaced file leaves behind: its tensors beside it, and all that is another model's."""
    own = {name.removesuffix("_data") for name in written}
    with writing(out):
        for name in FILES.values():
            for path in (out / FOLDER / name, out / FOLDER / f"{name}_data"):
                if path.name not in written and (of_another or name in own):
                    path.unlink(missing_ok=True)
        for name in set(SMALL_FILES) - set(texts) if of_another else ():
            (out / name).unlink(missing_ok=True)


def missing(artifact: Artifact, texts: Mapping[str, bytes]) -> list[str]:
    """Return which of the other programs cannot open the folder, and why."""
    reasons = []
    if family_for(complete(artifact.config)) is NATIVE:
        reasons.append(f"transformers, optimum and transformers.js do not know the architecture in `{CONFIG}`")
    elif TOKENIZER not in texts:
        reasons.append(f"transformers.js needs `{TOKENIZER}`, which is not among the files of this model")
    return reasons


def report(record: dict[str, Any]) -> list[str]:
    """Return the lines that report what was written and verified."""
    proof = record["proof"]
    what = "our model" if proof["cosine"] is None else "our model with the same rounding"
    lines = [f"note: {reason}" for reason in record["missing"]]
    equal = f"the token ids of {proof['texts_equal']} texts are as expected, " if proof["texts_equal"] else ""
    lines.append(
        f"read back in ONNX Runtime: {equal}outputs of {proof['rows']} padded texts within {proof['difference']:.1g} of "
        f"{what} (relative to the largest)"
    )
    if proof["cosine"] is not None:
        lines.append(f"compared with the original: outputs with a cosine of at least {proof['cosine']:.4f}")
    made = f"{record['type']}, opset {record['opset']}, {record['bytes'] / 1e6:.1f} MB"
    return [*lines, f"{record['file']}: {made}; inputs {', '.join(record['inputs'])}"]
