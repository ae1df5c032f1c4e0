"""Models of the Hugging Face Hub: taken from the cache, or downloaded from a server in this process, faults and all."""

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
from dataclasses import dataclass
from pathlib import Path

import pytest

from llmctl.artifacts.hub import Reference, label, named, parse, shown
from llmctl.formats.artifact import INDEX, WEIGHTS
from tests.support import warm
from tests.support.hub import Hub, Repository, folder_files, serving

NAME = "org/tiny"
COMMIT = Repository({"main": {}}).commit("main")
LIMIT_SECONDS = 60
"""Of a command: longer than any should take, shorter than the retries of huggingface_hub."""


@dataclass
class Ran:
    """What a command said."""

    code: int
    out: str
    err: str


def environment(home: Path, url: str) -> dict[str, str]:
    """Return an environment with a cache of its own, which huggingface_hub reads when it is imported."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings = {"HF_HOME": str(home / "hf"), "HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "XDG_DATA_HOME": str(home)}
    return plain | settings | {"NO_PROXY": "127.0.0.1,localhost"}


def llmctl(home: Path, *arguments: str, url: str = "http://127.0.0.1:1", **variables: str) -> Ran:
    """Run a command in `home`."""
    done = warm.run(arguments, cwd=home, env=environment(home, url) | variables, timeout=LIMIT_SECONDS)
    return Ran(done.returncode, done.stdout, done.stderr)


def generate(home: Path, model: str = NAME, **variables: str) -> Ran:
    return llmctl(home, "generate", "-m", model, "the good", "-n", "3", "--seed", "1", **variables)


def inspect(home: Path, model: str = NAME, **variables: str) -> Ran:
    """Read a model's header only, without torch."""
    return llmctl(home, "inspect", model, **variables)


def error(ran: Ran, code: int) -> str:
    """Return the error of a command that fails with this code, and prints nothing else."""
    assert ran.code == code, ran.err
    assert not ran.out
    assert "Traceback" not in ran.err
    assert ran.err.startswith("error: "), ran.err
    return ran.err


def blobs(home: Path) -> list[str]:
    """Return the names of the files in the cache, whole or not."""
    return sorted(path.name for path in (home / "hf").rglob("blobs/*"))


def cached(home: Path, name: str) -> bytes:
    """Return a file of the only snapshot in the cache."""
    (file,) = (home / "hf").rglob(f"snapshots/*/{name}")
    return file.read_bytes()


@pytest.fixture(scope="module")
def files(models) -> dict[str, bytes]:
    return folder_files(models["decoder"]) | {
        "pytorch_model.bin": b"\x80 a pickle",
        "onnx/model.onnx": b"x",
        "README.md": b"#",
    }


@pytest.fixture
def repository(files) -> Repository:
    return Repository({"main": files})


@pytest.fixture
def hub(repository):
    with serving({NAME: repository}) as hub:
        yield hub


def test_a_model_is_downloaded_once(hub: Hub, models, tmp_path):
    first = generate(tmp_path, url=hub.url)
    assert first.code == 0, first.err
    assert f"model: {NAME}@{COMMIT[:7]} (named, " in first.err
    assert first.out == generate(tmp_path, str(models["decoder"])).out
    taken = hub.downloaded()
    assert WEIGHTS in taken
    assert taken[-1] == "config.json"  # what makes it complete
    assert not {"pytorch_model.bin", "model.onnx", "README.md"} & set(taken)
    hub.requests.clear()
    assert generate(tmp_path, url=hub.url).out == first.out
    assert not hub.requests
    offline = generate(tmp_path, HF_HUB_OFFLINE="1")
    assert (offline.code, offline.out) == (0, first.out)
    assert generate(tmp_path, f"{NAME}@{COMMIT[:7]}").out == first.out
    assert "%" not in first.err  # no progress bar without a terminal


