"""Published architectures through the verbs: fine-tuned with LoRA, cut, quantized, generated from, and exported."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmctl.artifacts.load import load_model
from llmctl.cli import run
from tests.support.architectures import VARIANTS, build

transformers = pytest.importorskip("transformers", reason="pip install '.[interop]'")
peft = pytest.importorskip("peft", reason="pip install peft")

from tests.interop.test_adapters import IDS, close, ours  # noqa: E402  (it skips, too)

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's own
]

NAMES = [
    *("qwen2", "llama-3", "gemma2", "gemma3", "phi3", "phi4-mini", "granite", "olmo2", "smollm3", "modernbert-decoder"),
    *("gpt-neox", "falcon", "cohere2", "opt", "stablelm"),
    *("xlm-roberta", "distilbert", "mpnet", "modernbert", "deberta-v3-mlm", "roformer-small"),
    *("mbart", "m2m", "umt5"),
]
ALIKE = ("gemma2", "phi3", "olmo2", "smollm3", "cohere2", "stablelm", "distilbert", "roformer-small", "m2m")
"""Those whose blocks others have too: left out without `-m slow`."""
PAIRS = ("mbart", "m2m", "umt5")
ENCODERS = ("xlm-roberta", "distilbert", "mpnet", "modernbert", "deberta-v3-mlm", "roformer-small")
SMALL = ["--set", "train.seq_len=32", "--set", "train.batch_size=4", "--seed", "1", "-q"]


@pytest.fixture
def call(capsys, tmp_path, monkeypatch) -> Callable[..., str]:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("\n\n".join(f"the cat {i} sat on the mat. 猫" * 3 for i in range(60)), encoding="utf-8")
    Path("pairs.tsv").write_text("".join(f"the cat {i}\tcat {i} good\n" for i in range(60)), encoding="utf-8")

    def call(*arguments: object) -> str:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return call


def made(name: str, tokenizer) -> Path:
    """Write a random model of a variant with our tokenizer, whose ids its configuration has."""
    variant = VARIANTS[name]
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    if name in PAIRS:
        ids |= {"decoder_start_token_id": tokenizer.bos_id, "forced_bos_token_id": None}
    if name in ENCODERS:
        ids |= {"mask_token_id": tokenizer.mask_id}
    build(variant._replace(settings=variant.settings | ids), Path("base"))
    family = "encoder_decoder" if name in PAIRS else "encoder" if name in ENCODERS else "decoder"
    for file, data in {**tokenizer.files(), **tokenizer.files_for(family)}.items():
        (Path("base") / file).write_bytes(data)
    return Path("base")


@pytest.mark.parametrize("name", ["qwen3-moe", "olmoe", "granite-moe"])
def test_a_mixture_of_experts(name, call, text_tokenizer):
    """It is fine-tuned, teaches, is quantized, written and evaluated; it is not pruned."""
    base, architecture = made(name, text_tokenizer), VARIANTS[name].architecture
    call("finetune", base, "text.txt", "--task", "text", "--method", "lora", "--steps", 3, "-o", "lora", *SMALL)
    original = getattr(transformers, architecture).from_pretrained(base, dtype=torch.float32).eval()
    close(theirs(peft.PeftModel.from_pretrained(original, "lora").eval()), ours(load_model(Path("lora")).model))
    call("finetune", base, "text.txt", "--task", "text", "--steps", 3, "-o", "full", *SMALL)
    full = load_model(Path("full"))
    close(
        theirs(getattr(transformers, architecture).from_pretrained("full", dtype=torch.float32).eval()),
        ours(full.model),
    )
    sizes = ["--student", "layers=2", "--init", "random"]
    call("distill", base, *sizes, "-d", "text.txt", "--steps", 3, "-o", "student", *SMALL)
    for method in ("nearest", "awq-gptq", "guided"):
        call("quantize", base, "--bits", 4, "--method", method, "--calib", "text.txt", "-o", method, "-q")
    assert call("generate", "-m", "guided", "-n", 5, "-t", 0, "the cat", "--json")
    call("export", "full", "--to", "hf", "-o", "exported")
    reopened = getattr(transformers, architecture).from_pretrained("exported", dtype=torch.float32).eval()
    close(theirs(reopened), ours(full.model))
    call("evaluate", "guided", "-d", "text.txt", "--task", "text", "-q")
    assert run(["distill", str(base), "--student", "50%", "-d", "text.txt", "-o", "pruned", *SMALL]) == 2


@torch.no_grad()
def theirs(model: torch.nn.Module) -> torch.Tensor:
    inputs = {"decoder_input_ids": IDS[:, :5]} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **inputs).logits


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else []) for name in NAMES]
)
def test_every_verb(name, call, text_tokenizer):
    base, architecture = made(name, text_tokenizer), VARIANTS[name].architecture
    data, task = ("pairs.tsv", "translate") if name in PAIRS else ("text.txt", "text")
    call("finetune", base, data, "--task", task, "--method", "lora", "--steps", 3, "-o", "lora", *SMALL)
    adapted = load_model(Path("lora"))
    original = getattr(transformers, architecture).from_pretrained(base, dtype=torch.float32).eval()
    close(theirs(peft.PeftModel.from_pretrained(original, "lora").eval()), ours(adapted.model))
    call("finetune", base, data, "--task", task, "--steps", 3, "-o", "full", *SMALL)
    reopened = getattr(transformers, architecture).from_pretrained("full", dtype=torch.float32).eval()
    close(theirs(reopened), ours(load_model(Path("full")).model))
    given = ["--task", task] if name in PAIRS else []
    call("distill", base, "-d", data, *given, "--steps", 20, "-o", "student", *SMALL)
    report = json.loads(Path("student/report.json").read_text(encoding="utf-8"))
    assert report["models"]["student"]["n_parameters"] < 0.75 * report["models"]["teacher"]["n_parameters"]
    call("export", "student", "--to", "hf", "-o", "exported")
    written = json.loads(Path("exported/config.json").read_text(encoding="utf-8"))["architectures"][0]
    student = load_model(Path("student")).model
    if not written.startswith("Llmctl"):
        close(
            theirs(getattr(transformers, written).from_pretrained("exported", dtype=torch.float32).eval()),
            ours(student),
        )
    call("quantize", base, "--bits", 4, "--calib", data, *given, "-o", "int4", "-q")
    if name in ENCODERS:
        assert json.loads(call("fill", "-m", "int4", "the <mask> sat", "--json"))["masks"]
    else:
        assert call("generate", "-m", "int4", "-n", 5, "-t", 0, "the cat", "--json")
    call("evaluate", "student", "-d", data, *(given or ["--task", "mask" if name in ENCODERS else "text"]), "-q")
