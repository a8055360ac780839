"""Published runs as (model spec, cluster text, plan text): how a row of shared/published becomes a prediction; no constants."""

from __future__ import annotations

import csv
import os
import re
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
EFA_US = 42
"""A step over EFA: what all-gathers of 1 GiB on 32 to 512 ranks take beyond their bytes, per rank (nanotron's own measurements)."""
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
    text = f"{max(1, gpus // each)}x{min(each, gpus)}x{name}" + network(row["inter_node_link"], each)
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
    return f",inter={line * LINK_EFFICIENCY:.4g}" + (f",inter_us={EFA_US}" if "EFA" in link else "")


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
        recompute=row["recompute"] if row["recompute"] in ("full", "selective") else "none",
        precision=precision,
        compile=row.get("compiled") == "1",
    )


def predicted(row: Row) -> Prediction:
    """The prediction for a row; where the source does not say, recompute is the least that fits."""
    chosen = plan(row)
    pricer = Pricer.of(blueprint(row), cluster(row), chosen.precision, chosen.compile)
    batch = chosen.dp_replicate * chosen.dp_shard * chosen.microbatches * number(row, "micro_batch")
    if row["recompute"]:
        return pricer.price(chosen, batch)
    tried: Any = None
    for recompute in ("none", "selective", "full"):
        tried = pricer.price(Plan(**(chosen.to_json() | {"recompute": recompute})), batch)
        if tried.fits:
            break
    return tried


def attempt(row: Row) -> Prediction | str:
    try:
        return predicted(row)
    except MeshwrightError as error:
        return str(error)
