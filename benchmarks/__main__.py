"""`python -m benchmarks`."""

import sys

from cyclopts import App, Parameter

from .accuracy import accuracy
from .fuzz import fuzz
from .gradient_error import gradient_error
from .kernels import kernels
from .loader import loader
from .memory import memory
from .networks import networks
from .profile import profile
from .readme import readme
from .resume_cycles import resume_cycles
from .roofline import roofline
from .transfer import transfer

app = App(name="benchmarks", help="Check, then time.", help_format="plaintext")
app.default_parameter = Parameter(consume_multiple=True, negative_iterable=())  # --seeds 0 1, or --seeds 0 --seeds 1
app.default(kernels)
app.command(networks)
app.command(profile)
app.command(resume_cycles)
app.command(loader)
app.command(memory)
app.command(transfer)
app.command(accuracy)
app.command(fuzz)
app.command(gradient_error)
app.command(roofline)
app.command(readme)

if __name__ == "__main__":
    try:
        app()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        sys.exit(2)
