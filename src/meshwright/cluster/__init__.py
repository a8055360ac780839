"""What a run runs on: devices, links, and the catalog of known hardware."""

from meshwright.cluster.cluster import Cluster, Device, Link

__all__ = ["Cluster", "Device", "Link"]
