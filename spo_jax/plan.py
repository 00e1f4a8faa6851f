"""Says whether a training run fits hardware that need not be there, which setting does if not, and how long it takes.

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
    "target",
    "cpu",
    "v5e, v6e or v5p with a topology (v5e:2x4), h100 or h100:8, cpu or cpu:8; with --estimate also a100-80, a100-40, "
    "l4, rtx4090 and rtx3090.",
)
ESTIMATE = flags.DEFINE_bool("estimate", False, "Estimate instead of compiling.")
MEMORY = flags.DEFINE_float(
    "memory",
    None,
    "GiB of a GPU that is no target, such as 12; with --target=h100 --estimate. No hours are given then.",
    lower_bound=1,
)
SHARE = flags.DEFINE_float(
    "share",
    None,
    "Part of the chip's peak that a run reaches, for the hours; by default 0.3 on GPUs and 0.4 on TPUs, an assumption.",
    lower_bound=0.01,
    upper_bound=1,
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
    from spo_jax.planning import hours, planner  # JAX models, seconds; a wrong flag should not wait for them

    planner.check(config, target)
    plan = planner.make_plan(config, target, exact=not ESTIMATE.value)
    print(planner.heading(config, target, exact=not ESTIMATE.value), end="\n\n")
    print(planner.table(plan, target), end="\n\n")
    if plan.fits and (said := hours.report(config, target, plan, SHARE.value)):
        print(said, end="\n\n")
    print(planner.verdict(plan, target))
    if ESTIMATE.value:
        more = "; leave --estimate out before you pay" if target.compiles else " for an H100; an exact plan is of one"
        print(f"This is an estimate, within 20 % of what the compiler needs{more}.")
    if plan.fits:
        return
    exact = CONFIRM.value and not ESTIMATE.value
    if (found := planner.smaller(config, target, exact=exact)) is None:
        print(f"No smaller setting was found that fits {target.name}; use devices with more memory, or more devices.")
    else:
        plan, changed = found
        how = "compiled" if exact else "estimated"
        print(f"This fits: {planner.overrides(changed)}\n({how}: {planner.verdict(plan, target)})")
        if said := hours.report(config, target, plan, SHARE.value):
            print(f"\n{said}")
    sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
