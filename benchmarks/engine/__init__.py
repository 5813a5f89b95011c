"""What `python -m benchmarks.engine` measures, in parts."""
