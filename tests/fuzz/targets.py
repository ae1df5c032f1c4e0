"""What is fuzzed: for every kind of file that others make, small seeds, mutators by file, and the readers it goes to."""

import contextlib
import importlib.util
import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.mutate import Mutator

Files = dict[str, bytes]


@dataclass(frozen=True)
class Target:
    """A kind of file: how to make seeds in a folder, what changes which file (by suffix), and what reads the folder."""

    seeds: Callable[[Path], None]
    read: Callable[[Path], Any]
    mutators: Mapping[str, tuple[Mutator, ...]]
    after: Callable[[Files, random.Random], None] = lambda _files, _random: None
    weight: float = 1.0
    needs: str = ""

    @property
    def exists(self) -> bool:
        """Whether the library that it reads with is installed."""
        return not self.needs or importlib.util.find_spec(self.needs) is not None


JSON: tuple[Mutator, ...] = (mutate.json_text, mutate.json_text, mutate.json_text, mutate.damaged)
TEXT: tuple[Mutator, ...] = (mutate.text, mutate.text, mutate.damaged)
BYTES: tuple[Mutator, ...] = (mutate.damaged,)
HEADER: tuple[Mutator, ...] = (mutate.safetensors,)
OURS = ("llmctl.config", "llmctl.files", "llmctl.provenance", "llmctl.ranks", "llmctl.head", "made_of")
INNER: tuple[Mutator, ...] = (partial(mutate.safetensors, keys=OURS),)
SENTENCES = ["the good cat sat on a bad mat. 猫坐在垫子上。 User: Assistant: number 0123456789?\n"] * 40


# --- seeds --------------------------------------------------------------------------------------------------------------


def model_seeds(root: Path) -> None:
    """Write a model of every family, as folders and as single files."""
    from tests.support.tuning import write_models

    for name, path in write_models(root).items():
        (path / "model.safetensors").rename(path / "x.safetensors")
        from llmctl.formats.safetensors import read_tensors, write_safetensors

        tensors = {key: tensor.clone() for key, tensor in read_tensors(path / "x.safetensors").items()}
        write_safetensors(path / "model.safetensors", tensors, {"format": "pt"})  # so that config.json is read
        if name != "decoder":
            (path / "x.safetensors").unlink()
        (path / "tokenizer.json").unlink(missing_ok=True)


def single_seeds(root: Path) -> None:
    """Write single-file models."""
    from tests.support.tuning import write_models

    for name, path in write_models(root / "whole").items():
        (root / name).mkdir()
        shutil.copy(path / "model.safetensors", root / name / "x.safetensors")
    shutil.rmtree(root / "whole")


def quantized_seeds(root: Path) -> None:
    """Write quantized models in all forms."""
    from llmctl.quant.schemes import Scheme
    from tests.formats.test_quantization import quantized
    from tests.support.tuning import write_models

    paths = write_models(root / "whole")
    schemes = {
        "decoder": Scheme(4, 16),
        "bert": Scheme(3, 16, symmetric=False),
        "encoder": Scheme(8, 0, symmetric=True),
        "encoder_decoder": Scheme(5, 16, symmetric=False, scale_bits=8),
    }
    for family, scheme in schemes.items():
        plain_weights(quantized(paths[family], root / family, scheme))
    shutil.rmtree(root / "whole")


def plain_weights(folder: Path) -> None:
    """Keep of a model's folder only the configuration and the weights, without a header that holds both."""
    from llmctl.formats.safetensors import read_tensors, write_safetensors

    tensors = {name: tensor.clone() for name, tensor in read_tensors(folder / "model.safetensors").items()}
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def adapter_seeds(root: Path) -> None:
    """Write adapters of a model that lies inside them."""
    import torch

    from llmctl.artifacts.adapters import save_adapter
    from llmctl.formats.artifact import read_artifact
    from llmctl.model.lora import add_adapters
    from llmctl.model.transformer import LanguageModel
    from tests.support.tuning import write_models

    for name, path in write_models(root / "whole").items():
        folder = root / name
        folder.mkdir()
        shutil.copytree(path, folder / "base")
        artifact = read_artifact(folder / "base")
        model = LanguageModel(artifact.config)
        model.load_state_dict(artifact.state())
        torch.manual_seed(0)
        add_adapters(model, rank=2, alpha=4.0, targets=("q_proj", "v_proj"), dora=name == "bert")
        save_adapter(model, folder, base=artifact, provenance={})
    shutil.rmtree(root / "whole")


