"""What a run leaves that has tuned a UNet: its result, and summary, scores, report and model card."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import flax.traverse_util
import numpy as np
from jaxtyping import PyTree

from spo_jax.distributed.mesh import fetch
from spo_jax.distributed.processes import is_main_process, say
from spo_jax.evaluation.measure import summarize, write_scores
from spo_jax.evaluation.metrics import Described
from spo_jax.formats.lora_write import write_kohya, write_lora
from spo_jax.formats.pipeline import Pipeline
from spo_jax.formats.write_pipeline import write_pipeline
from spo_jax.images import to_uint8
from spo_jax.runs.held_out import HeldOut, measure_images, measure_model, sheet_of, untrained
from spo_jax.runs.loop import Loop
from spo_jax.runs.metrics import METRICS_FILE, read_metrics, write_summary
from spo_jax.runs.tuning import Tuning
from spo_jax.runs.tuning_card import write_model_card
from spo_jax.runs.tuning_report import write_report
from spo_jax.runs.words import Words

NUM_REPORT_IMAGES = 24


def finish(
    made: Tuning,
    loop: Loop,
    held_out: HeldOut,
    words: Words,
    began: float,
    *,
    unlearned: str | None = None,
    more: Mapping[str, object] = MappingProxyType({}),
) -> dict[str, object]:
    """Measures base and tuned model and writes everything that a run leaves; returns the summary.

    Args:
      made: what the run is made of.
      loop: at its end.
      held_out: the prompts to measure on.
      words: of the method, for report and model card.
      began: time when this process began the run.
      unlearned: what the method tells a user whose run has ended as it began; that adapters are still zero is told
        here.
      more: what the method adds to the summary.
    """
    config, workdir, result = made.config, loop.workdir, loop.state.result
    seconds_training = loop.seconds
    write_result(workdir, made.pipeline, result)
    unlearned = unlearned or still_zero(fetch(result.get("lora")), int(loop.state.step))
    base = measure_model(made, untrained(result), held_out)
    tuned = measure_model(made, result, held_out)
    metrics: dict[str, Described] = {**made.metrics}
    if is_main_process():
        metrics |= measure_images(made, {"base": base, "tuned": tuned})
    summary = {
        **summarize(base, tuned, metrics),
        **more,
        "seconds": round(time.time() - began + loop.extra["seconds"], 1),
        "seconds_training": round(seconds_training, 1),
        "seed": config.seed,
        "config": config.to_dict(),
    }
    if not is_main_process():
        return summary
    say(unlearned)
    write_summary(workdir / "summary.json", summary)
    loop.run.write_summary(summary)
    write_scores(workdir / "evaluation.csv", made.held_out, {"base": base, "tuned": tuned})
    images = zip(made.held_out, to_uint8(base.images), to_uint8(tuned.images), strict=True)
    write_report(
        workdir / "report.html",
        words,
        summary=summary,
        metrics=metrics,
        rows=read_metrics(workdir / METRICS_FILE),
        samples=list(images)[:NUM_REPORT_IMAGES],
    )
    xl = made.pipeline.text_encoder_2 is not None
    write_model_card(workdir / "README.md", words, summary=summary, metrics=metrics, sheet=sheet_of(loop), xl=xl)
    wins = ", ".join(
        f"{rate:.1%} by {_in_a_sentence(metrics[name].title)}" for name, rate in summary["win_rate"].items()
    )
    if np.array_equal(base.images, tuned.images):
        wins = "none, as its images are those of the base model,"
    print(
        f"Tuned model wins on {wins or 'no metric'} of {len(made.held_out)} held-out prompts.\n"
        f"Report: {workdir / 'report.html'}\nNumbers: {workdir / 'summary.json'}\n"
        + (f"Adapters: {workdir}" if config.lora.rank else f"Model: {workdir / 'model'}")
    )
    return summary


def still_zero(adapters: PyTree | None, num_updates: int) -> str | None:
    """What to tell a user whose adapters are as they began, all of their B zero; None if they have learned.

    ``adapters`` are those of the result, None after full fine-tuning; ``num_updates`` minibatches since the start.
    """
    flat = flax.traverse_util.flatten_dict(adapters or {})
    if flat and not any(np.any(value) for path, value in flat.items() if path[-1] == "B"):
        return (
            f"warning: nothing was learned: after {num_updates} minibatches every adapter is still zero; grad_norm in "
            f"{METRICS_FILE} shows whether there were gradients, and config.train.learning_rate, max_grad_norm and "
            "adam_eps what became of them."
        )
    return None


def write_result(workdir: Path, pipeline: Pipeline, trained: PyTree) -> None:
    """Writes the two LoRA files, or after full fine-tuning the pipeline folder ``model``.

    All processes must call this; the first one writes.
    """
    trained = fetch(trained)
    if not is_main_process():
        return
    if "lora" in trained:
        lora = {"unet": trained["lora"]}
        write_lora(workdir, lora)
        kind = str(pipeline.scheduler_config.get("prediction_type", "epsilon"))
        write_kohya(workdir, lora, pipeline.params["unet"], prediction_type=kind, image_size=pipeline.image_size)
    elif not (workdir / "model").exists():
        write_pipeline(
            workdir / "model",
            pipeline.folder,
            trained["params"],
            replaced=pipeline.replaced,
            variant=pipeline.variant,
        )


def _in_a_sentence(title: str) -> str:
    """A title whose first letter is small, unless it is a name such as CLIP."""
    return title.lower() if title[1:].islower() else title
