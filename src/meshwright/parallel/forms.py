"""How values are stored in fewer bits, and what is lost.

| form | bytes per value | a value x comes back as                                                        |
|------|-----------------|---------------------------------------------------------------------------------|
| fp32 | its own         | x (whatever dtype it has)                                                       |
| bf16 | 2               | one of the two bfloat16 around x: relative error under 2^-7                     |
| int8 | 1 + 4 / 256     | one of the two codes around x: relative error under 2^(16/126) - 1 = 9.2%       |

int8 keeps, for each block of 256 values, the largest magnitude A in float32 and a code of one byte for each value, whose magnitudes
are spaced evenly on a logarithmic scale: a block without negative values has 255 of them from A down to A * 2^-32 (a second moment
has its square root to 4.5%, over a range of 65536), any other block 127 of either sign down to A * 2^-16. Zero is itself. Values
below the range: in a block without negative ones they become its lowest code (so a denominator never vanishes), else zero or the
lowest code. A linear scale would lose everything below A / 127, and Adam divides by it.

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
_SIGNED, _SIGNED_OCTAVES = 127, 16.0
_POSITIVE, _POSITIVE_OCTAVES = 255, 32.0


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
        return _decode_int8(memory, count).to(dtype)

    def encode(self, values: Tensor, memory: Tensor, generator: torch.Generator) -> None:
        """Store `values` [count] into `memory`; `generator` (of their device) decides the rounding."""
        if self.name == "fp32":
            memory.view(values.dtype).copy_(values)
        elif self.name == "bf16":
            memory.view(torch.bfloat16).copy_(stochastic_bf16(values.float(), generator))
        else:
            _encode_int8(values.float(), memory, generator)


def stochastic_bf16(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return float32 `values` as bfloat16, rounded up or down at random so that the mean is right."""
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    # Infinities and NaN have all exponent bits set: the carry can't leave them.
    return noise.add_(bits).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)


def remainder(values: Tensor, rounded: Tensor) -> Tensor:
    """Return what bfloat16 `rounded` lacks of `values`, as bfloat16 rounded towards zero: with it they have 16 bits and not 8.

    Towards zero, so that rounding the sum gives `rounded` again.
    """
    left = values.float() - rounded.float()
    return left.view(torch.int32).bitwise_and(-(1 << 16)).view(torch.float32).to(torch.bfloat16)


def _parts(memory: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The blocks' largest magnitudes [blocks] (negative for a block that has no negative value) and the codes [count]."""
    blocks = -(-count // BLOCK)
    return memory[: 4 * blocks].view(torch.float32), memory[4 * blocks :]


def _scale(positive: Tensor) -> tuple[Tensor, Tensor]:
    """The highest code and the octaves between neighbours, by block."""
    top = torch.where(positive, float(_POSITIVE), float(_SIGNED))
    return top, torch.where(positive, _POSITIVE_OCTAVES / (_POSITIVE - 1), _SIGNED_OCTAVES / (_SIGNED - 1))


def _blocks(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)


def _decode_int8(memory: Tensor, count: int) -> Tensor:
    largest, codes = _parts(memory, count)
    positive = largest.signbit()[:, None]
    top, step = _scale(positive)
    padded = _blocks(codes)
    negative = ~positive & (padded > _SIGNED)
    level = torch.where(negative, padded - (_SIGNED + 1), padded).float()
    values = level.sub(top).mul_(step).exp2_().mul_(largest.abs()[:, None])
    return values.masked_fill_(level == 0, 0.0).mul_(1.0 - 2.0 * negative).view(-1)[:count]


def _encode_int8(values: Tensor, memory: Tensor, generator: torch.Generator) -> None:
    largest, codes = _parts(memory, len(values))
    padded = _blocks(values)
    positive = padded.amin(1, keepdim=True) >= 0
    magnitude = padded.abs()
    highest = magnitude.amax(1, keepdim=True)
    largest.copy_(torch.where(positive, -highest, highest).view(-1))
    top, step = _scale(positive)
    magnitude /= highest.clamp_min(torch.finfo(torch.float32).tiny)
    place = (magnitude.log2() / step).add_(top).clamp_max_(top)
    below = place.floor().clamp_min_(0)
    lower = below.sub(top).mul_(step).exp2_().masked_fill_(below == 0, 0.0)
    upper = (below + 1).sub_(top).mul_(step).exp2_()
    odds = magnitude.sub(lower).div_(upper - lower)
    odds.masked_fill_(positive & (below == 0) & (magnitude > 0), 1.0)
    chosen = below + (torch.rand(odds.shape, device=odds.device, generator=generator) < odds)
    chosen = torch.minimum(chosen, top)
    chosen += (_SIGNED + 1.0) * (padded < 0) * (chosen > 0)
    codes.copy_(chosen.view(-1)[: len(values)].to(torch.uint8))
