"""How values are stored in fewer bits, and what is lost.

| form | bytes per value | a value x comes back as                                                        |
|------|-----------------|---------------------------------------------------------------------------------|
| fp32 | its own         | x (whatever dtype it has)                                                       |
| bf16 | 2               | one of the two bfloat16 around x: relative error under 2^-7                     |
| int8 | 1 + 4 / 256     | one of the two codes around x: relative error under 1/8                        |

int8 keeps, for each block of 256 values, the largest magnitude A in float32, and for each value the byte of a small float in
units of A: three bits of mantissa, and above them an exponent that ends at A. A block without negative values has no sign and
255 codes from A down to 1.25 * 2^-32 A (a second moment has its square root to 6%, over a range of 60,000), any other block 127
of either sign down to 1.25 * 2^-16 A. Zero is itself. Values below the range: in a block without negative ones they become its
lowest code (so a denominator never vanishes), else zero or the lowest code. A linear scale would lose everything below A / 127,
and Adam divides by it.

The choice between the two neighbours is random with the odds that make the mean right: an average that moves by a thousandth
a step moves in the mean; rounded to the nearest it would stand still, in bfloat16 too. (Dettmers et al., 8-bit Optimizers via
Block-wise Quantization, arXiv:2110.02861, round to nearest on a scale with a few bits of exponent.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256
"""Values that share one scale."""
_CHUNK = 1 << 18
"""Values that are coded at a time on a CPU: what a dozen operations work on stays in its cache."""
_CUT = 20
"""Bits of a float32's mantissa that a code does without."""
_ONE = 127 << 3
"""The exponent and the kept mantissa of 1.0."""
_LOWEST = 1.25 * 2.0**-16
"""What the lowest code of a block with negative values stands for, in units of A."""


@dataclass(frozen=True)
class Form:
    """A way to store the values of a tensor as bytes; `name` is that of `optimizer_state` in the plan."""

    name: str

    def nbytes(self, count: int, dtype: torch.dtype) -> int:
        """Bytes that `count` values of `dtype` take."""
        if self.name == "int8":
            return count + 4 * -(-count // BLOCK)
        return count * (2 if self.name == "bf16" else dtype.itemsize)

    def view(self, memory: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Return the values [count] in place where they are stored as they are, else None."""
        return memory.view(dtype) if self.name == "fp32" else None

    def decode(self, memory: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        """Return the `count` values in `memory` (uint8, of `nbytes`), as a new tensor of `dtype` on the same device."""
        if self.name == "fp32":
            return memory.view(dtype).clone()
        if self.name == "bf16":
            return memory.view(torch.bfloat16).to(dtype)
        values, levels = torch.empty(count, dtype=dtype, device=memory.device), _levels(memory.device)
        for part in _chunks(count, memory.device):
            _decode_int8(*_parts(memory, count, part), levels, values[part])
        return values

    def encode(self, values: Tensor, memory: Tensor, generator: torch.Generator) -> None:
        """Store `values` [count] into `memory`; `generator` (of their device) decides the rounding."""
        if self.name == "fp32":
            memory.view(values.dtype).copy_(values)
        elif self.name == "bf16":
            for part in _chunks(len(values), values.device):
                memory.view(torch.bfloat16)[part] = stochastic_bf16(values[part].float(), generator)
        else:
            for part in _chunks(len(values), values.device):
                _encode_int8(values[part].float(), *_parts(memory, len(values), part), generator)


def stochastic_bf16(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return float32 `values` as bfloat16, rounded up or down at random so that the mean is right."""
    bits = values.contiguous().view(torch.int32)
    noise = _noise(bits.numel(), bits.device, generator).view(bits.shape)
    # Infinities and NaN have all exponent bits set: the carry can't leave them.
    return noise.add_(bits).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)


def remainder(values: Tensor, rounded: Tensor) -> Tensor:
    """Return what bfloat16 `rounded` lacks of `values`, as bfloat16 rounded towards zero: with it they have 16 bits and not 8.

    Towards zero, so that rounding the sum gives `rounded` again.
    """
    left = values.float() - rounded.float()
    return left.view(torch.int32).bitwise_and(-(1 << 16)).view(torch.float32).to(torch.bfloat16)


def _top(positive: Tensor) -> Tensor:
    """The code of A, which masks the bits of a magnitude too, by block (int32)."""
    return torch.where(positive, 255, 127).to(torch.int32)


def _noise(count: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Return random numbers [count] from 0 to 2^16 - 1 (int32), four for each draw of 64 bits."""
    drawn = torch.empty(-(-count // 4), dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    return drawn.view(torch.int16)[:count].to(torch.int32).bitwise_and_(0xFFFF)


def _chunks(count: int, device: torch.device) -> list[slice]:
    size = _CHUNK if device.type == "cpu" else max(1, count)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _parts(memory: Tensor, count: int, part: slice) -> tuple[Tensor, Tensor]:
    """Of some of `count` values: the blocks' largest magnitudes (negative for a block that has no negative value), the codes."""
    scales = 4 * -(-count // BLOCK)
    blocks = slice(part.start // BLOCK, -(-part.stop // BLOCK))
    return memory[:scales].view(torch.float32)[blocks], memory[scales:][part]


def _blocks(values: Tensor) -> Tensor:
    missing = -len(values) % BLOCK
    return (torch.nn.functional.pad(values, (0, missing)) if missing else values).view(-1, BLOCK)


def _levels(device: torch.device) -> Tensor:
    """What each code stands for in units of A: [512], first with signs, then of blocks without negative values."""
    code = torch.arange(256, dtype=torch.int32, device=device).repeat(2, 1)
    top = _top(torch.arange(2, device=device)[:, None] > 0)  # made there: a tensor from the host would wait for the device
    level = code & top
    size = ((level - top + _ONE) << _CUT).view(torch.float32)
    return torch.where(level == 0, 0.0, torch.where(code > top, -size, size)).view(-1)


def _decode_int8(largest: Tensor, codes: Tensor, levels: Tensor, values: Tensor) -> None:
    largest = largest[:, None]
    places = _blocks(codes).to(torch.int32).add_(largest.signbit().to(torch.int32), alpha=256)
    found = levels.index_select(0, places.view(-1)).view(places.shape).mul_(largest.abs())
    values.copy_(found.view(-1)[: len(values)])


def _encode_int8(values: Tensor, largest: Tensor, codes: Tensor, generator: torch.Generator) -> None:
    padded = _blocks(values)
    low, high = padded.amin(1, keepdim=True), padded.amax(1, keepdim=True)
    positive = low >= 0
    scale = torch.maximum(high, -low)
    largest.copy_(torch.where(positive, -scale, scale).view(-1))
    top = _top(positive)
    share = padded.abs().div_(scale.clamp_min(torch.finfo(torch.float32).tiny))
    noise = _noise(share.numel(), share.device, generator).view(share.shape)
    lowest = torch.where(positive, 0.0, _LOWEST)
    kept = noise.to(torch.float32).mul_(lowest * 2.0**-16) < share  # below the range: the lowest code, with the odds of the mean
    half = 1 << (_CUT - 17)  # so that a code's own value, recomputed, stays it
    level = share.view(torch.int32).add_(noise, alpha=2 * half).add_(((top - _ONE) << _CUT) + half).bitwise_right_shift_(_CUT)
    level = torch.maximum(level, kept.to(torch.int32)).add_(padded < 0, alpha=128)
    codes.copy_(level.view(-1)[: len(codes)])
