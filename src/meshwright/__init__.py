"""meshwright: any PyTorch module under any mix of parallelism, with the same numbers as on one device."""