def text_files(root: Path, files: Mapping[str, str | bytes]) -> None:
    """Write one seed per file."""
    for number, (name, content) in enumerate(files.items()):
        folder = root / str(number)
        folder.mkdir()
        (folder / name.rpartition("/")[2]).write_bytes(content if isinstance(content, bytes) else content.encode())


def recipe_seeds(root: Path) -> None:
    """Dump the recipe of every command, and short ones."""
    from llmctl.config import TRAINING
    from llmctl.recipe import Resolved, dump

    recipes = {f"{name}/r.yaml": dump(Resolved(config(), {})) for name, config in TRAINING.items()}
    recipes["a/r.yaml"] = "model: tiny\ntrain: {steps: 10, seed: 0x1F}\noptim: &o {lr: 1e-3}\nx: *o\n"
    recipes["b/r.yaml"] = "a: &a [1, 2]\nb: &b [*a, *a, *a]\nc: {<<: {d: 2024-01-01}}\ne: !!binary aGk=\nf: 1:20\n"
    text_files(root, recipes)


ROWS: list[dict[str, Any]] = [
    {"text": "a good cat", "label": 1},
    {"text": ["a", "b"], "label": ["x", "y"], "score": 0.5},
    {"source": "a", "target": "b"},
    {"translation": {"source": "a", "target": "b"}},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
    {"instruction": "i", "input": "", "output": "o", "history": [["a", "b"]]},
    {"prompt": "p", "completion": "c"},
    {"question": "q", "choices": ["a", "b"], "answer": 1, "context": "c"},
    {"question": "q", "answers": {"text": ["a"], "answer_start": [1]}, "context": "c"},
    {"sentence1": "a", "sentence2": "b", "label": 2.5},
]
SQUAD = {
    "data": [{"title": "t", "paragraphs": [{"context": "c", "qas": [{"question": "q", "answers": [{"text": "a"}]}]}]}]
}


def jsonl_seeds(root: Path) -> None:
    """Write JSON lines and JSON in every schema."""
    one = {f"{n}/a.jsonl": "\n".join([json.dumps(row, ensure_ascii=False)] * 3) + "\n" for n, row in enumerate(ROWS)}
    text_files(root, one | {"s/a.json": json.dumps(SQUAD), "l/a.json": json.dumps(ROWS[:1] * 3), "n/a.json": "[1, 2]"})


def csv_seeds(root: Path) -> None:
    """Write tables with quotes and tabs."""
    text_files(
        root,
        {
            "a/a.csv": 'text,label\n"a, ""b""",1\n"two\nlines",0\n',
            "b/a.csv": "source,target\nä,b\n猫,d\n",
            "c/a.tsv": "text\tlabel\na\tx\nb\ty\n",
            "d/a.tsv": "source\ttarget\na\tb\n",
            "e/a.txt": "plain text\n\nof paragraphs\r\nand lines\n",
            "f/a.csv": '\ufeffquestion,choices,answer\n"q","[""a"",""b""]",a\n',
        },
    )


def parquet_seeds(root: Path) -> None:
    """Write parquet files with all kinds of pages."""
    import pyarrow as pa
    from pyarrow import parquet

    for number, row in enumerate(ROWS[:9]):
        for compression in ("none", "snappy"):
            folder = root / f"{number}-{compression}"
            folder.mkdir()
            parquet.write_table(pa.Table.from_pylist([row] * 5), folder / "a.parquet", compression=compression)


def gguf_seeds(root: Path) -> None:
    """Export models as GGUF in several types."""
    from llmctl.converting.export_gguf import export_gguf
    from tests.support.tuning import write_models

    whole = write_models(root / "whole")
    for kind in ("f32", "q8_0", "q4_0"):
        (root / kind).mkdir()
        export_gguf(whole["decoder"], root / kind / "x.gguf", kind=kind)
    shutil.rmtree(root / "whole")


