"""`inspect`: from a model and a batch to its Blueprint. The order of the work, and what happens when a capture fails."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from meshwright.blueprint import capture, chains
from meshwright.blueprint.blocks import block_names, structures
from meshwright.blueprint.execute import build_on_meta
from meshwright.blueprint.failures import capture_error
from meshwright.blueprint.kernels import CudaKernels
from meshwright.blueprint.record import Blueprint, Call, Unit
from meshwright.blueprint.running import Function
from meshwright.blueprint.sample import ForwardFn, LossFn, batch_items, reading
from meshwright.blueprint.spec import ModelSpec, parse_spec
from meshwright.blueprint.tape import Recorder
from meshwright.blueprint.trees import tensors_in
from meshwright.blueprint.walk import Subject, Walk, Walker, stand_in_state
from meshwright.errors import MeshwrightError, ModelError
from meshwright.pause import uncollected

_PROPORTIONAL = "its ops depend on the batch size; amounts are taken as proportional to it"

SIZES = (2, 3)
"""Micro-batch sizes of the two captures. Not 1: a dim of size one takes paths (broadcasts, free reshapes) that others
don't.
"""


@uncollected()
def inspect(
    model: nn.Module | Callable[[], nn.Module] | str | ModelSpec,
    batch: Any = None,
    seq: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    forward_fn: ForwardFn | None = None,
    loss_fn: LossFn | None = None,
    device: str = "cpu",
    strict: bool = True,
) -> Blueprint:
    """Read a model from its code alone: nothing is allocated and no process group is touched.

    `model` is a module (its parameters may be on meta), a callable that builds one (on meta then), or a spec such as
    `"gpt2"` or `"llama:layers=32,hidden=4096"`. `batch` is any pytree of tensors with the batch on dim 0; its integers
    steer the capture as they would a run. A spec makes its own batch of `seq` tokens. `dtype` captures as if floating
    parameters and inputs were of that type (FSDP's mixed precision). With `loss_fn(output, batch)` the loss is part of
    what is captured; a spec of a language model brings cross-entropy. Counts hold for any micro-batch size.

    `device="cuda"` counts the attention and RMSNorm kernels that CUDA would choose; no GPU is needed or used.

    Raises `ModelError`, one sentence that names the module and the line, if the model can't be captured; with
    `strict=False` the Blueprint then holds blocks and parameters by structure, and the sentence as a note.
    """
    if device not in ("cpu", "cuda"):
        raise ModelError(f"device {device!r} has no known kernels: use 'cpu' or 'cuda'")
    name, module, batch, sequence, loss_fn = _subject(model, batch, seq, loss_fn)
    blocks = block_names(module)
    try:
        walks, blocks = _walk_twice(module, blocks, batch, dtype, reading(forward_fn, loss_fn)(module), device)
    except MeshwrightError as error:
        if strict:
            raise
        return _by_structure(name, module, blocks, dtype, str(error))
    return _assemble(name, module, blocks, walks, sequence, dtype, device)


def _subject(model: Any, batch: Any, seq: int | None, loss_fn: LossFn | None) -> tuple[str, nn.Module, Any, int, LossFn | None]:
    """The model's name, the module itself, its batch, the batch's sequence length (0 for none) and the loss."""
    if isinstance(model, str):
        model = parse_spec(model, **({} if seq is None else {"sequence": seq}))
    if isinstance(model, ModelSpec):
        model = model.with_sequence(seq)
        name, sample = model.text, model.sample
        module = build_on_meta(model.build)
        if batch is None:
            batch, brought = sample(module, seq)
            loss_fn = loss_fn or brought
    elif isinstance(model, nn.Module):
        name, module = type(model).__name__, model
    else:
        module = build_on_meta(model)
        name = type(module).__name__
    if batch is None:
        raise ModelError(f"inspect needs a batch for {name}: pass the tensors that its forward takes, with the batch on dim 0")
    batch_items(batch)
    first = next(tensor for tensor in tensors_in(batch) if tensor.dim())
    return name, module, batch, int(first.shape[1]) if first.dim() >= 2 and first.dim() <= 3 else 0, loss_fn


def _walk_twice(
    module: nn.Module,
    blocks: list[str],
    batch: Any,
    dtype: torch.dtype | None,
    function: Function,
    device: str,
) -> tuple[tuple[Walk, Walk], list[str]]:
    recorder = Recorder()
    kernels = CudaKernels(recorder) if device == "cuda" else contextlib.nullcontext()
    subject = Subject(module, stand_in_state(module, recorder, dtype), batch, dtype, function)
    try:
        # A capture may draw numbers for real (whether to drop a layer): the user's random state is not to move.
        with warnings.catch_warnings(), _quiet(), torch.random.fork_rng(devices=[]), kernels:
            warnings.simplefilter("ignore")  # advice about the stand-in tensors is not for the user
            first = Walker(subject, recorder, blocks, SIZES[0], None).run()
            shared = _called_again(module, blocks, first)
            if shared:
                blocks = [*blocks, *shared]
                first = Walker(subject, recorder, blocks, SIZES[0], None).run()
            second = Walker(subject, recorder, blocks, SIZES[1], first).run()
    except MeshwrightError:
        raise
    except Exception as error:
        raise capture_error(error, recorder.modules[-1] if recorder.modules else "") from error
    return (first, second), blocks


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Torch logs a traceback for each op that fails on fake tensors; the user gets one sentence in its place."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _called_again(module: nn.Module, blocks: list[str], walk: Walk) -> list[str]:
    """Modules with children that ran several times outside the blocks: one layer used in place of many."""
    found: list[str] = []
    for name, times in walk.module_calls.items():
        if times < 2 or not name:
            continue
        candidate = module.get_submodule(name)
        has_layers = any(next(child.parameters(), None) is not None for child in candidate.children())
        near = [other for other in [*blocks, *found] if f"{other}.".startswith(f"{name}.") or f"{name}.".startswith(f"{other}.")]
        if has_layers and not near:
            found.append(name)
    return found


def _assemble(
    name: str,
    module: nn.Module,
    blocks: list[str],
    walks: tuple[Walk, Walk],
    sequence: int,
    dtype: torch.dtype | None,
    device: str,
) -> Blueprint:
    kinds: list[Unit] = []
    notes: list[str] = []
    for number, tape in enumerate(walks[0].kinds):
        parameters = capture.parameter_records(module, f"{tape.name}.", (), dtype)
        unit, agrees = capture.unit_of_kind(walks, number, module, parameters, sequence)
        kinds.append(unit)
        notes += [] if agrees else [f"{tape.name}: {_PROPORTIONAL}"]
    tapes = [walks[0].outside, *(tape.tape for tape in walks[0].kinds)]
    if any("rnn_layer" in op.func.name() for tape in tapes for op in tape.ops):
        notes.append("oneDNN's recurrent kernel keeps a workspace that only a run can size: saved bytes leave it out")
    skip = tuple(f"{block}." for block in dict.fromkeys(call.name for call in walks[0].calls))
    parameters = capture.parameter_records(module, "", skip, dtype)
    rest, agrees = capture.unit_of_rest(walks, module, parameters, sequence)
    notes += [] if agrees else [f"outside the blocks: {_PROPORTIONAL}"]
    called = {call.name for call in walks[0].calls}
    return Blueprint(
        model=name,
        class_name=type(module).__name__,
        dtype=_captured_dtype(module, dtype),
        batch=rest.inputs,
        sequence=sequence,
        kinds=tuple(kinds),
        calls=tuple(Call(call.name, call.kind) for call in walks[0].calls),
        boundaries=chains.boundaries(walks),
        chains=chains.chains(walks[0]),
        rest=rest,
        blocks=tuple(block for block in blocks if block in called),
        saved=capture.whole_saved(walks),
        device=device,
        notes=tuple(notes),
    )


def _by_structure(name: str, module: nn.Module, blocks: list[str], dtype: torch.dtype | None, note: str) -> Blueprint:
    """Blocks and parameters only, for a model that can't be captured."""
    shapes = structures(module)
    families: dict[int, list[str]] = {}
    for block in blocks:
        families.setdefault(shapes[id(module.get_submodule(block))], []).append(block)

    def unit(members: list[str]) -> Unit:
        parameters = capture.parameter_records(module, f"{members[0]}.", (), dtype)
        kind = type(module.get_submodule(members[0])).__name__
        return Unit(kind, tuple(members), parameters, (), (), (), (), ())

    kinds = [unit(members) for members in families.values()]
    calls = [Call(block, kind) for block in blocks for kind, unit in enumerate(kinds) if block in unit.instances]
    rest = capture.parameter_records(module, "", tuple(f"{block}." for block in blocks), dtype)
    return Blueprint(
        model=name,
        class_name=type(module).__name__,
        dtype=_captured_dtype(module, dtype),
        batch=(),
        sequence=0,
        kinds=tuple(kinds),
        calls=tuple(calls),
        boundaries=(),
        chains=(),
        rest=Unit(type(module).__name__, (), rest, (), (), (), (), ()),
        blocks=tuple(blocks),
        captured=False,
        notes=(note,),
    )


def _captured_dtype(module: nn.Module, dtype: torch.dtype | None) -> str:
    first = next(module.parameters(), None)
    return capture.dtype_name(dtype or (torch.float32 if first is None else first.dtype))
