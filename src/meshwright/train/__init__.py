"""What the `train` command adds to the engine: configuration, data, the loop, metrics, starting ranks."""
