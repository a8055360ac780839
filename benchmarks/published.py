"""Published runs as (model spec, cluster text, plan text): how a row of shared/published becomes a prediction; no constants."""

from __future__ import annotations

import csv
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from meshwright.blueprint.inspection import inspect
from meshwright.blueprint.record import Blueprint
from meshwright.cluster import Cluster
from meshwright.cluster.cluster import LINK_EFFICIENCY
from meshwright.errors import MeshwrightError
from meshwright.plan.collectives import gather, group
from meshwright.plan.plan import Plan
from meshwright.plan.predict import Pricer
from meshwright.plan.prediction import Prediction

FOLDER = Path(os.environ.get("MESHWRIGHT_PUBLISHED", "/work/shared/published"))
DEVICES = {"H100-SXM5": "H100-80GB", "B200-SXM": "B200", "GB200": "GB200", "H200-SXM": "H200", "H800-SXM": "H800"}
PROBE_BYTES = 2**30
"""Of the collectives that nanotron measured inside each job (sources.csv)."""
EFA_US, EFA_EFFICIENCY = 42, 0.45
"""A step over EFA, what all-gathers of 1 GiB on 32 to 512 ranks take beyond their bytes, per rank; the part of the line rate that
all-reduces of 1 GiB got on 4 to 64 nodes (176 to 190 of 400 GB/s). Source: nanotron's measurements inside its jobs.
"""
LAST_GATHERED_JOB = 14_016_999
"""Of nanotron's, by number; measured activations change to those of `tp_recompute_allgather` between jobs 14016414 and 14019186."""
FUSED = {"dgxc", "simumax-b200", "megatron-golden", "korthikanti-t5"}
"""Sources that ran Megatron or NeMo: single kernels for norms, activations, rotary and loss."""

Row = dict[str, str]
_blueprints: dict[tuple[str, int], Blueprint] = {}


def rows(name: str) -> list[Row]:
    with (FOLDER / name).open() as file:
        return list(csv.DictReader(file))


def number(row: Row, key: str, default: int = 1) -> int:
    return int(float(row.get(key) or default))


def spec(row: Row) -> str:
    """The inline size of a row's model."""
    gated = row["ffn_type"] in ("swiglu", "geglu")
    rotary = gated or row["ffn_type"] == "sqrelu"
    sequence = number(row, "seq_len")
    hidden = number(row, "hidden")
    text = f"{'llama' if rotary else 'gpt'}:layers={number(row, 'layers')},hidden={hidden},heads={number(row, 'heads')}"
    text += f",kv_heads={number(row, 'kv_heads', number(row, 'heads'))},ffn={number(row, 'ffn_hidden', 4 * hidden)}"
    text += f",vocab={number(row, 'vocab', 50304)},tied={'on' if row['tied_embeddings'] == '1' else 'off'},sequence={sequence}"
    if row["ffn_type"] in ("sqrelu", "geglu"):
        text += f",activation={row['ffn_type']}"
    if row["ffn_type"] == "sqrelu":
        text += ",norm=layer"
    if "eager" in row["attention"] or "standard" in row["attention"]:
        text += ",attention=eager,dropout=0.1"
    if row.get("experts"):
        moe = number(row, "moe_ffn_hidden", number(row, "ffn_hidden", 4 * hidden))
        text += f",experts={row['experts']},topk={number(row, 'topk', 2)},moe_ffn={moe}"
    heads = number(row, "heads")
    if hidden % heads:
        text += f",head_dim={hidden // heads}"
    if row["source_id"] in FUSED:
        text += ",kernels=fused"
    return text


def blueprint(row: Row) -> Blueprint:
    import torch

    text, sequence = spec(row), number(row, "seq_len")
    if (text, sequence) not in _blueprints:
        _blueprints[text, sequence] = inspect(text, seq=sequence, dtype=torch.bfloat16, device="cuda")
    return _blueprints[text, sequence]


