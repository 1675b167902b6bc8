"""`python -m benchmarks`."""

import sys

from cyclopts import App

from .kernels import kernels
from .networks import networks

app = App(name="benchmarks", help="Check, then time.", help_format="plaintext")
app.default(kernels)
app.command(networks)

if __name__ == "__main__":
    try:
        app()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        sys.exit(2)
