"""The model card of a run that has tuned a UNet: adapters, or a model whose whole UNet was trained."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spo_jax.evaluation.metrics import Described, meaning_of
from spo_jax.formats.hub import find_file, with_strength
from spo_jax.formats.lora_write import KOHYA_FILE_NAME
from spo_jax.formats.remote import is_weight_file
from spo_jax.runs.html import number
from spo_jax.runs.metrics import Summary
from spo_jax.runs.model_card import (
    code,
    command,
    ending,
    front_matter,
    is_emoji,
    literal,
    local_name,
    made_from,
    shown,
    table,
    write_card,
)
from spo_jax.runs.sources import source_of
from spo_jax.runs.words import Words

_PART_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
_PROMPT = "a fox on a teal background"


def write_model_card(
    path: str | Path, words: Words, *, summary: Summary, metrics: Mapping[str, Described], sheet: str, xl: bool
) -> None:
    """Writes the card, ``README.md`` in the --workdir of the run, of what ``summary.json`` holds.

    ``words`` are the method's; ``sheet`` is the file of the last validation images, shown if it is there; ``xl`` tells
    whether the base model is a ``StableDiffusionXLPipeline``.
    """
    path, config = Path(path), summary["config"]
    full = config["lora"]["rank"] == 0
    family = [] if is_emoji(config["model"]) else ["stable-diffusion-xl" if xl else "stable-diffusion"]
    method = config["method"]
    tags = ["text-to-image", "diffusers", *family, *([] if full else ["lora"]), method, "preference-optimization"]
    file_name = re.sub(r"[^A-Za-z0-9_-]+", "-", path.absolute().parent.name).strip("-") or method
    shown_there = (
        f"![Pictures of the tuned model]({sheet})\n\nThe tuned model on the first held-out prompts, not a selection.\n"
    )
    _, strength = with_strength(config["lora"]["init"])
    notes = {
        "lora.init": "" if strength == 1 else f", at strength {code(strength)}",
        "evaluation.prompts": f", the first {summary['num_prompts']}",
        **words.notes,
    }
    sections = [
        front_matter(
            config["model"],
            relation="finetune" if full else "adapter",
            library_name="diffusers",
            pipeline_tag="text-to-image",
            tags=tags,
        ),
        _introduction(config, words, full),
        shown_there if (path.parent / sheet).is_file() else "",
        made_from(config, notes, *words.more),
        _results(summary, metrics),
        "## Use\n\n### diffusers\n",
        _diffusers(config, xl, full),
        _other_programs(config, full, file_name),
        "### spo_jax\n\nWORKDIR is this folder.\n",
        _generate(config, full),
        *ending(summary, config["model"], "pictures", words.limits, words.paper),
    ]
    write_card(path, sections)


def _introduction(config: Mapping[str, Any], words: Words, full: bool) -> str:
    source = source_of(config["model"])
    base = code(source.repo if source is not None else local_name(config["model"]))
    what = "The UNet" if full else "LoRA adapters for the UNet"
    learned = "was trained as a whole" if full else "were trained"
    return (
        f"# {base} with preferences ({words.name}{'' if full else ' LoRA'})\n\n"
        f"{what} of {shown(config['model'])}, which {learned} with {words.training} ({words.paper.link}) by `spo_jax`. "
        f"{words.introduction}\n"
    )


def _results(summary: Summary, metrics: Mapping[str, Described]) -> str:
    base, tuned, config = summary["base"], summary["tuned"], summary["config"]
    rows = []
    for name, metric in metrics.items():
        win = summary["win_rate"].get(name)
        won = "" if win is None else number(win, ".1%")
        rows.append((metric.title, number(base[name], metric.form), number(tuned[name], metric.form), won))
    meanings = [f"- {m.title}: {meaning_of(name, m, config['model'])}\n" for name, m in metrics.items()]
    return (
        f"## Results\n\nOn {summary['num_prompts']} held-out prompts, both models with the same noise, "
        f"{config['sampling']['num_steps']} steps of DDIM (eta {config['evaluation']['eta']}), guidance "
        f"{config['sampling']['guidance_scale']}; means, and on how many prompts the tuned image has more:\n\n"
        + table(("", "base", "tuned", "tuned wins"), rows)
        + f"\n{''.join(meanings)}\n`report.html` has images and curves, `evaluation.csv` each image's numbers.\n"
    )


def _diffusers(config: Mapping[str, Any], xl: bool, full: bool) -> str:
    """Python that makes a picture."""
    name = f"StableDiffusion{'XL' if xl else ''}Pipeline"
    parts = {} if full else {part: config[part] for part in ("unet", "vae") if config[part]}  # "model" has them
    classes = sorted(["DDIMScheduler", name, *(_PART_CLASSES[part] for part in parts)])
    imports = {f"from diffusers import {', '.join(classes)}"}
    dtype = f"torch_dtype=torch.{'bfloat16' if config['dtype'] == 'bfloat16' else 'float32'}"
    lines = []
    options = [f"variant={literal(config['variant'])}"] if config["variant"] and not full else []
    for part, source in parts.items():
        first, more = _pretrained(source, imports)
        if find_file(source, "config.json") is None and find_file(source, f"{part}/config.json"):
            more = [*more, f'subfolder="{part}"']
        lines += [f"{part} = {_PART_CLASSES[part]}.from_pretrained({', '.join([first, *more, dtype])})"]
        options += [f"{part}={part}"]
    options += [dtype]
    base, more = ('"model"', []) if full else _pretrained(config["model"], imports)
    method = "from_pretrained" if full or not is_weight_file(config["model"]) else "from_single_file"
    lines += [f"pipeline = {name}.{method}(", *(f"    {x}," for x in (base, *more, *options)), ")"]
    if not full:
        lines += ['pipeline.load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")']
    sampling = config["sampling"]
    lines += [
        "pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        "pipeline.to(device)",
        "picture = pipeline(",
        f"    {literal(_PROMPT)},",
        *(f"    {key}={sampling[key]}," for key in ("height", "width") if sampling[key]),
        f"    num_inference_steps={sampling['num_steps']},",
        f"    guidance_scale={sampling['guidance_scale']},",
        "    generator=torch.Generator(device).manual_seed(0),",
        ").images[0]",
        'picture.save("fox.png")',
    ]
    elsewhere = source_of(config["model"]) or is_emoji(config["model"]) or full
    where = "" if elsewhere else f", with the base model in {code(local_name(config['model']))}"
    block = "\n".join(["```python", "import torch", *sorted(imports), "", *lines, "```", ""])
    return f"In this folder{where}:\n\n{block}"


def _pretrained(name: str, imports: set[str]) -> tuple[str, list[str]]:
    """The first argument of ``from_pretrained`` and those that go with it, for a model of a config."""
    source = source_of(name)
    if is_emoji(name):
        imports.add("from spo_jax.formats.hub import local")
        return f"local({literal(name)})", []
    if source is None:
        return literal(local_name(name)), []
    revision = f"revision={literal(source.revision)}"
    if source.inside:
        imports.add("from huggingface_hub import snapshot_download")
        return f"snapshot_download({literal(source.repo)}, {revision}) + {literal('/' + source.inside)}", []
    return literal(source.repo), [revision]


def _other_programs(config: Mapping[str, Any], full: bool, name: str) -> str:
    head = "### ComfyUI and A1111\n\n"
    if is_emoji(config["model"]):
        return head + "They know Stable Diffusion, not the emoji model.\n"
    file = f"{name}.safetensors"
    if full:
        write = command("export", model="WORKDIR/model", format="checkpoint", out=file)
        before, after = f"They read one file, which this writes (WORKDIR is this folder):\n\n{write}\n", ""
        comfy, a1111 = ("checkpoints", "node *Load Checkpoint*"), ("Stable-diffusion", "choose it at the top left")
    else:
        before = (
            f"They, Forge, InvokeAI and kohya's tools read `{KOHYA_FILE_NAME}` of this folder, and of the other file "
            f"nothing at all. Copy it as `{file}`:\n\n"
        )
        write = command("export", lora="WORKDIR", format="kohya", out=file, dtype="float16")
        after = f"\nThis writes it with half the size:\n\n{write}"
        comfy = ("loras", "node *Load LoRA* (`LoraLoader`) behind that of the base model")
        a1111 = ("Lora", f"`<lora:{name}:1>` in the prompt")
    rows = [
        ("ComfyUI", f"`ComfyUI/models/{comfy[0]}`", comfy[1]),
        ("A1111", f"`stable-diffusion-webui/models/{a1111[0]}`", a1111[1]),
    ]
    return head + before + table(("program", "folder for the file", "how to use it"), rows) + after


def _generate(config: Mapping[str, Any], full: bool) -> str:
    names = {
        key: config[key] if source_of(config[key]) else local_name(config[key]) for key in ("model", "unet", "vae")
    }
    base = (
        {"model": "WORKDIR/model"}
        if full
        else {"model": names["model"], "variant": config["variant"], **names, "lora": "WORKDIR"}
    )
    sampling = config["sampling"]
    return command(
        "generate",
        **base,
        prompt=_PROMPT,
        steps=sampling["num_steps"],
        guidance_scale=sampling["guidance_scale"],
        height=sampling["height"],
        width=sampling["width"],
        dtype=config["dtype"],
        out="fox.png",
    )
