"""Ending a run early: on request, or by Ctrl-C and SIGTERM."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from modsurg.training.distributed import any_of


@dataclass
class StopRequest:
    """Whether a run shall end after the present step.

    Attributes:
        wanted: The reason that was given in this process.
        reason: The reason on which all processes agree.
    """

    world: int = 1
    wanted: str = ""
    reason: str = ""

    def clear(self) -> None:
        """Forget what was wanted, for another run."""
        self.wanted = self.reason = ""

    def request(self, reason: str) -> None:
        """Ask for the end; several processes have to agree first."""
        self.wanted = reason
        if self.world == 1:
            self.reason = reason

    def agree(self, device: torch.device) -> None:
        """Stop if any process wants to; all of them call this together."""
        if self.world > 1 and any_of(bool(self.wanted), device):
            self.reason = self.wanted or "another process was stopped"


@contextlib.contextmanager
def stop_on_signals(stop: StopRequest) -> Iterator[None]:
    """Let the first Ctrl-C or SIGTERM end the run after the step; the second Ctrl-C ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    process = os.getpid()

    def handle(number: int, frame: object) -> None:
        if os.getpid() != process:  # a worker that was forked from here: only its parent says when it ends
            return
        if stop.reason and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.request(signal.Signals(number).name)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
