"""`dp_replicate`, and `zero=1` and `zero=2` of `dp_shard`: gradients reduced in flat buckets while the backward still runs.

One mechanism serves the three, because they differ only in what happens to a full bucket:

| mode      | when a bucket is full                      | what stays after the backward | after the update        |
|-----------|--------------------------------------------|-------------------------------|-------------------------|
| replicate | all-reduce, 2 Psi (N-1)/N elements in all  | full gradients                | nothing                 |
| zero=1    | reduce-scatter in place, Psi (N-1)/N       | the full buckets              | all-gather, Psi (N-1)/N |
| zero=2    | reduce-scatter, then the bucket is freed   | this rank's rows              | all-gather, Psi (N-1)/N |

torch's DistributedDataParallel is not used: it needs a flag for unused parameters, can't let ranks differ in which they use,
divides by ranks rather than by items, reduces in the parameter's dtype and knows no ZeRO stage.

Every bucket carries a tail beside its gradients: one number per parameter that counts the ranks that used it, and in one of
the buckets the step's sums (loss, items). The tail rides on a collective that is sent anyway, so a replicated step needs no
other one. (Under zero=1 and zero=2 each row is summed by itself, perhaps in another order: only exact numbers are read there.)

Buckets are sent in one fixed order (last parameters first, as the backward meets them), so ranks whose backward takes another
path, or that have no data at all, still send the same collectives; what a rank did not compute counts as zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshwright import _torch
from meshwright.errors import ModelError
from meshwright.parallel.parameters import Parameter, on_accumulated, shard_rows
from meshwright.parallel.ranks import Ranks
from meshwright.plan.memory import LARGEST_BUCKET, bucket_bytes

_DIGIT = 4096


@dataclass(eq=False)
class _Bucket:
    """Parameters that travel together, as a matrix [shards, width + tail]; row r is what shard rank r keeps.

    `counts` says, per entry, how many elements of every row are its own, in order; `views` are those columns of the buffer.
    """

    entries: list[Parameter]
    counts: list[int]
    width: int
    tail: int
    dtype: torch.dtype
    live_dtype: torch.dtype
    waiting: set[int] = field(default_factory=set)  # entries that this backward has not reached yet
    buffer: Tensor | None = None
    views: Sequence[Tensor] = ()
    filled: set[int] = field(default_factory=set)
    part: Tensor | None = None  # this rank's reduced row
    kept: Tensor | None = None  # zero=2: this rank's row summed over the micro-batches so far
    work: dist.Work | None = None


class Buckets:
    """Reduces the gradients of `entries` over one plan's data-parallel ranks.

    `stage` is 0 (replicate), 1 or 2. The life of a step: `begin(last, sums)` before each backward, hooks during it, `finish()`
    after it; then `attach()` gives the optimizer its gradients, and after the update `publish()` brings the live parameters up
    to date. `clear()` frees gradients. All ranks must call these together.
    """

    def __init__(
        self,
        entries: list[Parameter],
        ranks: Ranks,
        stage: int,
        compute_dtype: torch.dtype | None,
        sleeps: bool = False,
        small: bool = False,
    ) -> None:
        """Split the masters of `entries`, cut them into buckets and hook their gradients.

        `small` buckets leave one after the other from the first step on, for updates inside the backward. With
        `sleeps` (zero=3 of a pipeline) the live parameters have no memory between an update and the next `wake`.
        """
        self.stage, self.sleeps, self._asleep = stage, sleeps, False
        self._small = small or stage == 2
        self.shard_group = ranks.group("dp_shard") if stage else None
        self.sum_group = ranks.group("dp_replicate") if stage else ranks.group("data")
        self.shards = dist.get_world_size(self.shard_group) if self.shard_group else 1
        self.shard_rank = dist.get_rank(self.shard_group) if self.shard_group else 0
        self._storage: dict[int, Tensor] = {}
        for entry in entries:
            self._split(entry, compute_dtype)
        self.buckets = self._cut([entry for entry in reversed(entries) if entry.trainable and entry.shape.numel()])
        self._carrier = max(self.buckets, key=lambda bucket: bucket.dtype.itemsize)  # of the sums that `begin` takes
        self._carrier.tail += 3
        # With `update=backward`: what updates a bucket's entries as soon as their reduced gradients are there, and returns None or
        # what waits until they are.
        self.ready: Callable[[list[Parameter]], Callable[[], None] | None] | None = None
        self._updating: tuple[_Bucket, Callable[[], None]] | None = None
        self._flying: tuple[_Bucket, Tensor, dist.Work] | None = None
        self.reduced = False  # whether this step's gradients have been summed over the ranks
        self._open = False  # whether the backward that runs is one of ours
        # A module under reentrant checkpointing that is called twice gets its gradients in two goes: the first step waits for the
        # end of its backward, and learns whether buckets may leave earlier. zero=2 can't wait without holding all gradients.
        self._early = self._small
        self._twice = False
        self._last = True
        self._held = False
        self._next = 0
        self._sums = torch.zeros(2)
        self._places: dict[int, tuple[_Bucket, int, Callable[[Tensor], None]]] = {}
        for bucket in self.buckets:
            for index, entry in enumerate(bucket.entries):
                collect = self._hook(bucket, index)
                self._places[id(entry)] = (bucket, index, collect)
                on_accumulated(entry.live, collect)

    def _split(self, entry: Parameter, compute_dtype: torch.dtype | None) -> None:
        """Give `entry` its live tensor in the compute dtype, and its master: all or this rank's rows of the original."""
        if not entry.trainable:
            return  # nothing updates it: one copy, in the dtype it came in
        full = entry.live.detach()
        live_dtype = compute_dtype if compute_dtype is not None and full.is_floating_point() else full.dtype
        if self.shard_group is not None and full.dim() > 0 and full.numel():
            rows = -(-entry.shape[0] // self.shards)
            # The storage holds a multiple of the shards in rows, so that every rank sends and receives equal parts.
            storage = full.new_zeros((rows * self.shards, *entry.shape[1:]), dtype=live_dtype)
            live = storage[: entry.shape[0]].copy_(full)
            entry.rows = shard_rows(entry.shape[0], self.shards, self.shard_rank)
            shares = live_dtype == full.dtype and not self.sleeps
            entry.master = nn.Parameter(entry.own_rows(live) if shares else entry.own_rows(full).clone())
            entry.live.data = live
            self._storage[id(entry)] = storage
        elif live_dtype != full.dtype:
            entry.master = nn.Parameter(full.clone())
            entry.live.data = full.to(live_dtype)

    def _cut(self, entries: list[Parameter]) -> list[_Bucket]:
        total = sum(entry.shape.numel() * entry.master.element_size() for entry in entries)
        limit = bucket_bytes(total) if self._small else LARGEST_BUCKET
        buckets: list[_Bucket] = []
        for entry in entries:
            dtype = torch.promote_types(entry.dtype, torch.float32)
            storage = self._storage.get(id(entry))
            # What can't be split (a scalar) travels whole in every row.
            count = entry.shape.numel() if storage is None else storage.numel() // self.shards
            bucket = buckets[-1] if buckets else None
            if (
                bucket is None
                or (bucket.width + count) * self.shards * dtype.itemsize > limit
                or (bucket.dtype, bucket.live_dtype) != (dtype, entry.live.dtype)
            ):
                bucket = _Bucket([], [], 0, 0, dtype, entry.live.dtype)
                buckets.append(bucket)
            bucket.counts.append(count)
            bucket.entries.append(entry)
            bucket.width += count
        for bucket in buckets:
            bucket.tail = len(bucket.entries)
        return buckets

    # During the backward

    def begin(self, last: bool, sums: Tensor, held: bool = False) -> None:
        """Prepare for one backward; `last` says it is the step's last, whose `sums` [2] (loss, items) travel in a tail.

        `held` (a pipeline's): there will be many backwards, and a bucket leaves when all of its entries have been released.
        """
        self._open, self._last, self._held, self._next, self._sums = True, last, held, 0, sums
        for bucket in self.buckets:
            bucket.waiting = set(range(len(bucket.entries)))

    def _hook(self, bucket: _Bucket, index: int) -> Callable[[Tensor], None]:
        entry = bucket.entries[index]
        padded = self.shards > 1 and (not entry.sharded or entry.shape[0] % self.shards > 0)

        def collect(parameter: Tensor) -> None:
            """Move a gradient that autograd has just finished into its bucket."""
            if not self._open:
                return  # somebody else's backward, through a loss of another model
            gradient = parameter.grad
            assert gradient is not None
            parameter.grad = None
            if index not in bucket.waiting:
                self._again(bucket, entry)
            if not entry.idle:
                entry.used = True
                if bucket.buffer is None:
                    self._allocate(bucket)
                self._write(bucket, index, gradient.to_dense() if gradient.is_sparse else gradient, padded)
            if self._held:
                return
            bucket.waiting.discard(index)
            if not bucket.waiting and self._early and (self._last or self.stage == 2):
                self._launch_ready()

        return collect

    def _launch_ready(self) -> None:
        while self._next < len(self.buckets) and not self.buckets[self._next].waiting:
            self._launch(self.buckets[self._next])

    def take(self, entries: Iterable[Parameter]) -> None:
        """Collect gradients that were put beside parameters without a backward (weight gradients computed apart)."""
        for entry in entries:
            if entry.live.grad is not None and id(entry) in self._places:
                self._places[id(entry)][2](entry.live)

    def release(self, entries: Iterable[Parameter]) -> None:
        """No more gradients come for these in the step: send the buckets that are complete, in the one order for all ranks."""
        for bucket, index, _ in (self._places[id(entry)] for entry in entries if id(entry) in self._places):
            bucket.waiting.discard(index)
        if self._last:
            self._launch_ready()

    def _again(self, bucket: _Bucket, entry: Parameter) -> None:
        """Take note that a parameter got a second gradient in one backward, while it can still be added."""
        self._twice = True
        if self.buckets.index(bucket) < self._next:
            raise ModelError(
                f"{entry.name} got a gradient after its bucket had left, as under reentrant activation checkpointing of a module "
                "that is called twice: use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )

    def _allocate(self, bucket: _Bucket) -> None:
        device = bucket.entries[0].live.device
        bucket.buffer = torch.empty(self.shards, bucket.width + bucket.tail, dtype=bucket.dtype, device=device)
        bucket.views = bucket.buffer.split([*bucket.counts, bucket.tail], dim=1)
        bucket.filled.clear()

    def _write(self, bucket: _Bucket, index: int, gradient: Tensor, padded: bool) -> None:
        """Copy (or add, from the second micro-batch on) one full gradient into its columns [shards, count] of the bucket."""
        columns = bucket.views[index]
        again = index in bucket.filled
        bucket.filled.add(index)
        if padded:
            if not again:
                columns.zero_()  # the rows that pad it must count as zero
            for target, source in self._pieces(columns, bucket.entries[index], gradient):
                target.add_(source)
            return
        # Both sides in the gradient's own dims, so that one that is not contiguous is still read in one pass.
        if self.shards == 1:
            target = columns.view(gradient.shape)
        else:
            target = columns.view(self.shards, -1, *gradient.shape[1:])
            gradient = gradient.unflatten(0, (self.shards, -1))
        if again:
            target.add_(gradient)
        else:
            target.copy_(gradient)

    def _pieces(self, columns: Tensor, entry: Parameter, gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return (part of the columns, part of the gradient) pairs for a gradient that does not fill its columns evenly."""
        flat = gradient.reshape(-1)
        if not entry.sharded:
            return [(columns, flat.expand(columns.shape))]  # what can't be split travels whole in every row
        count = columns.shape[1]
        whole = len(flat) // count  # ranks whose rows are all there
        rest = len(flat) - whole * count
        pairs = [(columns[:whole], flat[: whole * count].view(whole, count))]
        return [*pairs, (columns[whole, :rest], flat[whole * count :])] if rest else pairs

    def _launch(self, bucket: _Bucket) -> None:
        """Send a bucket: reduce-scatter [shards, width + tail] over dp_shard, or all-reduce it over every data rank."""
        for earlier in self.buckets[: self._next] if self.stage == 2 or self.ready is not None else ():
            # At most two full buckets live at a time. In mid-pipeline nobody waits, for peers may wait for this rank's messages: a
            # bucket goes if its sum is known to be there.
            if not self._held or (earlier.work is not None and earlier.work.is_completed()):
                self._harvest(earlier)
        self._next += 1
        if bucket.buffer is None:
            self._allocate(bucket)
        assert bucket.buffer is not None
        for index in range(len(bucket.entries)):
            if index not in bucket.filled:
                bucket.views[index].zero_()
        tail = bucket.views[-1]
        tail.fill_(1.0)  # number by number: a tensor from the host would wait for the device
        for index, entry in enumerate(bucket.entries):
            if not entry.used:
                tail[:, index] = 0.0
        if bucket is self._carrier:
            loss, items = self._sums.unbind()
            # A count in two digits: float32 holds neither of them inexactly, for up to 4,096 ranks.
            tail[:, -3:] = torch.stack([loss, items // _DIGIT, items % _DIGIT])
        if self.shard_group is not None:
            row = bucket.buffer[self.shard_rank]
            if row.device.type == "cpu":  # gloo's reduce-scatter is an all-reduce of a copy
                bucket.part = row
                bucket.work = dist.all_reduce(bucket.buffer, group=self.shard_group, async_op=True)
            else:
                bucket.part = row if self.stage == 1 else torch.empty_like(row)
                bucket.work = _torch.reduce_scatter(bucket.part, bucket.buffer.view(-1), self.shard_group)
        else:
            bucket.part = bucket.buffer[0]
            if self.sum_group is not None:
                bucket.work = dist.all_reduce(bucket.buffer, group=self.sum_group, async_op=True)

    def _harvest(self, bucket: _Bucket) -> None:
        """Wait for a bucket; under zero=2 free it and add this rank's row to what is kept; with `ready` use it up."""
        if bucket.work is not None:
            bucket.work.wait()
            bucket.work = None
        if bucket.part is None:
            return
        if self.stage == 2 and self.shard_group is not None:
            if bucket.part.device.type == "cpu":
                bucket.part = bucket.part.clone()
            bucket.buffer, bucket.views = None, ()
            if bucket.kept is not None:
                bucket.part[: bucket.width] += bucket.kept[: bucket.width]
            bucket.kept, bucket.part = bucket.part, None
        if self.ready is not None and self._last:
            self._use_up(bucket)

    def _use_up(self, bucket: _Bucket) -> None:
        """Have a reduced bucket's entries updated, start gathering their new rows, and free the bucket."""
        assert self.ready is not None
        if self.shard_group is not None and self.sum_group is not None:
            dist.all_reduce(self._row(bucket), group=self.sum_group)  # the replicas hold the same rows: Psi / N elements in all
        row = self._row(bucket).split([*bucket.counts, bucket.tail])
        alone = self.shard_group is None and self.sum_group is None  # then nobody else's use is in the tail: no wait for the device
        users = [float(entry.used) for entry in bucket.entries] if alone else row[-1].tolist()
        self._give(bucket, row[:-1], users)
        del row
        self._updated()
        wait = self.ready(bucket.entries)
        for entry in bucket.entries:
            entry.gradient = entry.summed = None
        self._free(bucket)
        self._updating = bucket, wait or (lambda: None)
        if wait is None:
            self._updated()

    def _updated(self) -> None:
        """Wait for the bucket whose entries are being updated, and start gathering their new rows."""
        if self._updating is not None:
            (bucket, wait), self._updating = self._updating, None
            wait()
            self._land()
            with torch.no_grad():
                self._flying = self._publish(bucket)

    def _land(self) -> None:
        if self._flying is not None:
            with torch.no_grad():
                self._scatter_out(*self._flying)
            self._flying = None

    def finish(self) -> None:
        """End one backward: send what is left, with zeros for what this rank did not compute, and wait for all of it."""
        self._open = False
        if not (self._last or (self.stage == 2 and not self._held)):
            return
        self._early = not self._twice
        while self._next < len(self.buckets):
            self._launch(self.buckets[self._next])
        for bucket in self.buckets:
            self._harvest(bucket)
        self._updated()
        self._land()
        self.reduced = self._last
        if self._last and self.ready is None and self.shard_group is not None and self.sum_group is not None:
            # The replicas hold the same rows: Psi / N elements each, all-reduced over dp_replicate once a step.
            for work in [dist.all_reduce(self._row(b), group=self.sum_group, async_op=True) for b in self.buckets]:
                work.wait()

    # After the backward

    def _row(self, bucket: _Bucket) -> Tensor:
        row = bucket.kept if bucket.kept is not None else bucket.part
        assert row is not None
        return row

    def attach(self) -> Tensor:
        """Set each entry's reduced `gradient` and `used` (by any rank); return the sums over all ranks [2], on the host.

        The sums are the same on every rank in mode replicate only.
        """
        rows = [self._row(bucket).split([*bucket.counts, bucket.tail]) for bucket in self.buckets]
        carrier = self.buckets.index(self._carrier)
        tails = torch.cat([views[-1].double() for views in (*rows, rows[carrier])]).tolist()
        position = 0
        for bucket, views in zip(self.buckets, rows, strict=True):
            users, position = tails[position : position + bucket.tail], position + bucket.tail
            self._give(bucket, views[:-1], users)
        loss, high, low = tails[-3:]
        return torch.tensor([loss, high * _DIGIT + low], dtype=torch.float64)

    def _give(self, bucket: _Bucket, views: Sequence[Tensor], users: list[float]) -> None:
        """Point each entry that any rank used at its reduced gradient."""
        for entry, view, count in zip(bucket.entries, views, users, strict=False):
            entry.used = count > 0
            if count:
                master = entry.master
                part = view if len(view) == master.numel() else view[: master.numel()]
                entry.gradient = part.view(master.shape).to(entry.dtype)

    def wake(self) -> None:
        """Gather the live parameters if they sleep: once a step, over `dp_shard`. Every rank must call it."""
        if self._asleep:
            self._asleep = False
            for storage in self._storage.values():
                storage.untyped_storage().resize_(storage.numel() * storage.element_size())
                storage.zero_()
            self._bring_up_to_date()

    def publish(self) -> None:
        """Bring the live parameters up to date with the updated masters, or let them sleep. Every rank must call it."""
        if not self.sleeps:
            self._bring_up_to_date()
            return
        self._asleep = True
        for storage in self._storage.values():
            storage.untyped_storage().resize_(0)

    def _bring_up_to_date(self) -> None:
        flying: list[tuple[_Bucket, Tensor, dist.Work]] = []
        for bucket in reversed(self.buckets):
            started = self._publish(bucket)
            if started is None:
                continue
            flying.append(started)
            if len(flying) == 2:
                self._scatter_out(*flying.pop(0))
        for item in flying:
            self._scatter_out(*item)

    def _publish(self, bucket: _Bucket) -> tuple[_Bucket, Tensor, dist.Work] | None:
        """Copy a bucket's updated masters to the live rows, and start gathering them where they are divided."""
        for entry in bucket.entries:
            apart = entry.master.dtype != entry.live.dtype or (id(entry) in self._storage and self.sleeps)  # else they share memory
            if apart and entry.master.untyped_storage().nbytes():  # a master that is stored elsewhere was copied by its update
                entry.own_rows(entry.live.detach()).copy_(entry.master.detach())
        return self._gather(bucket) if any(id(entry) in self._storage for entry in bucket.entries) else None

    def _gather(self, bucket: _Bucket) -> tuple[_Bucket, Tensor, dist.Work]:
        """Start the all-gather of a bucket's live rows over dp_shard: [shards, width] in the live dtype."""
        assert self.shard_group is not None
        rows = bucket.entries[0].live.new_empty((self.shards, bucket.width))
        mine = rows[self.shard_rank]
        pairs = self._split_rows(bucket, mine)
        torch._foreach_copy_([view for _, view in pairs], [storage[self.shard_rank] for storage, _ in pairs])
        return bucket, rows, _torch.all_gather(rows.view(-1), mine, self.shard_group)

    def _scatter_out(self, bucket: _Bucket, rows: Tensor, work: dist.Work) -> None:
        work.wait()
        pairs = self._split_rows(bucket, rows)
        torch._foreach_copy_([storage for storage, _ in pairs], [view for _, view in pairs])

    def _split_rows(self, bucket: _Bucket, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return (live storage [shards, count], its columns of `rows`) for each entry of a bucket that is sharded."""
        found = [
            (self._storage.get(id(entry)), view) for entry, view in zip(bucket.entries, rows.split(bucket.counts, -1), strict=True)
        ]
        return [(storage.view(self.shards, -1), view) for storage, view in found if storage is not None]

    def clear(self) -> None:
        """Free the buckets; the entries' gradients are views of them, for the caller to let go of."""
        self.reduced = self._open = False
        self._flying = self._updating = None
        for bucket in self.buckets:
            self._free(bucket)

    def _free(self, bucket: _Bucket) -> None:
        bucket.buffer = bucket.part = bucket.kept = None
        bucket.views = ()
        bucket.filled.clear()
