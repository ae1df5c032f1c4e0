"""Launchers as a user meets them: equal weights however ranks are started, exit codes, signals, restarts, refusals."""

import json
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest

from llmctl.distributed.failures import FINAL, culprit
from llmctl.distributed.launch import Layout
from llmctl.errors import UsageError
from llmctl.runs.folder import is_held
from tests.support.jobs import (
    LLMCTL,
    descendants,
    environment,
    finish,
    finish_two_ranks,
    pretrain,
    running,
    weights,
    write_text,
)
from tests.support.warm import WARM

STEPS = 30
# Raises in one rank when it is sent SIGUSR2; Python imports a module of this name as it begins.
RAISING = """
import os, signal
def raise_(*_):
    raise ValueError("a defect of rank 1")
if os.environ.get("RANK") == "1":
    signal.signal(signal.SIGUSR2, raise_)
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def job(text: Path, out: Path, *arguments: str, **settings: object) -> list[str]:
    return pretrain(text, "-o", str(out), "--deterministic", "--steps", str(STEPS), *arguments, **settings)


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory) -> str:
    """The weights of one process that nobody interrupts."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    finish([*WARM, *job(text, out)])
    return weights(out)


def error_lines(err: str) -> list[str]:
    """Return the report at the end: from the first error on, without blank lines."""
    lines = [line for line in err.splitlines() if line]
    first = next(index for index, line in enumerate(lines) if line.startswith("error:"))
    return lines[first:]


def test_nproc_gives_the_weights_of_one_process_and_one_result(text, undisturbed, tmp_path):
    out = tmp_path / "run"
    with running([*WARM, *job(text, out, "--nproc", "2", train__save_every=1000, train__eval_every=1000)]) as (run,):
        run.wait_for("step 5/")
        os.kill(run.process.pid, signal.SIGUSR1)  # saves and goes on
        assert run.end() == 0, run.err
    assert run.out == f"{out}\n"
    assert sum(line.startswith("2 processes on 1 host") for line in run.lines) == 1
    assert weights(out) == undisturbed
    saved = [int(path.name.removeprefix("step-")) for path in (out / "checkpoints").iterdir()]
    assert any(5 <= step < STEPS for step in saved), saved


def test_ranks_started_by_their_environment_give_the_same(text, undisturbed, tmp_path):
    out = tmp_path / "run"
    done = finish_two_ranks(job(text, out))
    assert done.out == f"{out}\n"
    assert weights(out) == undisturbed


def test_torchrun_gives_the_same(text, undisturbed, tmp_path):
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = finish([*torchrun, "-m", "llmctl", *job(text, out)])
    assert done.out == f"{out}\n"
    assert weights(out) == undisturbed


def test_a_killed_rank_ends_all_with_its_code_and_three_lines(text, tmp_path):
    out = tmp_path / "run"
    with running([*WARM, *job(text, out, "--nproc", "2", train__steps=100_000)]) as (run,):
        run.wait_for("step 5/")
        everyone = descendants(run.process.pid)
        os.kill(run.rank(1), signal.SIGKILL)
        assert run.end() == 137
    assert not [pid for pid in everyone if Path(f"/proc/{pid}").exists()]
    report = error_lines(run.err)
    assert report[0].startswith("error: rank 1 was killed by SIGKILL")
    assert report[1] == f"hint: resume from the last checkpoint with: llmctl pretrain --resume {out}"
    assert len(report) == 2