def cluster(row: Row) -> Cluster:
    """The row's machine, with the network that the source states and what it measured inside the job."""
    name = DEVICES.get(row["gpu"]) or f"A100-{number(row, 'gpu_mem_gb', 80)}GB"
    each = number(row, "gpus_per_node", 8)
    gpus = number(row, "gpus")
    text = f"{max(1, gpus // each)}x{min(each, gpus)}x{name}" + network(row.get("inter_node_link", ""), each)
    inside = row.get("measured_intranode_allreduce_gb_s")
    if inside and float(inside) < 300:
        text += f",intra={float(inside):.4g}"
    found = Cluster.parse(text)
    gathered = row.get("measured_allgather_gb_s")
    if gathered and gpus > 1:
        seconds = PROBE_BYTES * (gpus - 1) / gpus / float(gathered) / 1e9
        if seconds > 1.5 * gather(group(found, gpus, 1), PROBE_BYTES):
            # Within such jobs the time grows with the ranks of a group and not with the bytes: a cost of every collective.
            return Cluster.parse(f"{text},peer_us={seconds / gpus * 1e6:.4g}")
    return found


def network(link: str, each: int) -> str:
    """Overrides for a stated network, such as `8x HDR InfiniBand 200 Gbit/s per node` or `EFA 3200 Gbit/s per node`."""
    stated = re.search(r"(?:(\d+)x )?.*?(\d+) Gbit/s per (node|GPU)", link)
    if stated is None:
        return ""
    line = float(stated[2]) * float(stated[1] or 1) / (each if stated[3] == "node" else 1) / 8
    if "EFA" in link:
        return f",inter={line * EFA_EFFICIENCY:.4g},inter_us={EFA_US}"
    return f",inter={line * LINK_EFFICIENCY:.4g}"


