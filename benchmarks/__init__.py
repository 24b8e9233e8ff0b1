"""One script per question about time and memory, each run as `python -m benchmarks.NAME`."""
