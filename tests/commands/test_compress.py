"""`llmctl compress` as its users call it: a path, JSON, plans without a run, refusals, a missed gate."""

import json
from pathlib import Path

import pytest

TINY = [
    "--set", "train.seq_len=48", "--set", "data.split=blank", "--set", "train.device=cpu", "--set", "train.dtype=float32",
    "--set", "plan.calibration_rows=4", "--set", "plan.measure_tokens=512", "--set", "plan.refit_tokens=256",
    "--set", "plan.trials=1", "--steps", "2", "--batch-size", "8",
]  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(
        "\n\n".join(f"the good cat {i} sat on a bad mat. 猫坐在垫子上。" * 3 for i in range(120)), encoding="utf-8"
    )
    return tmp_path


def test_the_path_is_printed_and_the_report_goes_to_stderr(shell, models):
    status, out, err = shell(
        "compress", models["decoder"], "--to", "40kB", "-d", "text.txt", *TINY, "-o", "s.safetensors"
    )
    assert (status, out) == (0, "s.safetensors\n"), err
    assert Path("s.safetensors").stat().st_size <= 40_000
    assert "plan: " in err
    assert "next: llmctl generate -m s.safetensors" in err
    assert all(len(line) <= 79 for line in err.splitlines()[-8:])
    assert shell("generate", "-m", "s.safetensors", "the", "-n", "2", "-q")[0] == 0


def test_json_has_the_stages_and_the_bytes(shell, models):
    status, out, _ = shell(
        "compress", models["decoder"], "--to", "40kB", "-d", "text.txt", *TINY, "-o", "s", "--json", "-q"
    )
    report = json.loads(out)["report"]
    assert status == 0
    assert report["bytes"] == Path("s/model.safetensors").stat().st_size
    assert report["stages"][0] == {"stage": "original", "cost": 0.0, "perplexity": report["stages"][0]["perplexity"]}
    assert report["plan"]["predicted"] >= 0


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_dry_run_prints_plans_and_writes_nothing(shell, models, here, more: list[str]):
    status, out, err = shell("compress", models["decoder"], "--to", "40kB", "-d", "text.txt", *TINY, "--dry-run", *more)
    assert status == 0, err
    if more:
        assert json.loads(out)["plans"][0]["n_bytes"] <= 40_000
    else:
        assert out.splitlines()[0].split() == ["MB", "cost", "plan"]
        assert "#" in out
    assert sorted(path.name for path in here.iterdir()) == ["text.txt"]


def test_piped_text_is_read_once_and_kept(shell, models):
    text = Path("text.txt").read_bytes()
    Path("text.txt").unlink()
    status, out, err = shell(
        "compress", models["decoder"], "--to", "40kB", "-d", "-", *TINY, "-o", "s", "-q", stdin=text
    )
    assert (status, out) == (0, "s\n"), err


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        ([], "no size is given", 2),
        (["--to", "3kB", "-d", "text.txt"], "cannot be compressed to 0.003 MB", 2),
        (["--to", "40kB", "-d", "missing.txt"], "missing.txt", 3),
        (["--to", "40kB", "-d", "line.txt"], "the held-out text is too short: ", 2),
        (["--to", "40kB", "--for", "pdf"], "pdf", 2),
        (["--to", "40kB", "--for", "onnx"], "not exported as ONNX", 2),
        (["--to", "40kB", "--keep", "deepth"], "deepth", 2),
    ],
)
def test_refusals_name_the_value(shell, models, here, arguments: list[str], message: str, code: int):
    Path("line.txt").write_text("one line\n")
    status, out, err = shell("compress", models["decoder"], *arguments, "-o", "s")
    assert (status, out) == (code, "")
    assert message in err
    assert "hint: " in err
    assert not (here / "s").exists()
