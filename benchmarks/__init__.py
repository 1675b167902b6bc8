"""Check, then time: `python -m benchmarks conv2d`, `python -m benchmarks networks`. A wrong kernel is not timed."""

import os

ENVIRONMENT = dict(os.environ)  # as it was before minires asks OpenMP's threads to sleep: peers keep their own ways
