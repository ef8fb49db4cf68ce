"""``python -m nexus_jax.targets JOB``: see :mod:`nexus_jax.targets.worker`."""

import pathlib
import sys

from nexus_jax.targets.worker import main

if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
