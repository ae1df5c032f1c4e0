"""Find the model a command means, and load it.

Finding reads small JSON files only; torch is imported when weights are.
"""

import json
import os
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmctl.errors import ArtifactError, LlmctlError, NotFoundError, UsageError

if TYPE_CHECKING:
    from llmctl.config import ModelConfig
    from llmctl.formats.artifact import Artifact
    from llmctl.model.decode import Decoder
    from llmctl.model.transformer import LanguageModel
    from llmctl.tokenizer.base import Tokenizer

Ability = Literal["generate", "fill", "classify", "any"]
EVERY = ("decoder", "encoder", "encoder_decoder")
FAMILIES: dict[str, tuple[str, ...]] = {
    "generate": ("decoder", "encoder_decoder"),
    "fill": ("encoder",),
    "classify": EVERY,
    "any": EVERY,
}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
"""The files of which a model folder has one; the last makes it an adapter's."""
MAKE_ONE = {
    "generate": "make one in a minute: llmctl pretrain",
    "fill": "make one in a minute: llmctl pretrain --objective mlm",
    "classify": "llmctl finetune MODEL DATA --task classify makes one",
    "any": "make one in a minute: llmctl pretrain",
}


@dataclass(frozen=True)
class Found:
    """A model's place and why it was chosen."""

    path: Path
    why: str


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


def runs_folder() -> Path:
    """Return where runs live: `LLMCTL_RUNS`, else `runs/` of the nearest parent that has one, else `./runs`."""
    named = os.environ.get("LLMCTL_RUNS")
    if named:
        return Path(named)
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "runs").is_dir():
            return Path(os.path.relpath(folder / "runs"))
    return Path("runs")


def default_file() -> Path:
    """Return the file in which `llmctl use` keeps its choice."""
    base = os.environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "llmctl" / "default"


def resolve_model(name: str | None, *, able: Ability) -> Found:
    """Find the model to use: `name` > LLMCTL_MODEL > this directory > the newest finished run > `llmctl use`.

    A name is a file, a folder, a run's number or prefix, or `latest`. Only models able to do what is asked are
    taken from runs; one that was named is taken as it is.
    Raises: NotFoundError saying what was looked for and how to make one; UsageError for an empty name.
    """
    if name is not None:
        return Found(find_named(name, able), "named")
    variable = os.environ.get("LLMCTL_MODEL")
    if variable:
        return Found(find_named(variable, able), "LLMCTL_MODEL")
    if any(Path(weights).is_file() for weights in WEIGHTS):
        return Found(Path(), "in this directory")
    newest = newest_run(able)
    if newest is not None:
        return Found(newest, f"newest run able to {able}" if able != "any" else "newest run")
    chosen = default_file()
    if chosen.is_file():
        default = Path(chosen.read_text(encoding="utf-8").strip())
        if not default.exists():
            raise NotFoundError(f"the default model `{default}` is gone", "llmctl use MODEL chooses another")
        return Found(default, "set by `llmctl use`")
    raise nothing_found(able)


def find_named(name: str, able: Ability) -> Path:
    """Return the model that a name means.

    Raises: NotFoundError; UsageError for an empty name (a command substitution that failed) or an ambiguous one.
    """
    if not name:
        raise UsageError("the model's name is empty", "name a model folder, a .safetensors file, or a run in runs/")
    path = Path(name)
    if path.exists():
        return path
    folder = runs_folder()
    if name == "latest":
        newest = newest_run(able)
        if newest is None:
            raise nothing_found(able)
        return newest
    is_run = folder.is_dir() and path.parent in (Path(), folder)
    beginnings = (f"{int(name):04d}-", name) if name.isdecimal() else (path.name,)
    matches = (
        sorted(run for run in folder.iterdir() if run.name.startswith(beginnings) and is_model(run)) if is_run else []
    )
    if len(matches) == 1 or (matches and matches[0].name == path.name):
        return matches[0]
    if matches:
        names = ", ".join(f"`{run.name}`" for run in matches[:5])
        raise UsageError(f"`{name}` means more than one run: {names}", "write more of the name")
    raise NotFoundError(f"there is no model `{name}`", "name a model folder, a .safetensors file, or a run in runs/")