def tokenizer_json_seeds(root: Path) -> None:
    """Write tokenizer.json of every kind of model and with many kinds of steps."""
    from tests.support.bpe import byte_level

    config = json.dumps(
        {"bos_token": "<|end|>", "eos_token": {"content": "<|end|>"}, "chat_template": "{{ messages }}"}
    )
    kinds: dict[str, dict[str, Any]] = {
        "bpe": {},
        "llama": {"pre": "llama-bpe"},
        "steps": {
            "normalizer": {"type": "Sequence", "normalizers": [replace_step, {"type": "NFKC"}, {"type": "Lowercase"}]}
        },
        "prepend": {
            "normalizer": {"type": "Prepend", "prepend": "▁"},
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
        },
        "metaspace": {
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}
        },
        "split": {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [split_step, {"type": "Digits", "individual_digits": True}],
            }
        },
    }
    for name, changes in kinds.items():
        folder = root / name
        folder.mkdir()
        content = byte_level(**changes)
        (folder / "tokenizer.json").write_bytes(content["tokenizer.json"])
        (folder / "tokenizer_config.json").write_text(config)
    for name, model in MODELS.items():
        content = json.loads(byte_level()["tokenizer.json"])
        content["model"], content["added_tokens"], content["pre_tokenizer"] = model, [], {"type": "Whitespace"}
        (root / name).mkdir()
        (root / name / "tokenizer.json").write_text(json.dumps(content))


replace_step = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
split_step = {"type": "Split", "pattern": {"Regex": r"\p{L}+|\s+(?!\S)"}, "behavior": "Isolated", "invert": False}
MODELS: dict[str, dict[str, Any]] = {
    "words": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "<unk>": 2}, "unk_token": "<unk>"},
    "pieces": {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {"[UNK]": 0, "a": 1, "##b": 2},
    },
    "unigram": {
        "type": "Unigram",
        "unk_id": 0,
        "vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -2.0]],
        "byte_fallback": False,
    },
}


def sentencepiece_seeds(root: Path) -> None:
    """Train tokenizers of every kind."""
    from llmctl.config import TokenizerConfig
    from llmctl.tokenizer.train import train_tokenizer

    for kind in ("bpe", "unigram"):
        tokenizer = train_tokenizer(SENTENCES, TokenizerConfig(vocab_size=330, n_sentinels=2, model_type=kind))
        (root / kind).mkdir()
        (root / kind / "tokenizer.model").write_bytes(tokenizer.files()["tokenizer.model"])


def vocabulary_seeds(root: Path) -> None:
    """Write vocab.json with merges.txt, and vocab.txt."""
    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "Ġ": 5, "Ġa": 6, "猫": 7}
    pairs = "#version: 0.2\na b\nĠ a\n"
    for name, files in {
        "gpt2": {"vocab.json": json.dumps(vocabulary), "merges.txt": pairs},
        "old": {"encoder.json": json.dumps(vocabulary), "vocab.bpe": pairs, "tokenizer_config.json": "{}"},
        "bert": {
            "vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n##b\nc\n",
            "tokenizer_config.json": '{"do_lower_case": false, "cls_token": "[CLS]"}',
        },
    }.items():
        (root / name).mkdir()
        for file, content in files.items():
            (root / name / file).write_text(content, encoding="utf-8")


def signal_seeds(root: Path) -> None:
    """Write teacher caches of every kind."""
    from tests.formats.test_teacher_signals import write

    for kind in ("sampled", "topk", "hidden"):
        (root / kind).mkdir()
        write(root / kind, kind)


def checkpoint_seeds(root: Path) -> None:
    """Write the checkpoints of a step by one process and by two."""
    import torch

    from llmctl.distributed.sharding import whole
    from llmctl.runs.checkpoint import Store
    from llmctl.training.state import State

    model = {"a": torch.full((3, 2), 1.0), "b": torch.arange(4, dtype=torch.bfloat16)}
    optimizer = {"adamw/a/exp_avg": torch.ones(3, 2), "adamw/a/step": torch.tensor(1.0)}
    state = State(step=1, total_steps=10, losses=[1.0, 2.0], before={"loss": 1.0}).to_dict()
    Store(root / "one").save(1, whole(model), whole(optimizer), state | {"recipe": {"train": {"steps": 3}}})


def shard_seeds(root: Path) -> None:
    """Write a corpus in one and in two parts."""
    from tests.data.test_shards import Part, write

    write(root / "one")
    for index in range(2):
        write(root / "two", part=Part(index, 2))


