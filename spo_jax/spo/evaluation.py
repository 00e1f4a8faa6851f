"""What a run shows: validation images, and at its end summary, scores, report and model card."""

from __future__ import annotations

import time
from operator import itemgetter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from spo_jax.distributed.mesh import fetch
from spo_jax.distributed.offload import to_device
from spo_jax.distributed.processes import is_main_process
from spo_jax.errors import UserError, first_line, notice
from spo_jax.evaluation.image_metric import ImageMetric
from spo_jax.evaluation.image_metrics import MetricOptions, open_metric
from spo_jax.evaluation.measure import Measured, Texts, measure, summarize, write_scores
from spo_jax.evaluation.metrics import Described
from spo_jax.formats.lora_write import write_kohya, write_lora
from spo_jax.formats.tokenizers import tokenize
from spo_jax.formats.write_pipeline import write_pipeline
from spo_jax.images import grid, to_uint8, write_png
from spo_jax.runs.loop import Loop
from spo_jax.runs.metrics import METRICS_FILE, read_metrics, write_summary
from spo_jax.spo.assemble import SPO, reading_metrics, text_metric_params
from spo_jax.spo.card import write_model_card
from spo_jax.spo.report import write_report
from spo_jax.spo.steps import encode_texts, in_pieces
from spo_jax.spo.update import nothing_learned
from spo_jax.types import PromptBatch

HeldOut = tuple[PromptBatch, Texts]  # the held-out prompts, encoded for the networks and for the metrics

NUM_REPORT_IMAGES = 24
READABLE_WIDTH = 96  # pixels; smaller images, as of the emoji, are enlarged on validation sheets


def encode_held_out(spo: SPO) -> HeldOut:
    """Encodes the held-out prompts, ``config.prompts_per_batch`` at a time."""
    metrics, params = reading_metrics(spo), to_device(text_metric_params(spo))

    def encode(some: list[str]) -> Texts:
        tokens = {name: tokenize(tokenizer, some) for name, (_, tokenizer) in metrics.items()}
        return spo.programs["metric texts"](params, tokens)

    pieces = list(in_pieces(encode, spo.held_out, spo.config.prompts_per_batch))
    return encode_texts(spo, spo.held_out), jax.tree.map(lambda *rows: jnp.concatenate(rows), *pieces)


def measure_model(spo: SPO, trained: PyTree, held_out: HeldOut, key: jax.Array) -> Measured:
    """Images of the UNet with the variables ``trained``, and their scores; all processes get all of them."""
    params, size = to_device(spo.metric_params), min(spo.config.evaluation.batch_size, len(spo.held_out))
    return measure(spo.programs["evaluation"], params, trained, held_out, key, batch_size=size, mesh=spo.mesh)


def measure_images(spo: SPO, models: dict[str, Measured]) -> dict[str, ImageMetric]:
    """Adds the scores of the metrics that see finished images, by the first process; returns these metrics.

    One that cannot be loaded, or does not fit the device beside the run, is told and left out.
    """
    found: dict[str, ImageMetric] = {}
    for text in spo.config.evaluation.metrics:
        if text in spo.metrics:
            continue
        name, _, place = text.partition("=")
        try:
            metric = open_metric(name, place or None, MetricOptions())
            made = [metric.score(list(to_uint8(measured.images)), spo.held_out) for measured in models.values()]
        except (UserError, jax.errors.JaxRuntimeError) as error:
            notice(f"config.evaluation.metrics: {name} is left out. {first_line(error)}")
            continue
        for measured, scores in zip(models.values(), made, strict=True):
            measured.scores[name] = scores
        found[name] = metric
    return found


def measure_curve(spo: SPO, loop: Loop, held_out: HeldOut, key: jax.Array) -> dict[str, float]:
    """Means of the tuned model on the held-out prompts by metric, ``evaluation/NAME``, for the row of a batch."""
    measured = measure_model(spo, loop.state.result, held_out, key)
    if is_main_process():
        measure_images(spo, {"tuned": measured})
    return {f"evaluation/{name}": float(np.mean(scores)) for name, scores in measured.scores.items()}


def untrained(trained: PyTree) -> PyTree:
    """The base model in the form of ``trained``: adapters of zeros, so that the program for tuned adapters serves it.

    In full fine-tuning that is {}: nothing is laid over the base weights.
    """
    adapters = {name: part for name, part in trained.items() if name == "lora"}
    return jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), adapters)


def show_validation(spo: SPO, loop: Loop, workdir: Path, held_out: HeldOut, key: jax.Array) -> None:
    """Writes a sheet of images of the first held-out prompts."""
    prompts, texts = held_out
    some = prompts.map_rows(itemgetter(slice(spo.config.validation.num_prompts)))
    images = measure_model(spo, loop.state.result, (some, texts), key).images
    if is_main_process():
        sheet = grid(to_uint8(images))
        zoom = max(1, READABLE_WIDTH // images.shape[2])
        write_png(workdir / "validation" / f"batch_{loop.finished:06d}.png", sheet, zoom)
        loop.show("validation", sheet)


def finish(spo: SPO, loop: Loop, workdir: Path, held_out: HeldOut, key: jax.Array, began: float) -> dict[str, object]:
    """Measures base and tuned model and writes everything that a run leaves; returns the summary."""
    config, state = spo.config, loop.state
    seconds_training = loop.seconds
    write_result(workdir, spo, state.result)
    unlearned = nothing_learned(config, int(state.step), fetch(state.result.get("lora")))
    base = measure_model(spo, untrained(state.result), held_out, key)
    tuned = measure_model(spo, state.result, held_out, key)
    metrics: dict[str, Described] = {**spo.metrics}
    if is_main_process():
        metrics |= measure_images(spo, {"base": base, "tuned": tuned})
    summary = {
        **summarize(base, tuned, metrics),
        "seconds": round(time.time() - began + loop.extra["seconds"], 1),
        "seconds_training": round(seconds_training, 1),
        "seed": config.seed,
        "config": config.to_dict(),
    }
    if not is_main_process():
        return summary
    if unlearned:
        notice(unlearned)
    write_summary(workdir / "summary.json", summary)
    loop.run.write_summary(summary)
    write_scores(workdir / "evaluation.csv", spo.held_out, {"base": base, "tuned": tuned})
    images = zip(spo.held_out, to_uint8(base.images), to_uint8(tuned.images), strict=True)
    write_report(
        workdir / "report.html",
        summary=summary,
        metrics=metrics,
        rows=read_metrics(workdir / METRICS_FILE),
        samples=list(images)[:NUM_REPORT_IMAGES],
    )
    xl = spo.pipeline.text_encoder_2 is not None
    write_model_card(workdir / "README.md", summary=summary, metrics=metrics, num_prompts=len(spo.prompts), xl=xl)
    wins = ", ".join(
        f"{rate:.1%} by {_in_a_sentence(metrics[name].title)}" for name, rate in summary["win_rate"].items()
    )
    if np.array_equal(base.images, tuned.images):
        wins = "none, as its images are those of the base model,"
    print(
        f"Tuned model wins on {wins or 'no metric'} of {len(spo.held_out)} held-out prompts.\n"
        f"Report: {workdir / 'report.html'}\nNumbers: {workdir / 'summary.json'}\nAdapters: {workdir}"
    )
    return summary


def write_result(workdir: Path, spo: SPO, trained: PyTree) -> None:
    """Writes the two LoRA files, or after full fine-tuning the pipeline folder ``model``.

    All processes must call this; the first one writes.
    """
    pipeline, trained = spo.pipeline, fetch(trained)
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
