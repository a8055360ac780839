"""A cluster's text, its catalog, its files, and what is wrong with them in one sentence."""

from pathlib import Path

import pytest

from meshwright.cluster import Cluster, catalog, history, probe
from meshwright.errors import ConfigError

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


def test_a_probe_is_kept_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHWRIGHT_CACHE", str(tmp_path))
    before = Cluster.here(2)
    products = [{"m": n, "n": n, "k": n, "flops_per_s": n * 1e7} for n in (64, 1024)]
    rates = {"kernel_s": 5e-6, "memory_bytes_per_s": 8e9, "pointwise_bytes_per_s": 4e9, "attention_flops_per_s": 5e9}
    link = {"2": {"latency_s": 1e-4, "bytes_per_s": 1e9}}
    probe.save({"device": "cpu", "products": products, **rates, "disk_bytes_per_s": 1e8, "collectives": link, "backend": "gloo"})
    after = Cluster.here(2)
    assert after != before or after.device.rates
    if after.device.kernels == "cpu":
        assert after.device.peak_flops("float32") <= 1024e7
        assert after.intra.bytes_per_s == 1e9
    history.remember({"predicted_seconds": 1.1, "measured_seconds": 1.0})
    assert history.errors(history.recall(), "seconds") == pytest.approx(0.1)
    assert history.errors(history.recall(), "bytes") is None
