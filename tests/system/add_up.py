"""Run by test_processes.py: joins the other processes, adds up over all of them, and ends as ENDS says."""

import os
import sys

from spo_jax import cli
from spo_jax.errors import UserError

cli.process_flags()


def main() -> None:
    """Prints process and sum of (process + 1); process 1 then ends as it is told, the others go on adding."""
    cli.start_processes()
    import jax
    import numpy as np

    from spo_jax.distributed.processes import is_main_process

    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    split, whole = (jax.NamedSharding(mesh, spec) for spec in (jax.P("data"), jax.P()))
    add = jax.jit(lambda x: x.sum(), out_shardings=whole)

    def total() -> float:
        mine = np.full(1, jax.process_index() + 1, np.float32)
        return float(add(jax.make_array_from_process_local_data(split, mine)))

    print(jax.process_index(), jax.process_count(), is_main_process(), total(), flush=True)
    end = os.environ.get("ENDS")
    if end and jax.process_index() == 1:
        if end == "mistake":
            raise UserError("A file is missing here.")
        os._exit(9)
    for _ in range(1000 if end else 0):
        total()
    sys.stdout.flush()


if __name__ == "__main__":
    cli.run(main)
