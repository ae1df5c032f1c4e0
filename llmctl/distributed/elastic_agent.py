"""torch's elastic agent, without waiting for a host that is gone, and without restarts that are no use.

The agents of all hosts talk over one store. Where the way to it is cut, a question to it returns when TCP gives up, in
a quarter of an hour; meanwhile the agent would see neither a signal nor the end of its own processes. So questions are
asked by threads, which are left behind.
"""

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from llmctl.distributed.failures import FINAL, culprit, describe, exit_code

FAREWELL_SECONDS = 3.0
"""How long an agent tries to tell the others that it ends."""

MARGIN_SECONDS = 5.0
"""How much later than torch's own timeout ours strikes, whose message says less."""


def ask(action: Callable[..., Any], *arguments: Any) -> "Future[Any]":
    """Begin an action in a thread of its own."""
    executor = ThreadPoolExecutor(1)
    future = executor.submit(action, *arguments)
    executor.shutdown(wait=False)
    return future


def within(seconds: float, action: Callable[..., Any], *arguments: Any) -> Any:
    """Return what an action returns.

    Raises: RendezvousTimeoutError if it takes longer; it goes on in its thread.
    """
    from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

    future = ask(action, *arguments)
    try:
        return future.result(seconds)
    except TimeoutError as error:
        if future.done():
            raise
        raise RendezvousTimeoutError(f"no answer from the master within {seconds:.0f} s") from error


class Latest:
    """The newest answer to a question that is asked again and again, 0 until there is one; never waits."""

    def __init__(self, action: Callable[[], int]) -> None:
        self.action = action
        self.asked: Future[Any] | None = None
        self.answer = 0

    def __call__(self) -> int:
        """Return it, and ask again where the last question is answered."""
        if self.asked is None:
            self.asked = ask(self.action)
        elif self.asked.done():
            asked, self.asked = self.asked, None
            self.answer = asked.result()
        return self.answer


def agent_class(original: Any, folder: Path, timeout_seconds: int) -> type[Any]:
    """Return torch's agent with a line about every restart, and none after errors that would come again."""

    class Agent(original):  # type: ignore[misc]
        _remaining_restarts: int

        def __init__(self, spec: Any, **options: Any) -> None:
            handler = spec.rdzv_handler
            handler.num_nodes_waiting = Latest(handler.num_nodes_waiting)
            shutdown = handler.shutdown
            handler.shutdown = lambda: wait([ask(shutdown)], FAREWELL_SECONDS)
            super().__init__(spec=spec, **options)

        def _rendezvous(self, worker_group: Any) -> None:
            within(timeout_seconds + MARGIN_SECONDS, super()._rendezvous, worker_group)
            worker_group.spec.rdzv_handler.num_nodes_waiting.answer = 0  # they have come

        def _exit_barrier(self) -> None:
            within(timeout_seconds + MARGIN_SECONDS, super()._exit_barrier)

        def _monitor_workers(self, worker_group: Any) -> Any:
            result = super()._monitor_workers(worker_group)
            if result.failures and self._remaining_restarts > 0:
                rank, failure = culprit(result.failures)
                if exit_code(failure) in FINAL:
                    self._remaining_restarts = 0
                else:
                    what = describe(rank, failure, folder).splitlines()[0].removeprefix("error: ")
                    sys.stderr.write(f"{what}; starting again ({self._remaining_restarts - 1} restarts left)\n")
                    for path in folder.glob("error-*"):
                        path.unlink()
            return result

    return Agent
