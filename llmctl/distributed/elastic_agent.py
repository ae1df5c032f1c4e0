"""torch's elastic agent, modified not to block on a lost host and not to restart after permanent errors.

The agents of all hosts communicate through one store. If the connection is lost, a request returns only when TCP gives
up, after about 15 minutes; until then the agent would notice neither signals nor the end of its own processes. So
requests run in threads, which are abandoned on a timeout.
"""

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from llmctl.distributed.failures import FINAL, culprit, describe, exit_code

FAREWELL_SECONDS = 3.0
"""How long an agent that ends tries to notify the others."""

MARGIN_SECONDS = 5.0
"""How much later than torch's own timeout ours fires: torch's error message is more specific."""


def ask(action: Callable[..., Any], *arguments: Any) -> "Future[Any]":
    """Start an action in its own thread."""
    executor = ThreadPoolExecutor(1)
    future = executor.submit(action, *arguments)
    executor.shutdown(wait=False)
    return future


def within(seconds: float, action: Callable[..., Any], *arguments: Any) -> Any:
    """Return an action's result, or stop waiting for it after a timeout; its thread keeps running.

    Raises: RendezvousTimeoutError on a timeout.
    """
    from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

    future = ask(action, *arguments)
    try:
        return future.result(seconds)
    except TimeoutError as error:
        if future.done():  # the action itself raised a TimeoutError
            raise
        raise RendezvousTimeoutError(f"no answer from the master within {seconds:.0f} s") from error


class Latest:
    """A non-blocking poll: returns the most recent result of a request, 0 before the first one."""

    def __init__(self, action: Callable[[], int]) -> None:
        self.action = action
        self.pending: Future[Any] | None = None
        self.answer = 0

    def __call__(self) -> int:
        """Return the latest result; start a new request if none is pending."""
        if self.pending is None:
            self.pending = ask(self.action)
        elif self.pending.done():
            done, self.pending = self.pending, None
            self.answer = done.result()
        return self.answer


def agent_class(original: Any, folder: Path, timeout_seconds: int) -> type[Any]:
    """Return a subclass of torch's agent that announces restarts, and does not restart after permanent errors."""

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
            # All hosts have joined. A stale count of waiting hosts would trigger another restart.
            worker_group.spec.rdzv_handler.num_nodes_waiting.answer = 0

        def _exit_barrier(self) -> None:
            within(timeout_seconds + MARGIN_SECONDS, super()._exit_barrier)

        def _monitor_workers(self, worker_group: Any) -> Any:
            result = super()._monitor_workers(worker_group)
            if result.failures and self._remaining_restarts > 0:
                rank, failure = culprit(result.failures)
                if exit_code(failure) in FINAL:
                    self._remaining_restarts = 0
                else:
                    reason = describe(rank, failure, folder).splitlines()[0].removeprefix("error: ")
                    sys.stderr.write(f"{reason}; restarting ({self._remaining_restarts - 1} restarts left)\n")
                    for path in folder.glob("error-*"):
                        path.unlink()
            return result

    return Agent