def test_a_revision_is_taken(hub: Hub, repository, teachers, tmp_path):
    repository.revisions["v2"] = folder_files(teachers["decoder"])
    ran = inspect(tmp_path, f"{NAME}@v2", url=hub.url)
    assert ran.code == 0, ran.err
    assert f"snapshots/{repository.commit('v2')}" in ran.out
    assert cached(tmp_path, WEIGHTS) == (teachers["decoder"] / WEIGHTS).read_bytes()
    for revision in ("v2", repository.commit("v2")):
        assert inspect(tmp_path, f"{NAME}@{revision}").out == ran.out
    missing = error(inspect(tmp_path, f"{NAME}@v3", url=hub.url), 3)
    assert "no revision `v3`" in missing
    error(inspect(tmp_path), 3)  # main was not downloaded


def test_shards_are_downloaded_by_their_index(hub: Hub, repository, models, tmp_path):
    from llmctl.formats.safetensors import read_tensors, write_safetensors

    tensors = read_tensors(models["decoder"] / WEIGHTS)
    names = sorted(tensors)
    parts = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    content = {name: data for name, data in repository.revisions["main"].items() if name != WEIGHTS}
    for file, part in parts.items():
        write_safetensors(tmp_path / file, {name: tensors[name] for name in part}, {})
        content[file] = (tmp_path / file).read_bytes()
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    content[INDEX] = json.dumps(index).encode()
    repository.revisions["main"] = content | {"model-00003-of-00003.safetensors": b"of an older index"}
    ran = inspect(tmp_path, url=hub.url)
    assert ran.code == 0, ran.err
    assert set(parts) <= set(hub.downloaded())
    assert "model-00003-of-00003.safetensors" not in hub.downloaded()
    assert inspect(tmp_path).out == ran.out
    next((tmp_path / "hf").rglob("snapshots/*/model-00002-of-00002.safetensors")).unlink()
    error(inspect(tmp_path), 3)  # no longer complete
    assert inspect(tmp_path, url=hub.url).out == ran.out


@pytest.mark.parametrize(
    ("fault", "code", "what"),
    [
        ("cut", 3, "the connection was lost"),
        ("short", 4, "arrived damaged: it has "),
        ("long", 4, "arrived damaged"),
        ("other", 4, "its SHA-256 is not the listed one"),
        ("500", 3, "answers 500"),
        ("outside", 3, "its hash is not one"),
    ],
)
def test_a_damaged_download_leaves_nothing(fault, code, what, hub: Hub, repository, models, tmp_path):
    repository.answers[WEIGHTS], repository.has_ranges = fault, False
    said = error(inspect(tmp_path, url=hub.url), code)
    assert f"`{WEIGHTS}` of `{NAME}`" in said
    assert what in said
    assert said.count("\n") == 3  # error, empty line, hint
    assert not list(tmp_path.parent.rglob("evil*"))
    assert not any(name.endswith(".incomplete") or len(name) == 64 for name in blobs(tmp_path))
    error(inspect(tmp_path), 3)
    repository.answers.clear()
    hub.requests.clear()
    assert inspect(tmp_path, url=hub.url).code == 0
    assert cached(tmp_path, WEIGHTS) == (models["decoder"] / WEIGHTS).read_bytes()
    assert hub.downloaded() == [WEIGHTS, "config.json"]


