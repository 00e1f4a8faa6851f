"""A process of a small run with checkpoints: -m tests.system.preempted_loop ADDRESS COUNT INDEX WORKDIR STEPS SEED."""

import sys
import time

import jax
import jax.numpy as jnp

from spo_jax.distributed.mesh import make_mesh
from spo_jax.errors import UserError
from spo_jax.runs import checkpoint, preemption


def main(workdir: str, num_steps: int, seed: int) -> None:
    checkpoint.check_workdir(workdir, {"seed": seed})
    mesh = make_mesh(data=1, fsdp=-1)
    sharding = jax.NamedSharding(mesh, jax.P("fsdp"))
    state = {"x": jax.device_put(jnp.zeros(8, jnp.uint32), sharding)}
    update = jax.jit(lambda state: {"x": 3 * state["x"] + jnp.roll(state["x"], 1) + 1}, donate_argnums=0)
    manager = checkpoint.make_manager(f"{workdir}/checkpoints", keep=3)
    restored = checkpoint.restore_latest(manager, state)
    first = 0
    if restored is not None:
        state, extra = restored
        first = extra["step"]
        print(f"from {first}", flush=True)
    with preemption.watch() as preempted:
        for step in range(first + 1, num_steps + 1):
            state = jax.block_until_ready(update(state))
            time.sleep(0.01)
            stop = preempted()
            if stop or step == num_steps or step % 20 == 0:
                checkpoint.save(manager, step, state, {"step": step})
            if stop:
                break
            print(f"done {step}", flush=True)
        checkpoint.close(manager)
    print(f"last {step}", flush=True)


if __name__ == "__main__":
    address, count, index, workdir, num_steps, seed = sys.argv[1:]
    if int(count) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(address, int(count), int(index), heartbeat_timeout_seconds=10)
    try:
        main(workdir, int(num_steps), int(seed))
    except UserError as error:
        sys.exit(str(error))
