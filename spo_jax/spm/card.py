"""The model card of a preference model, beside that of adapters in ``runs/tuning_card.py``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spo_jax.runs.model_card import (
    code,
    command,
    ending,
    front_matter,
    is_emoji,
    made_from,
    shown,
    table,
    write_card,
)
from spo_jax.runs.words import LIMITS_OF_SCORERS, SPO_PAPER
from spo_jax.spm.report import accuracy_rows


def write_preference_card(path: str | Path, *, summary: Mapping[str, Any]) -> None:
    """Writes the card, ``README.md`` in the --workdir of the run, of what ``summary.json`` holds."""
    config = summary["config"]
    aware = config["scorer"]["step_aware"]
    # transformers reads the model only without its time layers, and then it is a CLIP like any other.
    library, task = ("spo_jax", "") if aware else ("transformers", "zero-shot-image-classification")
    tags = ["clip", "preference-model", "spo", "preference-optimization"]
    head, *rows = accuracy_rows(summary["accuracy"])
    sections = [
        front_matter(config["scorer"]["init"], relation="finetune", library_name=library, pipeline_tag=task, tags=tags),
        _introduction(summary, aware),
        made_from(config, {"data.train": f", {summary['records']['used']} used over all epochs"}),
        "## Results\n\nHow often the preferred picture of a validation pair has the higher score, when both carry the "
        "noise of a timestep, with 95 % intervals; a coin has 0.5:\n\n"
        f"{table(head, rows)}\n`report.html` has pictures and curves.\n",
        _use(config, aware),
        *ending(summary, config["scorer"]["init"], "models", LIMITS_OF_SCORERS, SPO_PAPER),
    ]
    write_card(Path(path), sections)


def _introduction(summary: Mapping[str, Any], aware: bool) -> str:
    config = summary["config"]
    told = "at any timestep of its denoising, which the model is told" if aware else "of text and picture alone"
    return (
        f"# {'Step-aware preference model' if aware else 'Preference model'}\n\n"
        f"A CLIP that says which of two pictures for the same text people prefer, {told}. It is the scorer of "
        f"Step-by-step Preference Optimization ({SPO_PAPER.link}) for {shown(config['model'])}, trained by "
        "`spo_jax`.\n\n"
        f"`best` is the model of step {code(summary['best_step'])}, which was right most often on the validation "
        f"pairs, and `last` that of step {code(config['num_steps'])}.\n"
    )


def _use(config: Mapping[str, Any], aware: bool) -> str:
    reading = 'from transformers import CLIPModel\n\nclip = CLIPModel.from_pretrained("best")'
    if aware:
        reading = 'from spo_jax.formats.pipeline import read_clip\n\nclip, params = read_clip("best", step_aware=True)'
    recipe = "tiny" if is_emoji(config["model"]) else "sdxl" if "xl" in config["model"].lower() else "sd15"
    flags = {"config": f"configs/{recipe}.py", "workdir": "runs/tuned", "config.scorer.path": "WORKDIR/best"}
    return (
        f"## Use\n\nAs the scorer of a training, WORKDIR being this folder:\n\n{command('main', **flags)}\n"
        f"From Python, in this folder:\n\n```python\n{reading}\n```\n\n"
        "Neither diffusers, ComfyUI nor A1111 uses it: it judges pictures, and makes none.\n"
    )
