"""Says whether a training run fits hardware that need not be there, and which setting does if it does not.

    python -m spo_jax.plan --config=configs/sdxl.py --target=v5e:2x4            compiles the run's programs: minutes
    python -m spo_jax.plan --config=configs/sdxl.py --target=h100:4 --estimate  follows their arrays: half a minute

No weights, no network and no accelerator are needed. Exit code 1 if the run does not fit.
"""

from __future__ import annotations

import sys

from absl import flags

from spo_jax import cli
from spo_jax.errors import UserError
from spo_jax.planning.targets import parse_target

CONFIG = cli.config_flag()
TARGET = flags.DEFINE_string(
    "target", "cpu", "v5e, v6e or v5p with a topology (v5e:2x4), h100 or h100:8, cpu or cpu:8."
)
ESTIMATE = flags.DEFINE_bool("estimate", False, "Estimate instead of compiling.")
MEMORY = flags.DEFINE_float(
    "memory",
    None,
    "GiB of a GPU that has not an h100's 79.2, such as 24; with --target=h100 --estimate.",
    lower_bound=1,
)
CONFIRM = flags.DEFINE_bool(
    "confirm", True, "Compile the smaller setting, too, that is proposed if a run does not fit."
)


def main() -> None:
    """Plans, prints, and exits with 1 if the run does not fit."""
    config = cli.config_of(CONFIG)
    if MEMORY.value is not None and not ESTIMATE.value:
        raise UserError("--memory goes with --estimate: programs are compiled for an h100 only.")
    target = parse_target(TARGET.value, MEMORY.value)
    from spo_jax.planning import planner  # JAX models, seconds; a wrong flag should not wait for them

    planner.check(config, target)
    plan = planner.make_plan(config, target, exact=not ESTIMATE.value)
    print(planner.heading(config, target, exact=not ESTIMATE.value), end="\n\n")
    print(planner.table(plan, target), end="\n\n")
    print(planner.verdict(plan, target))
    if ESTIMATE.value:
        print("This is an estimate, within 20 % of what the compiler needs; leave --estimate out before you pay.")
    if plan.fits:
        return
    exact = CONFIRM.value and not ESTIMATE.value
    if (found := planner.smaller(config, target, exact=exact)) is None:
        print(f"No smaller setting was found that fits {target.name}; use devices with more memory, or more devices.")
    else:
        plan, changed = found
        how = "compiled" if exact else "estimated"
        print(f"This fits: {planner.overrides(changed)}\n({how}: {planner.verdict(plan, target)})")
    sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
