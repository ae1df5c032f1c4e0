"""Recipes for schedulers run the command that there is, and agree with the launcher on which exit codes are final."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from llmctl.cli import run
from llmctl.config import TRAINING
from llmctl.distributed.failures import FINAL, LOST_PEER
from llmctl.recipe import load

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SAVED = 143
KUBERNETES = list(yaml.safe_load_all((RECIPES / "kubernetes" / "pretrain.yaml").read_text(encoding="utf-8")))
SKYPILOT = yaml.safe_load((RECIPES / "skypilot" / "pretrain.yaml").read_text(encoding="utf-8"))
SBATCH = RECIPES / "slurm" / "pretrain.sbatch"


@pytest.mark.parametrize("path", [p for name in TRAINING for p in sorted((RECIPES / name).glob("*.yaml"))], ids=str)
def test_recipes_of_a_command_are_its_own(path: Path):
    load(TRAINING[path.parent.name], recipe=str(path), environment={})
    head = path.read_text(encoding="utf-8").splitlines()[:2]
    assert [line.split(":")[0] for line in head] == ["# Makes", "# Run"]


def test_kubernetes_gives_up_where_the_launcher_does_and_goes_on_where_it_may():
    job = KUBERNETES[1]["spec"]
    rules = {rule["action"]: rule for rule in job["podFailurePolicy"]["rules"]}
    final = set(rules["FailJob"]["onExitCodes"]["values"])
    assert final == {2, 3, 4, 6, 7, 9}
    assert final <= FINAL
    assert rules["Count"]["onExitCodes"]["values"] == [LOST_PEER, SAVED]
    assert job["template"]["spec"]["restartPolicy"] == "Never", "podFailurePolicy asks for it"


def test_skypilot_recovers_the_same():
    recovery = SKYPILOT["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [LOST_PEER, SAVED]
    assert recovery["max_restarts_on_errors"] == 0


def test_the_commands_are_understood(capsys, tmp_path):
    (tmp_path / "text.txt").write_text("a text\n")
    args = KUBERNETES[1]["spec"]["template"]["spec"]["containers"][0]["args"]
    args = [{"/runs/corpus.txt": str(tmp_path / "text.txt"), "$(JOB_COMPLETION_INDEX)": "1"}.get(a, a) for a in args]
    assert run([*args, "--print-config"]) == 0
    assert "paths:" in capsys.readouterr().out
    flags = set(re.findall(r" (--[a-z-]+)", SKYPILOT["run"]))
    assert flags == {"--resume", "--nnodes", "--node-rank", "--nproc", "--master"} == set(args) & flags | {"--nproc"}


# What `srun` ends with, and what the script makes of it: queued again, or that code.
@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (130, True), (143, True)])
@pytest.mark.skipif(shutil.which("bash") is None, reason="a batch script needs bash")
def test_the_batch_script_queues_again_what_was_saved(tmp_path, code: int, requeued: bool):
    done = sbatch(tmp_path, code)
    assert done.returncode == 0
    assert (tmp_path / "requeued").exists() == requeued
    called = (tmp_path / "called").read_text()
    assert called == "--kill-on-bad-exit=0 llmctl pretrain --resume auto a b.txt -o run\n"


@pytest.mark.parametrize("code", [1, *sorted(FINAL - {129, 130, 143})])
@pytest.mark.skipif(shutil.which("bash") is None, reason="a batch script needs bash")
def test_the_batch_script_gives_up_on_errors(tmp_path, code: int):
    assert sbatch(tmp_path, code).returncode == code
    assert not (tmp_path / "requeued").exists()


def test_the_batch_script_gives_up_after_its_attempts(tmp_path):
    assert sbatch(tmp_path, 75, LLMCTL_MAX_ATTEMPTS="3", SLURM_RESTART_COUNT="2").returncode == 75
    assert not (tmp_path / "requeued").exists()


def sbatch(folder: Path, code: int, **extra: str) -> subprocess.CompletedProcess:
    """Run the batch script with Slurm's two commands played by scripts, `srun` ending with `code`."""
    for name, body in {
        "srun": f'echo "$@" > {folder}/called; exit {code}',
        "scontrol": f"touch {folder}/requeued",
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n0"} | extra
    command = ["bash", str(SBATCH), "a", "b.txt", "-o", "run"]
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=60)