def test_an_interrupted_download_leaves_nothing(hub: Hub, repository, models, tmp_path):
    repository.answers[WEIGHTS] = "stall"
    with subprocess.Popen(
        [sys.executable, "-m", "llmctl", "inspect", NAME],
        cwd=tmp_path,
        env=environment(tmp_path, hub.url),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert hub.stalled.wait(LIMIT_SECONDS)
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.communicate(timeout=LIMIT_SECONDS)[1]
    assert process.returncode == 130
    hub.going_on.set()
    assert not any(name.endswith(".incomplete") or len(name) == 64 for name in blobs(tmp_path))
    error(inspect(tmp_path), 3)
    repository.answers.clear()
    assert inspect(tmp_path, url=hub.url).code == 0
    assert cached(tmp_path, WEIGHTS) == (models["decoder"] / WEIGHTS).read_bytes()


@pytest.mark.parametrize("option", [[], ["-q"]])
def test_progress_is_for_terminals(option, hub: Hub, tmp_path):
    """What a terminal shows of a download; with --quiet nothing."""
    main, side = pty.openpty()
    termios.tcsetwinsize(side, (24, 80))
    command = [*warm.WARM, "import", NAME, "-o", "out", *option]
    with os.fdopen(main, "rb", buffering=0) as screen:
        process = warm.Process(
            command, cwd=tmp_path, env=environment(tmp_path, hub.url), stdout=subprocess.PIPE, stderr=side
        )
        os.close(side)
        shown = b""
        with contextlib.suppress(OSError):  # what reading the screen of a process that has ended raises
            while part := screen.read(4096):
                shown += part
        with process.stdout:
            assert process.stdout.read() == "out\n"
        process.wait(LIMIT_SECONDS)
    assert (f"{WEIGHTS}:".encode() in shown) == (not option)
    assert b"\\u" not in shown  # no control sequences, which would be spelled out


def test_a_small_file_of_other_content_is_refused(hub: Hub, repository, tmp_path):
    repository.answers["config.json"] = "other"
    assert "`config.json` of `org/tiny` arrived damaged" in error(inspect(tmp_path, url=hub.url), 4)
    repository.answers.clear()
    assert inspect(tmp_path, url=hub.url).code == 0


@pytest.mark.parametrize("fault", ["moved", "cut once"])
def test_redirects_are_followed_and_a_lost_connection_is_resumed(fault, hub: Hub, repository, models, tmp_path):
    repository.answers = {WEIGHTS: fault}
    assert inspect(tmp_path, url=hub.url).code == 0
    assert cached(tmp_path, WEIGHTS) == (models["decoder"] / WEIGHTS).read_bytes()


def test_without_access(hub: Hub, repository, tmp_path):
    assert "no folder `org/none` here, and no such model on the Hub" in error(
        inspect(tmp_path, "org/none", url=hub.url), 3
    )
    repository.gated = True
    said = error(inspect(tmp_path, url=hub.url), 3)
    assert "is gated" in said
    assert "HF_TOKEN" in said
    repository.gated, repository.private = False, True
    assert "HF_TOKEN" in error(inspect(tmp_path, url=hub.url), 3)
    assert inspect(tmp_path, url=hub.url, HF_TOKEN="secret").code == 0


def test_pickles_are_refused_before_anything_is_downloaded(hub: Hub, repository, tmp_path):
    repository.revisions["main"] = {"config.json": b"{}", "pytorch_model.bin": b"\x80"}
    said = error(inspect(tmp_path, url=hub.url), 4)
    assert "`org/tiny/pytorch_model.bin` is a pickle" in said
    assert not hub.downloaded()
    repository.revisions["main"] = {"tiny-q4.gguf": b"GGUF"}
    assert "llmctl import tiny-q4.gguf" in error(inspect(tmp_path, url=hub.url), 4)
    repository.revisions["main"] = {"notes.md": b""}
    assert "no `model.safetensors`: it holds `notes.md`" in error(inspect(tmp_path, url=hub.url), 4)


def test_nothing_is_written_outside_the_cache(hub: Hub, repository, tmp_path):
    repository.listed = ("../../evil.safetensors", "/tmp/evil", "..", "a/../../tokenizer.json")
    (tmp_path / "work").mkdir()
    assert inspect(tmp_path, url=hub.url).code == 0
    assert not [request for request in hub.requests if "evil" in request]
    index = {"weight_map": {"a": "../../evil.safetensors"}}
    content = {name: data for name, data in repository.revisions["main"].items() if name != WEIGHTS}
    repository.revisions["v2"] = content | {INDEX: json.dumps(index).encode()}
    assert "no valid `weight_map`" in error(inspect(tmp_path, f"{NAME}@v2", url=hub.url), 4)
    assert not list(tmp_path.rglob("evil*"))


def unreachable(ran: Ran) -> str:
    said = error(ran, 3)
    assert "`org/tiny` is neither a folder here nor in the cache" in said
    assert f"hf download {NAME} --local-dir tiny" in said
    return said


def test_without_a_network(tmp_path):
    assert "cannot be reached" in unreachable(inspect(tmp_path))
    assert "HF_HUB_OFFLINE" in unreachable(inspect(tmp_path, HF_HUB_OFFLINE="1"))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert "does not answer within 2 s" in unreachable(inspect(tmp_path, url=url))
        assert "within 1 s" in unreachable(inspect(tmp_path, url=url, HF_HUB_ETAG_TIMEOUT="1"))
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("revision", ["main", "x" * 300])
def test_a_damaged_cache_is_none(revision, tmp_path):
    """A noted commit that is no text, and a revision that is longer than the name of a file may be."""
    refs = tmp_path / "hf" / "hub" / f"models--{NAME.replace('/', '--')}" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_bytes(b"\xff\xfe" * 1000)
    message = error(inspect(tmp_path, f"{NAME}@{revision}", HF_HUB_OFFLINE="1"), 3)
    assert f"`{NAME}" in message


def test_a_tokenizer_that_another_program_left_out_is_fetched(hub: Hub, repository, tmp_path):
    assert inspect(tmp_path, url=hub.url).code == 0
    for file in (tmp_path / "hf").rglob("snapshots/*/tokenizer*"):
        file.unlink()
    assert inspect(tmp_path).code == 0  # what is there has to do
    assert not list((tmp_path / "hf").rglob("snapshots/*/tokenizer*"))
    assert inspect(tmp_path, url=hub.url).code == 0
    assert cached(tmp_path, "tokenizer.json") == repository.revisions["main"]["tokenizer.json"]


def test_a_cached_file_that_was_damaged_is_reloaded(hub: Hub, repository, tmp_path):
    """Where a part is missing, all of the model is verified: what a full disk or a crash left behind, too."""
    assert inspect(tmp_path, url=hub.url).code == 0
    (weights,) = (tmp_path / "hf").rglob(f"snapshots/*/{WEIGHTS}")
    weights.resolve().write_bytes(weights.read_bytes()[:-10])
    (weights.parent / "config.json").unlink()
    assert f"`{WEIGHTS}` of `{NAME}` arrived damaged" in error(inspect(tmp_path, url=hub.url), 4)
    assert inspect(tmp_path, url=hub.url).code == 0
    assert cached(tmp_path, WEIGHTS) == repository.revisions["main"][WEIGHTS]


def test_a_name_below_a_folder_is_a_path(hub: Hub, tmp_path):
    (tmp_path / "org").mkdir()
    assert "model `org/tiny` does not exist" in error(inspect(tmp_path, url=hub.url), 3)
    assert "model `runs/1-x` does not exist" in error(inspect(tmp_path, "runs/1-x", url=hub.url), 3)
    assert "model `data/x.jsonl` does not exist" in error(inspect(tmp_path, "data/x.jsonl", url=hub.url), 3)
    assert not hub.requests


def test_an_adapter_and_its_base_are_downloaded(hub: Hub, tmp_path):
    (tmp_path / "chats.jsonl").write_text('{"prompt": "the good", "completion": "cat"}\n' * 20)
    settings = [part for text in ("train.device=cpu", "train.dtype=float32") for part in ("--set", text)]
    made = llmctl(
        tmp_path, "finetune", NAME, "chats.jsonl", "--method", "lora", "--steps", "2", "-q", *settings, url=hub.url
    )
    assert made.code == 0, made.err
    run = tmp_path / made.out.strip()
    assert run.name.endswith("-tiny")
    written = json.loads((run / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == (NAME, COMMIT)
    assert json.loads((run / "run.json").read_text())["summary"]["base"] == f"{NAME}@{COMMIT}"
    assert f"{NAME}@{COMMIT}" in (run / "README.md").read_text()
    # What is published is only the adapter.
    published = {name: (run / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    hub.repositories["org/adapter"] = Repository({"main": published})
    here = generate(tmp_path, str(run))
    (tmp_path / "elsewhere").mkdir()
    there = generate(tmp_path / "elsewhere", "org/adapter", url=hub.url)
    assert (there.code, there.out) == (0, here.out), there.err
    named_beside = generate(tmp_path / "elsewhere", NAME)
    assert named_beside.code == 3  # downloaded by its commit, not as `main`
    assert generate(tmp_path / "elsewhere", "org/adapter").out == here.out


def test_every_command_takes_such_a_name(hub: Hub, models, tmp_path):
    (tmp_path / "text.txt").write_text("the good cat sat on a bad mat.\n" * 40)
    (tmp_path / "recipe.yaml").write_text(f"model: {NAME}\n")
    imported = llmctl(tmp_path, "import", NAME, "-o", "here", url=hub.url)
    assert imported.out == "here\n", imported.err
    assert generate(tmp_path, "here").out == generate(tmp_path, str(models["decoder"])).out
    snapshot = str(tmp_path / "hf" / "hub" / "models--org--tiny" / "snapshots" / COMMIT)
    for command in (
        ["inspect", NAME],
        ["inspect", f"https://huggingface.co/{NAME}"],
        ["use", NAME],
        ["quantize", "-r", "recipe.yaml", "--print-config"],
        ["distill", "here", "--student", NAME, "--print-config"],
        ["distill", "here", "--set", f"teacher.more=[{NAME}]", "--print-config"],
        ["pretrain", "text.txt", "--model", NAME, "--print-config"],
    ):
        ran = llmctl(tmp_path, *command)
        assert ran.code == 0, (command, ran.err)
        assert snapshot in ran.out, command
    shutil.rmtree(tmp_path / "hf")
    assert generate(tmp_path, snapshot, url=hub.url).code == 0  # a recipe that was written before


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("HuggingFaceTB/SmolLM2-135M", Reference("HuggingFaceTB/SmolLM2-135M")),
        ("org/model@v1.0", Reference("org/model", "v1.0")),
        ("org/model@refs/pr/1", Reference("org/model", "refs/pr/1")),
        ("https://huggingface.co/org/model/", Reference("org/model")),
        (f"/x/models--org--model/snapshots/{COMMIT}", Reference("org/model", COMMIT)),
        ("https://huggingface.co/datasets/org", None),
        ("https://example.org/a", None),
        ("gpt2", None),
        ("a/b/c", None),
        ("../a", None),
        ("./a", None),
        ("/tmp/x", None),
        ("org/..", None),
        ("org/model@../x", None),
        ("org/model@", None),
        ("out/model.safetensors", None),
        ("data/train.jsonl", None),
        ("here/model", None),
        ("", None),
    ],
)
def test_names(name, meant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert parse(name) == meant


def test_a_folder_of_the_cache_is_named_by_its_repository(tmp_path):
    folder = tmp_path / "models--org--tiny" / "snapshots" / COMMIT
    assert (named(folder), shown(folder), label(folder)) == (f"{NAME}@{COMMIT}", f"{NAME}@{COMMIT[:7]}", "tiny")
    assert (named("a/b.safetensors"), shown(Path("a/b")), label("a/b.safetensors")) == ("a/b.safetensors", "a/b", "b")


def test_local_names_do_not_import_the_hub(models):
    code = (
        "import sys; from llmctl.cli import run; "
        f"assert run(['inspect', {str(models['decoder'])!r}]) == 0; assert 'huggingface_hub' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert not re.search(
        r"^(from|import) huggingface_hub", Path(sys.modules[Reference.__module__].__file__).read_text(), re.MULTILINE
    )
