"""What a run shows at its end: summary, report and model card."""

from __future__ import annotations

import contextlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from spo_jax.data.placed_pairs import to_devices
from spo_jax.data.preferences import total_state
from spo_jax.distributed.processes import is_main_process
from spo_jax.images import to_uint8
from spo_jax.runs.metrics import METRICS_FILE, read_metrics, write_summary
from spo_jax.runs.pair_data import validation_loader
from spo_jax.spm.card import write_preference_card
from spo_jax.spm.report import ShownPair, write_spm_report
from spo_jax.spm.steps import Training, best_step

NUM_REPORT_PAIRS = 8


def finish(run: Training, began: float) -> dict[str, object]:
    """Writes everything that a run leaves beside its models; returns the summary."""
    config, loop, workdir = run.spm.config, run.loop, run.workdir
    best = best_step(run.accuracy)
    shown = {"start": 0, "best": best, "last": config.num_steps}
    summary = {
        "accuracy": {name: run.accuracy[str(step)] for name, step in shown.items()},
        "best_step": best,
        "records": total_state(run.loader.state())["counts"],
        "seconds": round(time.time() - began + loop.extra["seconds"], 1),
        "seed": config.seed,
        "config": config.to_dict(),
    }
    pairs = shown_pairs(run)
    if not is_main_process():
        return summary
    write_summary(workdir / "summary.json", summary)
    loop.run.write_summary(summary)
    rows = read_metrics(workdir / METRICS_FILE)
    write_spm_report(workdir / "report.html", summary=summary, metrics=rows, pairs=pairs)
    write_preference_card(workdir / "README.md", summary=summary)
    print(
        f"Preference models: {workdir / 'best'} (step {best}) and {workdir / 'last'}\n"
        f"Report: {workdir / 'report.html'}\nNumbers: {workdir / 'summary.json'}"
    )
    return summary


def shown_pairs(run: Training) -> list[ShownPair]:
    """The first validation pairs as the last model sees them at each timestep."""
    spm = run.spm
    with contextlib.closing(validation_loader(spm.config, spm.pipeline.image_size)) as loader:
        batch = next(loader)
    pairs = to_devices(spm.tokenizers, batch, spm.mesh)

    def seen(timestep: int) -> tuple[np.ndarray, np.ndarray]:
        looked = spm.programs["report"](
            spm.frozen, run.loop.state.result, pairs, jnp.int32(timestep), run.validation_key
        )
        return jax.device_get(looked)

    columns = zip(*(seen(timestep) for timestep in spm.config.validation.timesteps), strict=True)
    images, scores = (np.stack(column, axis=1) for column in columns)  # [B, T, 2, ...]
    usable = np.flatnonzero(batch.weights)[:NUM_REPORT_PAIRS]
    return [ShownPair(batch.captions[i], to_uint8(images[i]), scores[i], batch.labels[i]) for i in usable]
