"""The hint after a failure names the command that began the run."""

import json

import pytest

from llmctl.distributed.failures import resume_hint


@pytest.mark.parametrize(
    ("record", "command"), [({"command": "distill"}, "distill"), (None, "pretrain"), ([], "pretrain")]
)
def test_the_hint_names_the_runs_own_command(tmp_path, record, command: str):
    assert resume_hint(tmp_path) == ""
    run = tmp_path / "0001-x"
    run.mkdir()
    (tmp_path / "run").write_text(f"{run}\n")
    if record is not None:
        (run / "run.json").write_text(json.dumps(record))
    assert f"llmctl {command} --resume {run}\n" in resume_hint(tmp_path)
