"""`llmctl doctor`: what this machine offers, and whether several processes or hosts can train together."""

import os
import sys
from typing import Annotated

import typer

from llmctl.commands.common import command_app, note, result, result_json
from llmctl.commands.training import Master, Nnodes, NodeRank, Nproc

app = command_app()


@app.command()
def doctor(
    distributed: Annotated[bool, typer.Option("--distributed", help="Let all ranks meet and test their ways.")] = False,
    nproc: Nproc = 1,
    nnodes: Nnodes = 1,
    node_rank: NodeRank = 0,
    master: Master = "",
    compile_: Annotated[bool, typer.Option("--compile", help="Compile the decoding step for this processor.")] = False,
    timeout: Annotated[int, typer.Option(help="Seconds to wait for the master and the other ranks.")] = 60,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Check the installation, and with --distributed the network between ranks.

    With --compile, the machine's C++ compiler makes a decoding step of its own, once; generation is faster from then on.

    Examples:

      llmctl doctor

      llmctl doctor --compile

      llmctl doctor --distributed --nproc 2

      llmctl doctor --distributed --nnodes 2 --node-rank 0 --master 10.0.0.1:29500
    """
    from llmctl.distributed.launch import Layout
    from llmctl.errors import UsageError

    if timeout < 1:
        raise UsageError(f"`--timeout {timeout}` must be at least 1", "--timeout 60")
    is_parent = Layout(nproc, nnodes, node_rank, master).is_parent(os.environ)
    if not distributed and is_parent:
        raise UsageError("`--nproc` and `--nnodes` check several processes", "add --distributed")
    if is_parent:
        from llmctl.benchmarking.network_check import Group, start_ranks

        argv = ["doctor", "--distributed", "--timeout", str(timeout), *["--json"] * json]
        return start_ranks(Group(nproc, nnodes, node_rank, master), argv)
    if compile_:
        compile_step()
    return examine_ranks(timeout, json=json) if distributed else examine_here(json=json)


def compile_step() -> None:
    """Compile the decoding step and try it."""
    from llmctl.benchmarking.compiled_step_check import compile_and_check

    note("compiling the decoding step")
    note(f"compiled and right: {compile_and_check()}; LLMCTL_NATIVE=0 leaves it out")


def examine_here(*, json: bool) -> int:
    """Report on this machine."""
    from llmctl.benchmarking.doctor import examine_machine, render_machine
    from llmctl.kernels.product_table import render_survey, survey

    found = {**examine_machine(), "products": survey()}
    result_json(found) if json else result("\n".join([*render_machine(found), *render_survey(found["products"])]))
    return 0


def examine_ranks(timeout: int, *, json: bool) -> int:
    """Meet the other ranks and let the first one report.

    Raises: UsageError in all of them if the runs folder is not shared; LlmctlError if a sum is wrong.
    """
    from llmctl.benchmarking.network_check import examine_group, render_group
    from llmctl.errors import LlmctlError, UsageError

    runtime, found = examine_group(timeout)
    if runtime.is_main:
        result_json(found) if json else result("\n".join(render_group(found)))
    wrong = [name for name, is_right in found["sums_are_right"].items() if not is_right]
    problem: LlmctlError | None = None
    if wrong:
        problem = LlmctlError(f"sums over the processes are wrong in {', '.join(wrong)}", "check the network's driver")
    elif found["blind_ranks"]:
        problem = UsageError(
            "the runs folder is not shared by all hosts", "name a folder on a shared file system with -o or LLMCTL_RUNS"
        )
    if problem is not None and runtime.is_main:
        raise problem
    sys.stdout.flush()
    return problem.exit_code if problem else 0
