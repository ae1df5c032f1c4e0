"""Teachers and evaluation through transformers, against transformers and against our own core."""

import json
from pathlib import Path

import pytest
import torch

from llmctl.artifacts.load import load_model
from llmctl.cli import run
from llmctl.config import GenerateConfig
from llmctl.errors import ArtifactError, UnsupportedModelError
from llmctl.inference.generate import Prompt, generate
from tests.support.architectures import VARIANTS, build

transformers = pytest.importorskip("transformers", reason="pip install '.[interop]'")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore::UserWarning"),  # torch's own, of models that we do not run
]

UNREAD = {  # decoders that our core does not have, and which need their documents apart
    "qwen3.5": False,
    "lfm2": False,
    "mamba2": False,
    "falcon-h1": False,
    "gpt-oss": False,
    "gemma3n": True,
    "deepseek-v2": True,
    "minicpm3": True,
    "apertus": True,
}
SMALL = ["--set", "train.seq_len=32", "--set", "train.batch_size=4", "--seed", "1", "-q"]


def opened(name, tmp_path, **settings):
    variant = VARIANTS[name]
    published = build(variant._replace(settings=variant.settings | settings), tmp_path / name)
    return published.eval(), load_model(tmp_path / name, device="cpu", dtype="float32", backend="transformers")


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("name", [*UNREAD, "granite", "gemma2", "nanochat", "opt", "mpt", "cohere2"])
@torch.no_grad()
def test_packed_documents_have_the_logits_of_each_alone(name, tmp_path):
    published, loaded = opened(name, tmp_path)
    ids_BT = torch.randint(4, 290, (2, 40), generator=torch.Generator().manual_seed(1))
    documents_BT = torch.tensor([[1] * 17 + [2] * 15 + [3] * 8, [1] * 30 + [0] * 10])
    logits_BTV = loaded.model(ids_BT, documents_BT=documents_BT)
    for row, part in ((0, slice(0, 17)), (0, slice(17, 32)), (0, slice(32, 40)), (1, slice(0, 30))):
        close(logits_BTV[row, part], published(input_ids=ids_BT[row : row + 1, part], use_cache=False).logits[0])
    if name in UNREAD:
        assert loaded.model.packs == UNREAD[name]


@pytest.mark.parametrize("name", ["roformer", "bert", "modernbert"])
@torch.no_grad()
def test_padded_rows_of_an_encoder(name, tmp_path):
    published, loaded = opened(name, tmp_path)
    ids_BT = torch.randint(4, 290, (2, 20), generator=torch.Generator().manual_seed(1))
    documents_BT = torch.tensor([[1] * 20, [1] * 9 + [0] * 11])
    logits_BTV = loaded.model(ids_BT, documents_BT=documents_BT)
    close(logits_BTV[0], published(input_ids=ids_BT[:1]).logits[0])
    close(logits_BTV[1, :9], published(input_ids=ids_BT[1:, :9]).logits[0])


@pytest.mark.parametrize("name", ["bart", "marian", "umt5"])
@torch.no_grad()
def test_pairs(name, tmp_path):
    published, loaded = opened(name, tmp_path)
    ids_BT = torch.randint(4, 290, (2, 20), generator=torch.Generator().manual_seed(1))
    source_BS, target_BT = ids_BT[:, :12], ids_BT[:, 12:]
    documents_BS = torch.tensor([[1] * 12, [1] * 5 + [0] * 7])
    logits_BTV = loaded.model(
        source_BS,
        documents_BT=documents_BS,
        decoder_input_ids_BT=target_BT,
        decoder_documents_BT=torch.tensor([[1] * 8, [1] * 3 + [0] * 5]),
    )
    close(logits_BTV[0], published(input_ids=source_BS[:1], decoder_input_ids=target_BT[:1]).logits[0])
    close(logits_BTV[1, :3], published(input_ids=source_BS[1:, :5], decoder_input_ids=target_BT[1:, :3]).logits[0])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["qwen3.5", "lfm2", "mamba2", "falcon-h1", "gpt-oss", "llama", "umt5", "t5"])
def test_greedy_and_beam_search_are_those_of_transformers(name, beams, tmp_path):
    published, loaded = opened(name, tmp_path)
    prompts = [[5, 6, 7, 8, 9], [11, 12, 13], [21, 22, 23]]
    settings = GenerateConfig(max_tokens=8, temperature=0.0, beams=beams, batch_size=4)
    found = list(generate(loaded, [Prompt(n, ids) for n, ids in enumerate(prompts)], settings))
    for prompt, completion in zip(prompts, found, strict=True):
        with torch.no_grad():
            whole = published.generate(
                input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False, num_beams=beams, min_length=0
            )[0].tolist()
        new = whole[1:] if published.config.is_encoder_decoder else whole[len(prompt) :]
        ends = {published.config.eos_token_id, published.generation_config.eos_token_id}
        assert completion.ids == [index for index in new if index not in ends], prompt


