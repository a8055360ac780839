"""Copies between a device and host memory, beside what both of them compute: each direction on a stream of its own.

What goes down lands in page-locked memory of torch's own cache, what goes up leaves from it; both are small (a slice), so its
rounding to powers of two costs little. Where host and device are one nothing is copied and nothing waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Copies:
    """The two streams of a device; on a CPU there are none."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if device.type == "cuda" else None

    def now(self) -> Any:
        """Return the caller's stream, and the moment in it that `after` takes."""
        if self._streams is None:
            return None
        stream = torch.cuda.current_stream(self._device)
        return stream, stream.record_event()

    @contextmanager
    def after(self, moment: Any) -> Iterator[None]:
        """Inside, copies follow what the caller of `now` had asked the device for, not what it asks for meanwhile.

        In any thread; what is computed on the device is put into the stream of that caller.
        """
        if self._streams is None:
            yield
            return
        stream, event = moment
        for each in self._streams:
            each.wait_event(event)
        with torch.cuda.stream(stream):
            yield

    def down(self, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Begin to bring a tensor to where it is worked on (and keep it until `arrived`); as it is where it is there already."""
        if self._streams is None:
            return tensor.to(device=device, dtype=dtype)
        if tensor.device == device:
            # A gradient of FSDP2 is of another stream, which the caller's thread may have waiting for this one already.
            tensor.record_stream(torch.cuda.current_stream(self._device))
            return tensor.to(dtype=dtype)
        with torch.cuda.stream(self._streams[0]):
            return tensor.to(device=device, dtype=dtype, non_blocking=True)  # torch makes the target of such a copy page-locked

    def begun(self) -> Any:
        """Return the moment at which all that has gone down so far is there, for `arrived`."""
        return None if self._streams is None else self._streams[0].record_event()

    def arrived(self, begun: Any) -> None:
        """Wait for that moment."""
        if begun is not None:
            begun.synchronize()

    def fill(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Any:
        """Begin to copy each (target, source); sources on the host are page-locked or copied at once. Returns the moment at which
        they are there, for `arrived`. What was asked of the targets before is done first.
        """
        if self._streams is None:
            for target, source in pairs:
                target.copy_(source)
            return None
        self._streams[1].wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._streams[1]):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self._streams[1].record_event()

    def up(self, target: Tensor, value: Tensor) -> None:
        """Copy a value to a tensor of the device; from the host it is begun here, and there after `land`."""
        if self._streams is None or value.device == target.device:
            target.copy_(value)
            return
        staged = torch.empty(value.shape, dtype=target.dtype, pin_memory=True).copy_(value)
        with torch.cuda.stream(self._streams[1]):
            target.copy_(staged, non_blocking=True)

    def land(self) -> None:
        """Have the caller's stream wait for everything that has gone up."""
        if self._streams is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._streams[1])
