"""How long a whole run takes: the FLOPs of its programs, how often each runs, and an assumed part of the peak."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from spo_jax.planning.planner import Need, Plan, aligned
from spo_jax.planning.targets import Target

# The part of a chip's peak that a run is assumed to reach; docs/memory.md says what others have reached.
SHARES = {"cuda": 0.3, "tpu": 0.4}
_LEAST = 0.05  # hours; what is shorter is shown as such


def hours_of(needs: Sequence[Need], executions: Mapping[str, int], tflops: float) -> dict[str, float]:
    """Hours in a whole run by program.

    Args:
      needs: of the programs; what one computes on each device is done by all devices at the same time.
      executions: how often each program runs; one that is not in it is left out, and so is one that only moves data.
      tflops: TFLOP/s that each device reaches.
    """
    known = [need for need in needs if need.program in executions and need.flops]
    return {need.program: executions[need.program] * need.flops / (tflops * 1e12) / 3600 for need in known}


def report(config: ConfigDict, target: Target, plan: Plan, share: float | None = None) -> str:
    """A table and a sentence; empty if the peak of the target is not known. ``share`` None: that of ``SHARES``."""
    if target.chip is None:
        return ""
    share, peak = share or SHARES[target.platform], target.chip.tflops[config.dtype]
    hours = hours_of(plan.needs, plan.run.executions, share * peak)
    rows = [["of the whole run", "executions", "hours"]]
    rows += [[name, f"{plan.run.executions[name]:,}", _shown(count)] for name, count in hours.items()]
    rows.append(["together", "", _shown(sum(hours.values()))])
    pairs = ", if every pair is valid" if config.method == "spo" else ""
    peak_words = f"{100 * share:g} % of the peak of {peak:g} TFLOP/s in {config.dtype}"
    return f"{aligned(rows)}\n\nThese are the hours of a whole run{pairs}, at an assumed {peak_words} (--share)."


def _shown(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= _LEAST else "< 0.1"
