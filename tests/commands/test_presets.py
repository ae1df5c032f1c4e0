"""`llmctl presets`: one line or record per preset, and no torch."""

import json
import subprocess
import sys

from llmctl.cli import run
from llmctl.model.presets import PRESETS


def test_table_has_one_line_per_preset(capsys):
    assert run(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["name", "family", "parameters"]
    assert [line.split()[0] for line in lines[1:]] == list(PRESETS)
    big = next(line for line in lines if line.startswith("gpt3-175b"))
    assert big.split()[1:7] == ["decoder", "175B", "96", "12288", "96", "50257"]
    assert "arXiv:2005.14165" in big


def test_json_has_one_record_per_preset(capsys):
    assert run(["presets", "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["name"] for record in records] == list(PRESETS)
    gpt2 = next(record for record in records if record["name"] == "gpt2")
    assert gpt2["parameters"] == gpt2["published_parameters"] == 124_439_808


def test_listing_loads_no_torch():
    code = "import sys; from llmctl.cli import run; run(['presets']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