def template_seeds(root: Path) -> None:
    """Write chat templates, gentle and hostile ones."""
    from llmctl.data.chat_text import PLAIN_TEMPLATE

    sources = {
        "plain": PLAIN_TEMPLATE + " ",
        "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}",
        "macros": "{% macro f(x) %}[{{ x ~ 1 }}]{% endmacro %}{% set ns = namespace(n=0) %}"
        "{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ f(m.content | trim) }}{% endfor %}{{ ns.n }}",
        "doubling": "{% set ns = namespace(a=['x']) %}{% for i in range(40) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}"
        "{% if ns.a | string %}{% endif %}",
        "filters": "{{ messages | tojson(indent=2) | indent(4) | wordwrap(9) | center(99) | replace('a', 'b') | length }}",
        "marked": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    }
    text_files(root, {f"{name}/chat_template.jinja": source for name, source in sources.items()})


def run_seeds(root: Path) -> None:
    """Write run folders."""
    record = {
        "status": "finished",
        "command": "pretrain",
        "created": "2026-01-01T00:00:00+0000",
        "finished": "2026-01-01T00:01:00+0000",
        "objective": "clm",
        "seconds": 60.5,
        "family": "decoder",
        "summary": {"n_parameters": 10, "steps": 3, "tokens": 100, "after": {"loss": 1.5, "bits_per_byte": 2.0}},
        "environment": {"python": "3.11", "packages": {"torch": "2.11"}},
        "invocation": "llmctl pretrain",
    }
    lines = [
        {"kind": "train", "step": 1, "loss": 2.0, "lr": 0.1, "seconds": 1.0, "tokens": 10},
        {"kind": "eval", "step": 3, "loss": 1.5, "bits_per_byte": 2.0, "full": True},
        {"kind": "event", "step": 2, "event": "spike", "text": "a spike"},
    ]
    run = root / "one" / "0001-pretrain"
    (run / "checkpoints").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps(record))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "recipe.yaml").write_text("train:\n  steps: 3\n  seq_len: 8\n")


# --- readers ------------------------------------------------------------------------------------------------------------


def quietly(*actions: Callable[[], Any]) -> None:
    """Run all actions; raise the first error that is none of ours, else let the input count as refused."""
    from llmctl.errors import LlmctlError

    refused: LlmctlError | None = None
    for action in actions:
        try:
            action()
        except LlmctlError as error:
            refused = error
    if refused is not None:
        raise refused


def read_weights(folder: Path) -> None:
    """Read a safetensors file."""
    from llmctl.formats.safetensors import read_header, read_tensors

    for path in folder.glob("*.safetensors"):
        read_header(path)
        read_tensors(path)


def read_models(folder: Path) -> None:
    """Inspect and load every model in a folder."""
    import torch

    from llmctl.artifacts.load import load_model
    from llmctl.commands.inspect import lines
    from llmctl.formats.artifact import read_artifact
    from llmctl.formats.describe import describe

    def loaded(path: Path, *, packed: bool) -> None:
        model = load_model(path, device="cpu", dtype="float32", packed=packed)
        if model.model.config.family == "decoder" and not model.model.config.n_labels:
            with torch.inference_mode():
                model.model(torch.zeros((1, 3), dtype=torch.long))

    paths = (
        [folder, *folder.glob("x.safetensors")]
        if (folder / "model.safetensors").exists()
        else [folder / "x.safetensors"]
    )
    quietly(
        *(partial(lambda path: lines(describe(path)), path) for path in paths),
        *(partial(lambda path: read_artifact(path).packed_state(), path) for path in paths),
        *(partial(loaded, path, packed=packed) for path in paths[:1] for packed in (False, True)),
    )


def read_adapters(folder: Path) -> None:
    """Read an adapter and merge it into its base."""
    from llmctl.artifacts.with_adapters import read_model
    from llmctl.formats.describe import describe

    quietly(lambda: describe(folder), lambda: read_model(folder).state())


def read_recipes(folder: Path) -> None:
    """Load a recipe for every command, as a file and as a setting."""
    from llmctl.config import TRAINING
    from llmctl.recipe import dump, load

    path = folder / "r.yaml"
    text = path.read_text(errors="replace")
    quietly(
        *(
            partial(lambda config: dump(load(config, recipe=str(path), environment={})), config)
            for config in TRAINING.values()
        ),
        lambda: load(TRAINING["pretrain"], settings=[f"train.steps={text[:200]}"], environment={}),
    )


