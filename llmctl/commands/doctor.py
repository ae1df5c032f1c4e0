"""`llmctl doctor`: hardware and installation of this machine, and the network between processes or hosts."""

import os
import sys
from typing import Annotated

import typer

from llmctl.commands.common import command_app, note, result, result_json
from llmctl.commands.options import Master, Nnodes, NodeRank, Nproc

app = command_app()


@app.command()
def doctor(
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Connect all ranks and test the network between them.")
    ] = False,
    nproc: Nproc = 1,
    nnodes: Nnodes = 1,
    node_rank: NodeRank = 0,
    master: Master = "",
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile the decoding library for this processor again.")
    ] = False,
    timeout: Annotated[int, typer.Option(help="Seconds to wait for the other ranks.")] = 60,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Check the installation, and with --distributed the network between ranks.

    Examples:

      llmctl doctor

      llmctl doctor --compile

      llmctl doctor --distributed --nproc 2

      llmctl doctor --distributed --nnodes 2 --node-rank 0 --master 10.0.0.1:29500
    """
    from llmctl.distributed.launch import Layout
    from llmctl.errors import UsageError

    if timeout < 1:
        raise UsageError(f"`--timeout {timeout}` must be at least 1", "use `--timeout 60`")
    is_parent = Layout(nproc, nnodes, node_rank, master).is_parent(os.environ)
    if not distributed and is_parent:
        raise UsageError(f"`--nproc {nproc} --nnodes {nnodes}` needs `--distributed`", "add `--distributed`")
    if is_parent:
        from llmctl.benchmarking.network_check import Group, start_ranks

        argv = ["doctor", "--distributed", "--timeout", str(timeout), *["--json"] * json]
        return start_ranks(Group(nproc, nnodes, node_rank, master), argv)
    if compile_:
        compile_step()
    return examine_ranks(timeout, json=json) if distributed else examine_here(json=json)


def compile_step() -> None:
    """Compile the decoding library and check its results."""
    from llmctl.benchmarking.compiled_step_check import compile_and_check

    note("compiling the decoding library")
    note(f"compiled and checked: {compile_and_check()}; LLMCTL_NATIVE=0 disables it")


def examine_here(*, json: bool) -> int:
    """Report on this machine."""
    from llmctl.benchmarking.compiled_step_check import prepare_library
    from llmctl.benchmarking.doctor import examine_machine, render_machine
    from llmctl.kernels.product_table import render_survey, survey

    prepare_library(note)
    record = {**examine_machine(), "products": survey()}
    result_json(record) if json else result("\n".join([*render_machine(record), *render_survey(record["products"])]))
    return 0


def examine_ranks(timeout: int, *, json: bool) -> int:
    """Connect to the other ranks and report on rank 0.

    Raises: UsageError if the runs folder is not shared; LlmctlError if a sum over the processes is wrong.
    """
    from llmctl.benchmarking.network_check import examine_group, render_group
    from llmctl.errors import LlmctlError, UsageError

    runtime, record = examine_group(timeout)
    if runtime.is_main:
        result_json(record) if json else result("\n".join(render_group(record)))
    wrong = [name for name, is_right in record["sums_are_right"].items() if not is_right]
    problem: LlmctlError | None = None
    if wrong:
        problem = LlmctlError(f"sums over the processes are wrong in {', '.join(wrong)}", "check the network driver")
    elif record["blind_ranks"]:
        problem = UsageError(
            "the runs folder is not shared by all hosts", "use a folder on a shared file system (`-o` or LLMCTL_RUNS)"
        )
    if problem is not None and runtime.is_main:
        raise problem
    sys.stdout.flush()
    return problem.exit_code if problem else 0