def test_a_rank_that_raises_is_the_one_that_is_reported(text, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(RAISING)
    paths = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    command = [*LLMCTL, *job(text, tmp_path / "run", "--nproc", "2", train__steps=100_000)]
    with running(command, env=environment(PYTHONPATH=paths)) as (run,):
        run.wait_for("step 5/")
        os.kill(run.rank(1), signal.SIGUSR2)
        assert run.end() == 1
    report = error_lines(run.err)
    assert report[0] == "error: rank 1: unexpected ValueError: a defect of rank 1"
    assert len(report) == 2


def test_a_killed_rank_is_started_again_with_the_same_weights(text, undisturbed, tmp_path):
    out = tmp_path / "run"
    with running([*WARM, *job(text, out, "--nproc", "2", "--max-restarts", "2")]) as (run,):
        run.wait_for("step 15/")
        os.kill(run.rank(1), signal.SIGKILL)
        assert run.end() == 0, run.err
    assert "rank 1 was killed by SIGKILL, possibly for lack of memory; restarting (1 restarts left)" in run.lines
    assert run.out == f"{out}\n"
    assert weights(out) == undisturbed


@pytest.mark.parametrize(
    ("number", "resumed_on"), [(signal.SIGTERM, 1), pytest.param(signal.SIGINT, 2, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_printed_command_goes_on(text, undisturbed, tmp_path, number, resumed_on: int):
    out = tmp_path / "run"
    with running([*WARM, *job(text, out, "--nproc", "2", train__save_every=1000)]) as (run,):
        run.wait_for("step 5/")
        for pid in (run.process.pid, *descendants(run.process.pid)):  # as a service manager does, all at once
            os.kill(pid, number)
        assert run.end() == 128 + number
    report = error_lines(run.err)
    assert report[0].startswith(f"error: stopped by {number.name} at step ")
    assert len(report) == 2
    command = shlex.split(report[1].removeprefix("hint: resume with: "))
    assert command[0] == "llmctl"
    finish([*WARM, *command[1:], "--nproc", str(resumed_on)])
    assert weights(out) == undisturbed


@pytest.mark.slow
def test_ranks_do_not_outlive_their_launcher(text, tmp_path):
    out = tmp_path / "run"
    with running([*WARM, *job(text, out, "--nproc", "2", train__steps=100_000)]) as (run,):
        run.wait_for("step 5/")
        os.kill(run.process.pid, signal.SIGKILL)
        assert run.end() == -signal.SIGKILL  # their standard error is closed with the last of them
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted", "saved, as after SIGTERM"
    assert not is_held(out)


@pytest.mark.slow
def test_what_nohup_ignores_stays_ignored(text, tmp_path):
    with running(["nohup", *LLMCTL, *job(text, tmp_path / "run", "--nproc", "2")]) as (run,):
        run.wait_for("step 5/")
        os.kill(run.process.pid, signal.SIGHUP)
        assert run.end() == 0, run.err


def test_an_error_that_would_come_again_is_not_restarted(text, tmp_path):
    command = job(text, tmp_path / "run", "--nproc", "2", "--max-restarts", "2", model__max_positions=8)
    done = finish([*LLMCTL, *command], code=2)
    assert "restarting" not in done.err
    # All processes find the same error; the one that ends first is reported.
    message = error_lines(done.err)[0].replace("rank 1: ", "")
    assert message == "error: `train.seq_len` 32 is longer than `model.max_positions` 8"
    assert len(error_lines(done.err)) == 2


@pytest.mark.parametrize(
    ("arguments", "extra", "part"),
    [
        (["--nproc", "0"], {}, "`--nproc 0` must be at least 1"),
        (["--nnodes", "2"], {}, "`--master ` must be HOST:PORT"),
        (["--nnodes", "2", "--node-rank", "2", "--master", "h:1"], {}, "`--node-rank 2` must be from 0 to 1"),
        (["--node-rank", "1"], {}, "`--node-rank 1` needs `--nnodes`"),
        (["--nproc", "2"], {"RANK": "0", "WORLD_SIZE": "2"}, "this process was already started by a launcher"),
        ([], {"RANK": "0"}, "variables `RANK` and `WORLD_SIZE` are incomplete"),
        ([], {"WORLD_SIZE": "2"}, "variables `RANK` and `WORLD_SIZE` are incomplete"),
        (["--nproc", "3", "--batch-size", "2"], {}, "`--batch-size` 2 is smaller than the number of processes, 3"),
        (["--nproc", "2", "-r", "-"], {}, "`-r -` can be read only once"),
    ],
)
def test_usage_errors_come_before_anything_is_started(text, tmp_path, arguments, extra, part: str):
    command = pretrain(text, "-o", str(tmp_path / "run"), *arguments)
    done = finish([*LLMCTL, *command], code=2, env=environment(**extra))
    assert part in error_lines(done.err)[0]
    assert "loading torch" not in done.err
    assert "starting" not in done.err
    assert not (tmp_path / "run").exists()


def test_deepspeed_is_refused_with_what_does_the_same(text, tmp_path):
    command = pretrain(text, "-o", str(tmp_path / "run"))
    done = finish([*LLMCTL, *command], code=2, env=environment(ACCELERATE_USE_DEEPSPEED="true"))
    assert "--parallel fsdp" in done.err
    assert not (tmp_path / "run").exists()


def test_one_launcher_per_host_of_a_job_step_is_fine():
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    assert Layout(nproc=4, nnodes=2, node_rank=1, master="n0:29500").is_parent(step)
    with pytest.raises(UsageError):
        Layout(nproc=4).is_parent(step)


def test_the_cause_is_neither_a_lost_peer_nor_a_stopped_one():
    from types import SimpleNamespace

    def end(code: int, timestamp: int) -> SimpleNamespace:
        return SimpleNamespace(exitcode=code, timestamp=timestamp)

    assert culprit({0: end(75, 1), 1: end(-9, 2), 2: end(-15, 3)})[0] == 1
    assert culprit({0: end(2, 2), 1: end(2, 1)})[0] == 0, "all found the same: the lowest speaks"
    assert culprit({0: end(75, 2), 1: end(75, 1)})[0] == 0
    assert {75, 137, 1} & FINAL == set(), "these are worth a restart"


ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]


@pytest.mark.parametrize("how", ["flags", pytest.param("config", marks=pytest.mark.slow)])
def test_accelerate_that_starts_one_process_of_two_is_refused(text, tmp_path, how: str):
    flags = ["--cpu", "--num_processes", "2"]
    if how == "config":
        (tmp_path / "config.yaml").write_text(
            "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_machines: 1\nnum_processes: 2\nuse_cpu: true\n"
        )
        flags = ["--config_file", str(tmp_path / "config.yaml")]
    done = finish([*ACCELERATE, *flags, "-m", "llmctl", *job(text, tmp_path / "run")], code=1)
    report = error_lines(done.err)
    assert report[0] == "error: `accelerate launch` was asked for 2 processes but started one"
    assert report[1].startswith("hint: use llmctl COMMAND --nproc 2")
    assert "returned non-zero exit status 2" in done.err  # accelerate turns it into 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_accelerate_trains_two_ranks(text, undisturbed, tmp_path):
    out = tmp_path / "run"
    flags = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    command = [*ACCELERATE, *flags, "--dynamo_backend", "no", "-m", "llmctl", *job(text, out)]
    done = finish(command, env=environment(ACCELERATE_USE_CPU="true"))
    assert done.out == f"{out}\n"
    assert "2 processes on 1 host" in done.err
    assert weights(out) == undisturbed


@pytest.mark.slow
def test_an_accelerate_config_file_is_honoured_where_a_cpu_can(text, tmp_path):
    out = tmp_path / "run"
    (tmp_path / "config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nmixed_precision: bf16\nnum_machines: 1\n"
        "num_processes: 2\nmachine_rank: 0\nfsdp_config:\n  fsdp_version: 2\n"
    )
    command = pretrain(text, "-o", str(out), "--steps", "4", train__dtype="auto")
    flags = ["--config_file", str(tmp_path / "config.yaml")]
    done = finish([*ACCELERATE, *flags, "-m", "llmctl", *command], env=environment(ACCELERATE_USE_CPU="true"))
    assert "2 processes on 1 host, fsdp" in done.err
    assert "clm in bfloat16 on cpu" in done.err