def read_data(folder: Path) -> None:
    """Read a data file in every way that a command could."""
    from llmctl.config import ColumnsConfig
    from llmctl.data.conversations import read_conversations
    from llmctl.data.examples import read_examples
    from llmctl.data.labels import labels_of
    from llmctl.data.pairs import read_pairs
    from llmctl.data.sources import read_documents
    from llmctl.tables.tasks import TASKS

    name = str(next(folder.iterdir()))

    def examples(task: str) -> None:
        rows = list(read_examples([name], task, ColumnsConfig()))
        if task in ("classify", "similarity"):
            labels = labels_of(rows)
            for row in rows:
                labels.encode(row)

    quietly(
        *(
            partial(lambda split: list(read_documents([name], split=split)), split)
            for split in ("file", "line", "blank")
        ),
        lambda: list(read_pairs([name])),
        lambda: list(read_conversations([name])),
        *(partial(examples, task) for task in TASKS if TASKS[task].reads == "table"),
    )


def read_gguf_file(folder: Path) -> None:
    """Read a GGUF file as import and inspect do."""
    from llmctl.converting.convert import read_gguf
    from llmctl.formats.describe import describe
    from llmctl.tokenizer.load import find_tokenizer

    def imported() -> None:
        files = read_gguf(folder / "x.gguf")[2]
        use(find_tokenizer(files))

    quietly(lambda: describe(folder / "x.gguf"), imported)


def use(tokenizer: Any) -> None:
    """Encode and decode with a tokenizer, and ask it all that a command asks."""
    if tokenizer is None:
        return
    texts = ["the cat sat", "", "  a\tb 猫 0123\n" * 3, "a" * 50, "<s> [UNK] ▁x"]
    ids = tokenizer.encode_batch(texts)
    for each in ids:
        tokenizer.decode(each)
        tokenizer.decode_bytes(each)
    tokenizer.encode_next("a b", after_special=False)
    tokenizer.token_bytes()
    tokenizer.special_tokens()
    tokenizer.files()


def read_tokenizer(folder: Path) -> None:
    """Load a tokenizer and use it, and the chat template in its config."""
    from llmctl.inference.chat_template import chat_template
    from llmctl.tokenizer.load import load_tokenizer

    tokenizer = load_tokenizer(folder)
    quietly(
        lambda: use(tokenizer),
        lambda: (
            chat_template(
                tokenizer, {path.name: path.read_bytes() for path in folder.iterdir()}, begins_with_bos=True
            ).specials
        ),
    )


def read_signals(folder: Path) -> None:
    """Open a teacher cache and read its rows."""
    from llmctl.formats.teacher_signals import SignalStore, check_begun, finished_labels

    def signals() -> None:
        store = SignalStore.open(folder)
        if store.kind == "hidden":
            store.head()
        if store.n_rows:
            store.signals([0, store.n_rows - 1])
            store.signals(list(range(min(store.n_rows, 50))))

    quietly(
        signals,
        lambda: finished_labels(folder, 0),
        lambda: check_begun(folder, {"kind": "topk", "identity": {"teacher": "x"}}),
    )


def read_checkpoints(folder: Path) -> None:
    """Open the newest checkpoint and take over all of it."""
    from llmctl.runs.checkpoint import Store
    from llmctl.training.saving import BUDGET, settings
    from llmctl.training.state import State

    saved, _ = Store(folder).load_newest()

    def take() -> None:
        State().take(saved.state)
        settings(saved.state.get("recipe"), *BUDGET)

    quietly(lambda: saved.tensors("model"), lambda: saved.tensors("optimizer"), take)


def read_shards(folder: Path) -> None:
    """Open a corpus and read all of it."""
    from llmctl.data.shards import ShardSet

    shards = ShardSet.open(folder)
    quietly(
        shards.verify,
        lambda: [shards.document(index) for index in range(shards.n_documents)],
        lambda: shards.read(0, shards.n_tokens),
        shards.content_sha256,
    )


def read_template(folder: Path) -> None:
    """Render a template."""
    from llmctl.data.chat_text import Template
    from llmctl.data.conversations import Message

    source = (folder / "chat_template.jinja").read_bytes().decode(errors="replace")
    template = Template(source)
    talk = [Message("user", "hello"), Message("assistant", "a\n猫"), Message("user", "x")]
    for asks in (False, True):
        template.render(talk, {"eos_token": "</s>", "bos_token": "<s>"}, add_generation_prompt=asks)


def read_runs(folder: Path) -> None:
    """List, show and compare runs."""
    import os

    from llmctl.artifacts.find import finished_runs
    from llmctl.commands.runs import fit_table, report, table_row
    from llmctl.runs.history import compare, in_full, list_runs

    os.environ["LLMCTL_RUNS"] = str(folder)
    runs, _ = list_runs()
    rows = [table_row(run.row()) for run in runs]
    if rows:
        fit_table(rows, 80)
    for run in runs:
        list(report(in_full(run)))
        json.dumps(compare(run, run))
    finished_runs()


