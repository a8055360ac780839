"""A cluster's text, its catalog, its files, and what is wrong with them in one sentence."""

import json
from pathlib import Path

import pytest
import torch

import meshwright as mw
from meshwright.cluster import Cluster, catalog, history, probe
from meshwright.errors import ConfigError
from meshwright.parallel.auto import choose
from meshwright.plan.collectives import all_reduce, gather, group, scatter

NAMES = "V100-16GB V100-32GB A100-40GB A100-80GB H100-80GB H100-PCIe H100-96GB-500W H800 H200 B200 B300 GB200 GB300 L40S RTX4090"


@pytest.mark.parametrize("name", [*NAMES.split(), "MI250X", "MI300X", "CPU"])
def test_every_promised_device_is_in_the_catalog_with_its_source(name: str) -> None:
    cluster = Cluster.parse(f"2x8x{name}")
    assert cluster.devices == 16
    assert cluster.device.peak_flops("float32") > 0
    assert catalog.find(name)[1]["source"]
    assert Cluster.from_json(cluster.to_json()) == cluster


def test_overrides_are_what_a_collective_gets() -> None:
    cluster = Cluster.parse("384x8xA100-80GB,intra=200,inter=12.5,memory=70,price=2")
    assert (cluster.nodes, cluster.per_node, cluster.domain) == (384, 8, 8)
    assert cluster.intra.bytes_per_s == 200e9
    assert cluster.inter.bytes_per_s == 12.5e9
    assert cluster.device.memory_bytes == 70e9
    assert cluster.device.price == 2


def test_the_fast_link_of_a_rack_joins_its_hosts() -> None:
    assert Cluster.parse("18x4xGB200").domain == 72
    assert Cluster.parse("4xGB200").domain == 4


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("8xH101", "'H100"),
        ("8xH100,inter=fast", "is not a number"),
        ("8xH100,speed=3", "'speed'"),
        ("0x8xH100", "at least 1"),
        ("8xH100,inter=0", "more than 0"),
        ("8xH100,inter=nan", "finite"),
        ("8xH100,inter=3,inter=4", "given twice"),
        ("nowhere.toml", "can't be read"),
    ],
)
def test_mistakes_cost_one_sentence(text: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Cluster.parse(text)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_toml_describes_any_hardware(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'nodes = 2\nper_node = 4\n[device]\nlike = "H100-80GB"\nname = "H100 NVL"\nmemory_gb = 94\n[inter]\ngb_s = 20\n'
    )
    cluster = Cluster.parse(str(path))
    assert (cluster.devices, cluster.device.name, cluster.device.memory_bytes) == (8, "H100 NVL", 94e9)
    path.write_text('[device]\nname = "new"\n')
    with pytest.raises(ConfigError, match="lacks peak_tflops"):
        Cluster.parse(str(path))
    for line, near in (
        ('per_nod = 4\ndevice = "H100-80GB"', "'per_nod': the nearest is 'per_node'"),
        ('nodes = "two"\ndevice = "H100-80GB"', "nodes='two'"),
        ('[device]\nlike = "H100-80GB"\nmemory = 94', "'memory': the nearest is 'memory_gb'"),
        ('device = "H100-80GB"\n[inter]\ngb = 20', "'gb': the nearest is 'gb_s'"),
    ):
        path.write_text(line)
        with pytest.raises(ConfigError, match=near):
            Cluster.parse(str(path))


def _probe(**changes: object) -> dict[str, object]:
    """What a probe of a two-core machine might have found, by hand."""
    points = [[4096, 1e-3], [1 << 20, 2e-3], [1 << 24, 17e-3]]
    line = {"latency_s": 1e-3, "bytes_per_s": 1e9, "points": points}
    group = {"all_reduce": line, "all_gather": line, "reduce_scatter": line}
    shapes = ((128, 32), (1024, 64))
    found = {
        "version": probe.VERSION,
        "device": "cpu",
        "products": [{"m": n, "n": n, "k": n, "flops_per_s": n * 1e7} for n in (64, 1024)],
        "attention": [{"length": s, "head": h, "flops_per_s": 1e9 * h, "back_flops_per_s": 5e8 * h} for s, h in shapes],
        "kernel_s": 5e-6,
        "memory_bytes_per_s": 8e9,
        "pointwise_bytes_per_s": 4e9,
        "causal_part": 0.75,
        "conv_flops_per_s": 5e9,
        "conv_back_flops_per_s": 4e9,
        "fault_s_per_byte": 4e-10,
        "disk_bytes_per_s": 1e8,
        "backend": "gloo",
        "collectives": {
            "2": {"flops_per_s": 1024e7, "memory_bytes_per_s": 6e9, "pointwise_bytes_per_s": 4e9, "groups": {"2": group}}
        },
    }
    return found | changes


@pytest.fixture
def on_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHWRIGHT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("on_cpu")
def test_a_probe_is_kept_and_read_back() -> None:
    assert not Cluster.here(2).device.rates
    probe.save(_probe())
    after = Cluster.here(2)
    assert after.device.peak_flops("float32") == 1024e7
    assert after.device.memory_bytes_per_s == 6e9  # of each rank while both work
    assert Cluster.here(1).device.memory_bytes_per_s == 8e9
    assert Cluster.from_json(json.loads(json.dumps(after.to_json()))) == after
    probe.save(_probe(version=1))
    assert not Cluster.here(2).device.rates  # an older probe measured other things


@pytest.mark.usefixtures("on_cpu")
def test_collectives_take_what_was_measured_between_the_nearest_sizes() -> None:
    probe.save(_probe())
    pair = group(Cluster.here(2), 2, 1)
    assert all_reduce(pair, 4096) == pytest.approx(1e-3)
    assert gather(pair, (1 << 20) + (15 << 19)) == pytest.approx(9.5e-3)  # half way
    assert scatter(pair, 1 << 25) == pytest.approx(33e-3)  # beyond, as between the last two
    assert all_reduce(pair, 0) == 0


@pytest.mark.usefixtures("on_cpu")
def test_attention_of_a_probe_gives_back_what_was_measured() -> None:
    probe.save(_probe())
    rates = dict(Cluster.here(2).device.rates)
    peak = 1024e7

    def rate(length: int, head: int) -> float:
        shape = length / (length + rates["attention_s0"]) * head / (head + rates["attention_head0"])
        return peak * rates["attention"] * shape

    assert rate(1024, 64) / rate(128, 32) == pytest.approx(2, rel=0.1)
    assert rates["attention_back"] == pytest.approx(0.5)
    assert rates["causal_block"] == pytest.approx(probe.CAUSAL / 2)


def test_a_gpu_that_nobody_knows_gets_no_other_gpus_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H20")
    with pytest.raises(ConfigError, match=r"'NVIDIA H20' is not in the catalog.*TOML.*H[12]00") as caught:
        Cluster.here(2)
    assert "\n" not in str(caught.value)
    blueprint = mw.inspect("gpt:layers=2,hidden=64,heads=4,vocab=256", seq=64)
    plan, prediction = choose(blueprint, "auto", 2, 4)
    assert (plan.dp_shard, prediction) == (2, None)  # sharded over all, and said so


@pytest.mark.usefixtures("on_cpu")
def test_errors_of_past_runs_are_remembered() -> None:
    history.remember({"predicted_seconds": 1.1, "measured_seconds": 1.0})
    assert history.errors(history.recall(), "seconds") == pytest.approx(0.1)
    assert history.errors(history.recall(), "bytes") is None