def is_model(folder: Path) -> bool:
    """Tell whether a folder holds weights; the link `latest` is not counted beside the run it means."""
    return not folder.is_symlink() and any((folder / weights).is_file() for weights in WEIGHTS)


def finished_runs() -> list[tuple[Path, dict[str, Any]]]:
    """Return the finished runs with their records, newest first."""
    runs = []
    for path in runs_folder().glob("[0-9][0-9][0-9][0-9]-*"):
        try:
            record = json.loads((path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and record.get("status") == "finished" and is_model(path):
            runs.append((path, record))
    return sorted(runs, key=lambda run: (str(run[1].get("finished", "")), run[0].name), reverse=True)


def newest_run(able: Ability) -> Path | None:
    """Return the newest finished run that can do what is asked."""
    return next(
        (path for path, record in finished_runs() if can(able, record.get("family"), bool(record.get("has_head")))),
        None,
    )


def can(able: Ability, family: Any, has_head: bool) -> bool:
    """Tell whether a model of a family, with a classification head or without, can do what is asked."""
    return family in FAMILIES[able] and (able == "any" or has_head == (able == "classify"))


def nothing_found(able: Ability) -> NotFoundError:
    """Return the error for no model at all, or none of the kind that is needed."""
    runs = finished_runs()
    if runs:
        path, record = runs[0]
        family, has_head = str(record.get("family", "unknown")), bool(record.get("has_head"))
        what = "a classifier" if has_head else a_model(family)
        return NotFoundError(
            f"no run can {able}: the newest, `{path}`, is {what}",
            f"`llmctl {use_of(family, has_head=has_head)}` uses it; or {MAKE_ONE[able]}",
        )
    return NotFoundError("no model yet", MAKE_ONE[able])


def announce(found: Found) -> str:
    """Return the one line that says which model is used, why, and how large and old it is."""
    facts = [found.why, parameters_in(found.path)]
    record = found.path / "run.json"
    if record.is_file():
        facts.append(ago(time.time() - record.stat().st_mtime))
    shown = found.path.resolve() if found.path == Path() else found.path
    return f"model: {shown} ({', '.join(fact for fact in facts if fact)})"


def parameters_in(path: Path) -> str:
    """Return how many numbers a model's weights have, as a person says it; nothing where loading will complain."""
    from llmctl.formats.adapter import is_adapter, read_adapter
    from llmctl.formats.artifact import check_kind, n_numbers, read_headers

    try:
        if is_adapter(path):
            return f"an adapter of `{read_adapter(path).base}`"
        check_kind(path)
        headers = read_headers(path)
    except (LlmctlError, OSError):
        return ""
    count = sum(n_numbers(header) for header in headers.values())
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit} parameters"
    return f"{count} parameters"


def ago(seconds: float) -> str:
    """Return an age as a person says it."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return "just now"


def a_model(family: str) -> str:
    """Return `a decoder model`, `an encoder model`."""
    kind = family.replace("_", "-")
    return f"{'an' if kind[:1] in 'aeiou' else 'a'} {kind} model"


def require_family(config: "ModelConfig", able: Ability, path: Path) -> None:
    """Refuse a model that cannot do what is asked.

    Raises: UsageError naming the command that can use it.
    """
    has_head = config.n_labels > 0
    if not can(able, config.family, has_head):
        what = "a classifier" if has_head else a_model(config.family)
        other = use_of(config.family, has_head=has_head)
        raise UsageError(f"`{path}` is {what}, which cannot {able}", f"`llmctl {other}` uses it; or {MAKE_ONE[able]}")


def use_of(family: str, *, has_head: bool) -> str:
    """Return the command that uses a model."""
    if has_head:
        return "classify"
    return "fill" if family == "encoder" else "generate"


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
    model.quantise(schemes)
    model.to_empty(device=place)
    materialise_buffers(model)
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


def materialise_buffers(model: "LanguageModel") -> None:
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