# --- after a mutation ---------------------------------------------------------------------------------------------------


def sealed_signals(files: Files, random_: random.Random) -> None:
    """Write the right digests into the manifest of a teacher cache, most of the time: the digests hide the rest."""
    reseal(files, random_, "manifest.json", "files", lambda data: {"sha256": sha256(data), "bytes": len(data)})


def sealed_checkpoint(files: Files, random_: random.Random) -> None:
    """Write the right digests into a checkpoint's manifest, most of the time."""
    for name in [name for name in files if name.endswith("manifest.json")]:
        reseal(files, random_, name, "sha256", sha256)


def reseal(files: Files, random_: random.Random, name: str, key: str, entry: Callable[[bytes], Any]) -> None:
    """Replace the digests in a manifest by those of the files beside it."""
    if random_.random() < 0.1:
        return
    folder = name.rpartition("manifest.json")[0]
    with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError, RecursionError):
        manifest = json.loads(files[name])
        for file in manifest[key]:
            if folder + file in files:
                manifest[key][file] = entry(files[folder + file])
        files[name] = json.dumps(manifest).encode()


def sealed_shards(files: Files, random_: random.Random) -> None:
    """Write the right digests and counts into the manifests of a corpus, half of the time."""
    if random_.random() < 0.5:
        return
    for name in [name for name in files if name.endswith(".json")]:
        with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError, RecursionError):
            manifest = json.loads(files[name])
            for shard in manifest["shards"]:
                shard["sha256"] = sha256(files[shard["tokens"]])
            files[name] = json.dumps(manifest).encode()


def sha256(data: bytes) -> str:
    """Return the digest of bytes."""
    import hashlib

    return hashlib.sha256(data).hexdigest()


def walk(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


TARGETS: dict[str, Target] = {
    "safetensors": Target(single_seeds, read_weights, {".safetensors": HEADER}, weight=3),
    "model": Target(model_seeds, read_models, {"config.json": JSON, ".safetensors": HEADER, ".json": JSON}, weight=2),
    "single": Target(single_seeds, read_models, {".safetensors": INNER}, weight=2),
    "quantized": Target(quantized_seeds, read_models, {"config.json": JSON, ".safetensors": HEADER}, weight=2),
    "adapter": Target(
        adapter_seeds, read_adapters, {"adapter_config.json": JSON, "adapter_model.safetensors": INNER}, weight=2
    ),
    "recipe": Target(recipe_seeds, read_recipes, {".yaml": TEXT}, weight=1),
    "jsonl": Target(
        jsonl_seeds, read_data, {".jsonl": (mutate.lines_of_json, *TEXT), ".json": (*JSON, mutate.text)}, weight=3
    ),
    "csv": Target(csv_seeds, read_data, {"": TEXT}, weight=2),
    "parquet": Target(parquet_seeds, read_data, {".parquet": BYTES}, weight=2, needs="pyarrow"),
    "gguf": Target(gguf_seeds, read_gguf_file, {".gguf": BYTES}, weight=2, needs="gguf"),
    "tokenizer-json": Target(tokenizer_json_seeds, read_tokenizer, {".json": JSON}, weight=2, needs="tokenizers"),
    "sentencepiece": Target(sentencepiece_seeds, read_tokenizer, {".model": BYTES}, weight=2),
    "vocabulary": Target(vocabulary_seeds, read_tokenizer, {".json": JSON, "": TEXT}, weight=2, needs="tokenizers"),
    "signals": Target(signal_seeds, read_signals, {".json": JSON, ".safetensors": INNER}, sealed_signals),
    "checkpoint": Target(
        checkpoint_seeds, read_checkpoints, {".json": JSON, ".safetensors": HEADER}, sealed_checkpoint, weight=2
    ),
    "shards": Target(shard_seeds, read_shards, {".json": JSON, ".bin": BYTES}, sealed_shards, weight=2),
    "template": Target(template_seeds, read_template, {".jinja": TEXT}, weight=0.2),
    "runs": Target(run_seeds, read_runs, {".json": JSON, ".jsonl": (mutate.lines_of_json, *TEXT), ".yaml": TEXT}),
}
