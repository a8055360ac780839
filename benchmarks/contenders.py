"""The same training step, written with different means: meshwright, torch by hand, and the libraries that others use.

Each function builds a model and returns a `Step`: it takes `(tokens, labels)` and returns the loss as a float, global where
`job.sync_loss` says so. All train the same: same initial weights, mean cross-entropy, gradient norm clipped to 1, AdamW.
The code by hand is what a specialist would write: DDP without buffer broadcasts and without copies of gradients, FSDP2
per block, and one scalar all-reduce for the loss that is logged (meshwright's `metrics.loss` is global, too).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import meshwright as mw
from meshwright.models.decoder import Decoder, DecoderConfig

CLIP_NORM = 1.0
Batch = tuple[Tensor, Tensor]
Step = Callable[[Batch], float]


@dataclass(frozen=True)
class Job:
    """What every contender trains, and on what."""

    config: DecoderConfig
    device: str
    sync_loss: bool
    micro_batch: int = 4

    def model(self) -> Decoder:
        """Return the model with its initial values, the same at every call."""
        torch.manual_seed(0)
        return Decoder(self.config).to(self.device)

    def logged(self, loss: Tensor) -> float:
        """Return the loss that a training log shows: the mean over all ranks, or this rank's own."""
        loss = loss.detach()
        if self.sync_loss and dist.is_initialized():
            dist.all_reduce(loss)  # 4 bytes over all ranks
            loss /= dist.get_world_size()
        return loss.item()


def adamw(parameters: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=3e-4, fused=True)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


@dataclass(frozen=True)
class Contender:
    """A name, the form of data parallelism (`ddp`, `zero1`, `zero2`, `fsdp`, `single`), who wrote it, how to build it."""

    name: str
    form: str
    who: str
    build: Callable[[Job], Step]
    needs: str | None = None


def meshwright(job: Job, plan: str) -> Step:
    engine = mw.parallelize(
        job.model(),
        plan,
        optimizer=adamw,
        loss_fn=mw.losses.cross_entropy,
        clip_grad_norm=CLIP_NORM,
        device=torch.device("cuda", 0) if job.device == "cuda" else torch.device("cpu"),
    )
    return lambda batch: engine.step(batch).loss


# By hand


def _by_hand(job: Job, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Step:
    parameters = list(model.parameters())
    optimizer = optimizer or adamw(parameters)

    def step(batch: Batch) -> float:
        tokens, labels = batch
        loss = cross_entropy(model(tokens), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return job.logged(loss)

    return step


def hand_single(job: Job) -> Step:
    return _by_hand(job, job.model())


def hand_ddp(job: Job) -> Step:
    return _by_hand(job, DistributedDataParallel(job.model(), broadcast_buffers=False, gradient_as_bucket_view=True))


def _shard_blocks(model: Decoder, mesh: Any = None) -> Decoder:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)  # type: ignore[call-overload]
    return fully_shard(model, mesh=mesh)


def hand_fsdp(job: Job) -> Step:
    return _by_hand(job, _shard_blocks(job.model(), dist.device_mesh.init_device_mesh(job.device, (dist.get_world_size(),))))


def hand_zero1(job: Job) -> Step:
    """ZeRO-1 as torch offers it: DDP, with the optimizer's states split over the ranks."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(job.model(), broadcast_buffers=False, gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=3e-4, fused=True)
    return _by_hand(job, model, optimizer)


# Lightning Fabric


def _fabric_step(job: Job, fabric: Any, model: nn.Module, optimizer: Any) -> Step:
    def step(batch: Batch) -> float:
        tokens, labels = batch
        loss = cross_entropy(model(tokens), labels)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return job.logged(loss)

    return step


def fabric_ddp(job: Job) -> Step:
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    strategy = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    fabric = Fabric(accelerator=job.device, devices=dist.get_world_size(), strategy=strategy)
    fabric.launch()
    model = job.model()
    return _fabric_step(job, fabric, *fabric.setup(model, adamw(model.parameters())))


def fabric_fsdp(job: Job) -> Step:
    """Fabric's FSDP2 route: the user writes the `fully_shard` calls, Fabric makes the mesh and calls them."""
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import ModelParallelStrategy

    def shard(model: Any, mesh: Any) -> Any:
        return _shard_blocks(model, mesh["data_parallel"])

    strategy = ModelParallelStrategy(shard, data_parallel_size=dist.get_world_size(), tensor_parallel_size=1)
    fabric = Fabric(accelerator=job.device, devices=dist.get_world_size(), strategy=strategy)
    fabric.launch()
    model = fabric.setup_module(job.model())
    return _fabric_step(job, fabric, model, fabric.setup_optimizers(adamw(model.parameters())))


# Accelerate


def _accelerate_step(job: Job, accelerator: Any) -> Step:
    model = job.model()
    model, optimizer = accelerator.prepare(model, adamw(model.parameters()))
    parameters = list(model.parameters())

    def step(batch: Batch) -> float:
        tokens, labels = batch
        loss = cross_entropy(model(tokens), labels)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return job.logged(loss)

    if accelerator.state.distributed_type == "FSDP" and sum(isinstance(m, FSDPModule) for m in model.modules()) < 2:
        raise RuntimeError("Accelerate was asked for FSDP2 and did not shard the blocks")
    return step


def accelerate_ddp(job: Job) -> Step:
    from accelerate import Accelerator, DistributedDataParallelKwargs

    options = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    return _accelerate_step(job, Accelerator(cpu=job.device == "cpu", kwargs_handlers=[options]))


def accelerate_fsdp(job: Job) -> Step:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Block"]
    )
    accelerator = Accelerator(cpu=job.device == "cpu", fsdp_plugin=plugin)
    # On CPU Accelerate (1.15) drops the plugin without a word and wraps with DDP; its FSDP2 code itself runs there.
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return _accelerate_step(job, accelerator)


