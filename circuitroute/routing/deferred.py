"""Values that a GPU has checked, looked at when they have arrived.

Looking at a value of a step at once would make the host wait for the device, in every layer of every step. So the step
marks invalid rows on the device, one flag is sent to the host behind it, and the routing step after its arrival raises.
The rows themselves are harmless meanwhile: they choose no expert, in those rows alone, and have NaN gates.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in the work of a device."""

    def query(self) -> bool:
        """Whether it has been reached."""
        ...


class Sent(NamedTuple):
    """A flag on its way to the host."""

    flag: Tensor
    arrived: Event
    what: str


class Deferred:
    """Flags on their way, in order."""

    def __init__(self) -> None:
        self._sent: deque[Sent] = deque()

    def add(self, sent: Sent) -> None:
        """Another one."""
        self._sent.append(sent)

    def raise_found(self) -> None:
        """Raise what has arrived by now; never waits.

        Raises:
            ValueError: an earlier step had invalid rows. It is raised once.
        """
        while self._sent and self._sent[0].arrived.query():
            sent = self._sent.popleft()
            if bool(sent.flag):
                raise ValueError(
                    f"logits of an earlier routing step, {sent.what}, held NaN or infinite values that leave no "
                    "subset: those tokens chose no expert and have NaN gates. On a GPU a later step reports it; "
                    "validate_args=False goes on without"
                )


_ARRIVING = Deferred()


def watch(invalid_T: Tensor, what: str) -> None:
    """Report invalid rows of a step on a GPU later, and now those of earlier ones. Nothing happens in graph capture."""
    if torch.cuda.is_current_stream_capturing():
        return
    _ARRIVING.raise_found()
    flag = torch.empty((), dtype=torch.bool, pin_memory=True)
    flag.copy_(invalid_T.any(), non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    _ARRIVING.add(Sent(flag, arrived, what))
