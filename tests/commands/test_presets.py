"""`llmctl presets`: one line or record per preset, and no torch."""

import json
import subprocess
import sys

from llmctl.cli import run
from llmctl.commands.presets import short
from llmctl.model.presets import PRESETS


def test_table_has_one_line_per_preset(capsys):
    assert run(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["name", "family", "parameters"]
    assert [line.split()[0] for line in lines[1:]] == list(PRESETS)
    big = next(line for line in lines if line.startswith("gpt3-175b"))
    assert big.split()[1:] == ["decoder", "175B", "96", "12288", "96", "arXiv:2005.14165"]
    pair = next(line for line in lines if line.startswith("transformer-base"))
    assert pair.split()[1:] == ["enc-dec", "63.1M", "12", "512", "8", "arXiv:1706.03762"]
    assert max(map(len, lines)) <= 80
    assert "Radford et al. 2019" in "\n".join(lines)


def test_json_has_one_record_per_preset(capsys):
    assert run(["presets", "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["name"] for record in records] == list(PRESETS)
    gpt2 = next(record for record in records if record["name"] == "gpt2")
    assert gpt2["parameters"] == gpt2["published_parameters"] == 124_439_808
    assert gpt2["source"].endswith("count of the released weights"), "in full, other than in the table"
    assert {record["family"] for record in records} == {"any", "decoder", "encoder", "encoder_decoder"}


def test_counts_are_shortened_to_three_figures():
    assert [short(n) for n in (999, 1016960, 31_500_000, 354_823_168, 174_604_259_328)] == [
        "999",
        "1.02M",
        "31.5M",
        "355M",
        "175B",
    ]


def test_listing_loads_no_torch():
    code = "import sys; from llmctl.cli import run; run(['presets']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
