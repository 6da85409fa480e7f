"""Start-up, fan-out, all-to-all and shutdown against the number of workers: `python -m benchmarks.scaling`."""