# DeepSpeed


def deepspeed_zero(job: Job, stage: int) -> Step:
    import deepspeed

    model = job.model()
    config = {
        "train_micro_batch_size_per_gpu": job.micro_batch,
        "gradient_clipping": CLIP_NORM,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw(model.parameters()), config=config, dist_init_required=False)

    def step(batch: Batch) -> float:
        tokens, labels = batch
        loss = cross_entropy(engine(tokens), labels)
        engine.backward(loss)
        engine.step()
        return job.logged(loss)

    return step


HAND_DDP = Contender("hand-written DDP", "ddp", "hand", hand_ddp)
HAND_FSDP = Contender("hand-written FSDP2", "fsdp", "hand", hand_fsdp)
HAND_SINGLE = Contender("plain torch loop", "single", "hand", hand_single)


def _ours(form: str) -> Contender:
    return Contender(f"meshwright {form}", form, "meshwright", partial(meshwright, plan=form))


# One launch per group: Accelerate keeps its mode in process-wide state (so DDP and FSDP2 can't share a process), and all
# contenders of a group are in memory at once.
GROUPS: dict[str, list[Contender]] = {
    "ddp": [
        HAND_DDP,
        _ours("ddp"),
        Contender("Lightning Fabric DDP", "ddp", "peer", fabric_ddp, "lightning_fabric"),
        Contender("Accelerate DDP", "ddp", "peer", accelerate_ddp, "accelerate"),
    ],
    "fsdp": [
        HAND_DDP,
        HAND_FSDP,
        _ours("fsdp"),
        Contender("Lightning Fabric FSDP2", "fsdp", "peer", fabric_fsdp, "lightning_fabric"),
        Contender("Accelerate FSDP2", "fsdp", "peer", accelerate_fsdp, "accelerate"),
    ],
    "zero": [
        HAND_DDP,
        _ours("zero1"),
        _ours("zero2"),
        Contender("torch ZeroRedundancyOptimizer", "zero1", "peer", hand_zero1),
        *(
            Contender(f"DeepSpeed ZeRO-{stage}", form, "peer", partial(deepspeed_zero, stage=stage), "deepspeed")
            for stage, form in ((1, "zero1"), (2, "zero2"), (3, "fsdp"))
        ),
        _ours("fsdp"),
    ],
    "overhead": [HAND_DDP, HAND_FSDP, _ours("ddp"), _ours("zero1"), _ours("zero2"), _ours("fsdp")],
    "single": [HAND_SINGLE, _ours("single")],
}


def build(contenders: list[Contender], job: Job) -> tuple[dict[str, Step], dict[str, str]]:
    """Build each contender; return the steps, and the reason for each that is not here or does not run here."""
    steps: dict[str, Step] = {}
    absent: dict[str, str] = {}
    for contender in contenders:
        if contender.needs and importlib.util.find_spec(contender.needs) is None:
            absent[contender.name] = f"{contender.needs} is not installed"
            continue
        try:
            steps[contender.name] = contender.build(job)
        except Exception as error:
            if contender.who != "peer":
                raise
            absent[contender.name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return steps, absent
