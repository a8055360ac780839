"""What a run runs on: devices, links, and the catalog of known hardware."""
