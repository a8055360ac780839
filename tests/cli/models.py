"""Models that a user might name on the command line as `models:...`; the tests put this folder on the path."""

import os
import time

import torch
from torch import nn

from meshwright.models.decoder import Decoder, llama


def _tiny() -> nn.Module:
    return Decoder(llama(layers=1, hidden=16, heads=2, vocab=256, sequence=16))


class FailsOnRankOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = _tiny()
        self.calls = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 2 and os.environ["RANK"] == "1":
            raise ValueError("the second batch is cursed")
        return self.model(tokens)


class Dies(FailsOnRankOne):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), 9)
        return self.model(tokens)


class Slow(FailsOnRankOne):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        time.sleep(0.3)
        return self.model(tokens)


class Explodes(FailsOnRankOne):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens) * float("inf")


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = Decoder(llama(layers=2, hidden=16, heads=2, vocab=256, sequence=16, dropout=0.2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens)


def nothing() -> None:
    """A factory without a return."""


def fails() -> nn.Module:
    raise ValueError("no such thing")