@pytest.mark.parametrize("name", ["lfm2", "umt5"])
def test_a_vocabulary_that_lies_costs_no_memory(name, tmp_path):
    build(VARIANTS[name], tmp_path / name)
    path = tmp_path / name / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 10**9}))
    with pytest.raises(ArtifactError, match=r"describes \d+ parameters, and its files have \d+ bytes"):
        load_model(tmp_path / name, device="cpu", dtype="float32", backend="transformers")


def test_a_native_model_teaches_the_same_through_transformers(tmp_path, text_tokenizer, monkeypatch, capsys):
    """The same teacher, data and seed, with either backend: equal losses to rounding."""
    monkeypatch.chdir(tmp_path)
    made("gemma2", text_tokenizer)
    made("llama", text_tokenizer, "student")
    losses = []
    for backend in ("native", "transformers"):
        call(capsys, "distill", "base", "--teacher-backend", backend, "--student", "student",
             "-d", "text.txt", "--steps", 4, "-o", backend, "--set", "train.dtype=float32", *SMALL)  # fmt: skip
        losses.append(json.loads(Path(backend, "report.json").read_text())["models"])
    native, through = losses
    for side in ("teacher", "student"):
        assert native[side]["n_parameters"] == through[side]["n_parameters"]
        for figure in ("loss", "kl"):
            assert native[side][figure] == pytest.approx(through[side][figure], abs=1e-4), (side, figure)


@pytest.mark.parametrize("name", ["qwen3.5", "mamba2"])
def test_an_unread_decoder_teaches(name, tmp_path, text_tokenizer, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made(name, text_tokenizer)
    sizes = ["--student", "layers=2,ffn=32"]
    call(capsys, "distill", "base", *sizes, "-d", "text.txt", "--steps", 4, "-o", "live", *SMALL)
    report = json.loads(Path("live/report.json").read_text())["models"]
    assert report["teacher"]["kl"] < 1e-6 < report["student"]["kl"]
    for kind in ("sampled", "topk", "hidden"):
        call(
            capsys,
            "distill",
            "cache",
            "base",
            "-d",
            "text.txt",
            "--kind",
            kind,
            "--seq-len",
            32,
            "--seed",
            1,
            "-o",
            kind,
            "-q",
        )
        call(capsys, "distill", "base", *sizes, "-d", "text.txt", "--steps", 2, "-o", f"from-{kind}",
             "--set", f"teacher.cache={kind}", *SMALL)  # fmt: skip
    call(capsys, "distill", "base", *sizes, "--loss", "seq", "-d", "text.txt", "--steps", 2, "-o", "seq", *SMALL)
    table = json.loads(call(capsys, "evaluate", "base", "live", "-d", "text.txt", "--limit", 3, "--json"))
    assert table["models"][0]["figures"]["loss"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune", "base", "text.txt"], "does not read"),
        (["quantize", "base"], "does not read"),
        (["export", "base", "--to", "gguf"], "does not read"),
        (["distill", "base", "--student", "50%"], "only teaches"),
        (["distill", "base", "--student", "layers=2", "--init", "prune"], "cannot be pruned"),
        (["distill", "base", "--student", "layers=2", "--teacher-backend", "native"], "does not read"),
        (["distill", "base", "--student", "layers=2", "--teacher-dtype", "int8"], "int8"),
    ],
)
def test_what_an_unread_model_cannot_do_is_refused(arguments, message, tmp_path, text_tokenizer, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made("mamba2", text_tokenizer)
    assert run([*arguments, *(["-o", "out"] if arguments[0] != "finetune" else [])]) in (2, 4)
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not Path("out").exists()


def test_missing_weights_and_code_of_the_folder_are_refused(tmp_path, text_tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made("mamba2", text_tokenizer)
    from safetensors.torch import load_file, save_file

    state = load_file("base/model.safetensors")
    name = next(name for name in state if name.endswith("in_proj.weight"))
    save_file({key: value for key, value in state.items() if key != name}, "base/model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match="lacks weights"):
        load_model(Path("base"), backend="auto")
    config = json.loads(Path("base/config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "own.Own"},
    }
    Path("base/config.json").write_text(json.dumps(config))
    Path("base/own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UnsupportedModelError):
        load_model(Path("base"), backend="auto")


def made(name: str, tokenizer, folder: str = "base") -> None:
    """Write a random model and texts to learn from into the working directory."""
    Path("text.txt").write_text("\n\n".join(f"the cat {i} sat on the mat. 猫" * 3 for i in range(60)), encoding="utf-8")
    variant = VARIANTS[name]
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    build(variant._replace(settings=variant.settings | ids), Path(folder))
    for file, data in {**tokenizer.files(), **tokenizer.files_for("decoder")}.items():
        (Path(folder) / file).write_bytes(data)


def call(capsys, *arguments: object) -> str:
    capsys.readouterr()
    code = run([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out
