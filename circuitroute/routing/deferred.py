"""Values that a GPU has checked, looked at when they have arrived.

Looking at a value of a step at once would make the host wait for the device, in every layer of every step. So the step
marks invalid rows on the device, the marks are sent to the host behind it, and the routing step after their arrival
raises.
The rows themselves are harmless meanwhile: they choose no expert, in those rows alone, and have NaN gates.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from circuitroute.inference.evidence import rows_text


class Event(Protocol):
    """A point in the work of a device."""

    def query(self) -> bool:
        """Whether it has been reached."""
        ...


class Sent(NamedTuple):
    """The marks of a step, [T] bool, on their way to the host."""

    invalid: Tensor
    arrived: Event


class Deferred:
    """Marks on their way, in order."""

    def __init__(self) -> None:
        self._sent: deque[tuple[Sent, str]] = deque()

    def add(self, sent: Sent, what: str) -> None:
        """Those of another step, of a constraint that ``what`` names."""
        self._sent.append((sent, what))

    def raise_found(self) -> None:
        """Raise what has arrived by now; never waits.

        Raises:
            ValueError: an earlier step had invalid rows. It is raised once.
        """
        while self._sent and self._sent[0][0].arrived.query():
            (invalid, _), what = self._sent.popleft()
            if bool(invalid.any()):
                raise ValueError(
                    f"logits of an earlier routing step, {what}, held NaN, or infinite values that leave no subset, in "
                    f"{rows_text(invalid)}: those tokens chose no expert and have NaN gates. On a GPU a later step "
                    "reports it; validate_args=False goes on without"
                )


_ARRIVING = Deferred()


def watch(invalid_T: Tensor, what: str) -> None:
    """Report invalid rows of a step on a GPU later, and now those of earlier ones. Nothing happens in graph capture."""
    sent = send(invalid_T)
    if sent is not None:
        _ARRIVING.raise_found()
        _ARRIVING.add(sent, what)


def send(invalid_T: Tensor) -> Sent | None:
    """On their way to the host, which does not wait; None where a graph is captured, which has no host."""
    if torch.cuda.is_current_stream_capturing():
        return None
    invalid = torch.empty(invalid_T.shape, dtype=torch.bool, device="cpu", pin_memory=True)
    invalid.copy_(invalid_T, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return Sent(invalid, arrived)
