"""Check, then time: `python -m benchmarks conv2d`, `python -m benchmarks networks`. A wrong kernel is not timed."""
