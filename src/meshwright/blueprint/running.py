"""How a capture runs a model's Python: with other tensors for its state, seeing which module runs, leaving nothing behind."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

Function = Callable[[Any], Any]


def run_with(model: nn.Module, state: dict[str, Tensor], function: Function, batch: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return `function(batch)`, which calls `model`, computed with `state` in the place of its parameters and buffers; and the
    state afterwards, by the same names, in which a buffer may have been assigned anew.
    """
    named = {f"model.{name}": tensor for name, tensor in state.items()}
    output = torch.func.functional_call(_Holder(model), named, (function, batch), tie_weights=False)
    return output, {name: named[f"model.{name}"] for name in state}


class _Holder(nn.Module):
    """What `functional_call` needs: a module that holds the model and runs a function, which may call it and the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Function, batch: Any) -> Any:
        """Return what the function returns."""
        return function(batch)


@contextlib.contextmanager
def watching(
    model: nn.Module,
    running: list[str],
    entered: Callable[[str], None] = lambda _: None,
    left: Callable[[str], None] = lambda _: None,
) -> Iterator[None]:
    """Keep the paths of the modules of `model` that are running, the innermost last, and tell of each call's begin and end.

    What runs without a path (a loss with layers of its own) counts as the module that called it.
    """
    paths = {id(module): name for name, module in model.named_modules()}

    def enter(module: nn.Module, _: Any) -> None:
        running.append(paths.get(id(module), running[-1] if running else ""))
        if id(module) in paths:
            entered(running[-1])

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        running.pop()
        if id(module) in paths:
            left(paths[id(module)])

    running.clear()
    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever is stored on the model's modules meanwhile (a cached mask, a counter, another `forward`) is taken back: it would be
    a fake tensor, or a capture's own.
    """
    before = [(module, dict(vars(module))) for module in model.modules()]
    held = [(value, value.copy()) for _, attributes in before for value in attributes.values() if type(value) in _CONTAINERS]
    try:
        yield
    finally:
        for module, attributes in before:
            now = vars(module)
            for name in [name for name in now if name not in attributes]:
                del now[name]
            for name, value in attributes.items():
                if now.get(name) is not value:
                    now[name] = value
        for container, content in held:  # also what torch keeps buffers in
            if isinstance(container, list):
                container[:] = content
            elif len(container) != len(content) or any(container.get(key) is not value for key, value in content.items()):
                container.clear()
                container.update(content)


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """As `untouched`, and buffers and other tensors that modules hold have the values that they had before."""
    attributes = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    held = [(tensor, tensor.detach().clone()) for tensor in (*model.buffers(), *attributes)]
    try:
        with untouched(model):
            yield
    finally:
        for tensor, value in held:
            tensor.detach().copy_(value)


_CONTAINERS = (dict, OrderedDict, list)