def split(row: Row) -> str:
    """Where the source's software cuts the pipeline, as `split=`.

    nanotron (models/base.py, get_block_compute_costs): blocks in order, a new stage once the sum of costs exceeds its share; the
    head is one of the blocks. Megatron and NeMo: equal numbers of layers, where that is possible.
    """
    layers, stages = number(row, "layers"), number(row, "pp") * number(row, "interleave")
    if number(row, "pp") == 1 or layers < stages:
        return "balanced"
    if row["source_id"] in FUSED:
        return ",".join([str(layers // stages)] * stages) if layers % stages == 0 else "balanced"
    hidden = number(row, "hidden")
    layer = 4 * hidden * hidden + 3 * number(row, "ffn_hidden", 4 * hidden) * hidden
    whole = layers * layer + number(row, "vocab", 50304) * hidden
    counts, stage = [0] * stages, 0
    for done in range(1, layers + 1):
        counts[stage] += 1
        stage += done * layer > whole * (stage + 1) / stages
    while 0 in counts:  # the last ones have the head alone: the nearest that can be said
        place = max(range(stages), key=lambda index: (counts[index], index))
        counts[place], counts[counts.index(0)] = counts[place] - 1, 1
    return ",".join(map(str, counts))


def plan(row: Row) -> Plan:
    dp, zero = number(row, "dp"), number(row, "zero_stage", 0)
    micro = max(1, number(row, "global_batch") // (dp * number(row, "micro_batch")))
    interleave, pp = number(row, "interleave"), number(row, "pp")
    sharded = dp > 1 and zero > 0
    precision = row["precision"] if row["precision"] in ("bf16", "fp16", "fp8", "fp32") else "bf16"
    tp = number(row, "tp")
    return Plan(
        dp_replicate=1 if sharded else dp,
        dp_shard=dp if sharded else 1,
        zero=zero or 3,
        tp=tp,
        sp=row["sequence_parallel"] == "1" and tp > 1,
        cp=number(row, "cp"),
        pp=pp,
        ep=number(row, "ep"),
        schedule="interleaved" if interleave > 1 and pp > 1 else "1f1b",
        virtual=interleave if interleave > 1 and pp > 1 else 1,
        microbatches=micro,
        split=split(row),
        recompute=row["recompute"] if row["recompute"] in ("full", "selective") else "none",
        precision=precision,
        compile=row.get("compiled") == "1",
    )


def pricer(row: Row, chosen: Plan) -> Pricer:
    """The pricer of a row. nanotron accumulates gradients in flat buffers that live from step to step; its jobs of 2025 gather a
    region's input again in the backward (tp_recompute_allgather), those before keep it: with equal plans twice the activations.
    """
    found = Pricer.of(blueprint(row), cluster(row), chosen.precision, chosen.compile)
    if row["source_id"] != "nanotron-playbook":
        return found
    job = re.search(r"job (\d+)", row["notes"])
    again = job is not None and int(job[1]) > LAST_GATHERED_JOB
    shape, kept = found.shape, blueprint(row).__dict__["_pricers"]
    if (found, again) not in kept:
        units = {name: getattr(shape, name) for name in ("before", "after")} | {str(n): k for n, k in enumerate(shape.kinds)}
        if again:
            units = {name: replace(k, kept=tuple(replace(each, enters=False) for each in k.kept)) for name, k in units.items()}
        kinds = tuple(units[str(n)] for n in range(len(shape.kinds)))
        changed = replace(shape, kinds=kinds, before=units["before"], after=units["after"])
        kept[found, again] = Pricer(changed, found.cluster, found.precision)
        kept[found, again].flat_gradients = True
    return kept[found, again]


def predicted(row: Row) -> Prediction:
    """The prediction for a row; where the source does not say, recompute is the least that fits."""
    chosen = plan(row)
    prices = pricer(row, chosen)
    batch = chosen.dp_replicate * chosen.dp_shard * chosen.microbatches * number(row, "micro_batch")
    tried: Any = None
    for recompute in [row["recompute"]] if row["recompute"] else ("none", "selective", "full"):
        fields = chosen.to_json() | {"recompute": recompute if recompute in ("full", "selective") else "none"}
        found = prices.price(Plan(**fields), batch)
        tried = restated(found, *(each * found.memory_bytes["gradients"] / 4 for each in gradient_bytes(row)))
        if tried.fits:
            break
    return tried


def gradient_bytes(row: Row) -> tuple[float, float]:
    """Bytes per parameter for gradients beyond the four that are counted: during the backward, and after it.

    From the bytes that the logs show between steps. NeMo's recipes keep them in 16 bits (grad_reduce_in_fp32=False): 44.27 and
    34.47 GB are 2 + 2 + 12/dp bytes to 1 %. nanotron's data-parallel runs keep 16-bit buckets of torch's DDP beside the fp32
    accumulators: 18.1 in all on one data rank, 20.1 on more. With zero=1 these are 10 + 16/dp: at the step also the 16-bit
    gradients and the parts of its reduce-scatter, when no activation lives.
    """
    if row["source_id"] == "dgxc":
        return -2.0, -2.0
    dp = number(row, "dp")
    if row["source_id"] != "nanotron-playbook" or dp == 1:
        return 0.0, 0.0
    return 2.0, 4.0 + 4.0 / dp if row["zero_stage"] == "1" else 2.0


def restated(found: Prediction, during: float, after: float) -> Prediction:
    """The prediction with more bytes of gradients: `during` the backward, and `after` it, when no activation lives."""
    parts = found.memory_bytes
    static = parts["parameters"] + parts["gradients"] + parts["optimizer"]
    more = max(during, static + after - parts["peak"])
    parts = parts | {"gradients": parts["gradients"] + more, "peak": parts["peak"] + more}
    device = found.device_bytes + more
    return replace(
        found,
        memory_bytes=parts,
        fits=device <= found.capacity_bytes,
        reserved_bytes=found.reserved_bytes + more,
        device_bytes=device,
    )


def attempt(row: Row) -> Prediction | str:
    try:
        return predicted(row)
    except MeshwrightError as error:
        return str(error)
