"""The model card of a run of SPO: adapters, or a model whose whole UNet was trained."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spo_jax.evaluation.metrics import Metric, meaning_of
from spo_jax.formats.hub import find_file, with_strength
from spo_jax.formats.lora_write import KOHYA_FILE_NAME
from spo_jax.formats.remote import is_weight_file
from spo_jax.runs.html import number
from spo_jax.runs.metrics import Summary
from spo_jax.runs.model_card import (
    CITATION,
    PAPER,
    code,
    command,
    front_matter,
    is_emoji,
    limits,
    literal,
    local_name,
    repeat,
    shown,
    table,
    with_licence,
    write_card,
)
from spo_jax.runs.sources import source_of

_PART_CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}


_PROMPT = "a fox on a teal background"


def write_model_card(
    path: str | Path, *, summary: Summary, metrics: Mapping[str, Metric], num_prompts: int, xl: bool
) -> None:
    """Writes the card of adapters, or of a model whose whole UNet was trained; complete or not at all.

    Args:
      path: ``README.md`` in the --workdir of the run.
      summary: what ``summary.json`` holds.
      metrics: those of the evaluation, by name.
      num_prompts: how many prompts the training file has.
      xl: whether the base model is a ``StableDiffusionXLPipeline``.
    """
    path, config = Path(path), summary["config"]
    full = config["lora"]["rank"] == 0
    family = [] if is_emoji(config["model"]) else ["stable-diffusion-xl" if xl else "stable-diffusion"]
    tags = ["text-to-image", "diffusers", *family, *([] if full else ["lora"]), "spo", "preference-optimization"]
    sections = [
        front_matter(
            config["model"],
            relation="finetune" if full else "adapter",
            library_name="diffusers",
            pipeline_tag="text-to-image",
            tags=tags,
        ),
        _introduction(config, full),
        _sheet(path.parent, config),
        _made_from(config, num_prompts, summary["num_prompts"]),
        _results(summary, metrics),
        _settings(config, full),
        "## Use\n\n### diffusers\n",
        _diffusers(config, xl, full),
        _other_programs(config, xl, full, _file_name(path)),
        "### spo_jax\n\nWORKDIR is this folder.\n",
        _generate(config, full),
        repeat(summary),
        limits(config["model"], "pictures"),
        CITATION,
    ]
    write_card(path, sections)


# ------------------------------------------------------------------------------------------- adapters and whole models
def _file_name(path: Path) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", path.absolute().parent.name).strip("-") or "spo"


def _introduction(config: Mapping[str, Any], full: bool) -> str:
    source = source_of(config["model"])
    base = source.repo if source is not None else local_name(config["model"])
    what = "The UNet" if full else "LoRA adapters for the UNet"
    learned = "was trained as a whole" if full else "were trained"
    return (
        f"# {code(base)} with preferences (SPO{'' if full else ' LoRA'})\n\n"
        f"{what} of {shown(config['model'])}, which {learned} with Step-by-step Preference Optimization ({PAPER}) by "
        "`spo_jax`. At each denoising step a judge has told which of some candidates is better, and the model has "
        "learned to make the better ones.\n"
    )


def _sheet(folder: Path, config: Mapping[str, Any]) -> str:
    sheet = f"validation/batch_{config['num_batches']:06d}.png"
    if not (folder / sheet).is_file():
        return ""
    return (
        f"![Pictures of the tuned model]({sheet})\n\nThe tuned model on the first held-out prompts, not a selection.\n"
    )


def _made_from(config: Mapping[str, Any], num_prompts: int, num_held_out: int) -> str:
    scorer, evaluation = config["scorer"], config["evaluation"]
    rows = [with_licence("base model", config["model"])]
    if config["unet"]:
        rows.append(with_licence("UNet, instead of the base model's", config["unet"]))
    if config["vae"]:
        rows.append(with_licence("autoencoder, instead of the base model's", config["vae"]))
    if config["lora"]["init"]:
        name, strength = with_strength(config["lora"]["init"])
        times = "" if strength == 1 else f", at strength {code(strength)}"
        rows.append(with_licence(f"adapters that training started from{times}", name))
    if scorer["fn"]:
        rows.append(("judge", f"{code(scorer['fn'])}, a function of the user", ""))
    else:
        rows.append(with_licence("judge", scorer["path"]))
    rows.append(with_licence(f"training prompts, {num_prompts}", config["prompts"]))
    rows.append(with_licence(f"held-out prompts, the first {num_held_out}", evaluation["prompts"]))
    rows.append(with_licence("judge of alignment", evaluation["judge"]))
    return "## Made from\n\n" + table(("part", "what", "licence"), rows)


def _results(summary: Summary, metrics: Mapping[str, Metric]) -> str:
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


def _settings(config: Mapping[str, Any], full: bool) -> str:
    sampling, train = config["sampling"], config["train"]
    rows = [
        ("trained", "the whole UNet" if full else _adapters(config["lora"])),
        ("learning rate, optimizer", f"{code(train['learning_rate'])}, {code(train['optimizer'])}"),
        ("batches, prompts a batch", f"{code(config['num_batches'])}, {code(config['prompts_per_batch'])}"),
        (
            "pairs a minibatch, minibatches an update",
            f"{code(train['minibatch_size'])}, {code(train['accumulation_steps'])}",
        ),
        (
            "DDIM steps, the first without candidates (d)",
            f"{code(sampling['num_steps'])}, {code(sampling['num_plain_steps'])}",
        ),
        (
            "candidates a step (k), steps before they are judged (m)",
            f"{code(sampling['num_candidates'])}, {code(sampling['num_inner_steps'])}",
        ),
        ("guidance scale, eta", f"{code(sampling['guidance_scale'])}, {code(sampling['eta'])}"),
        ("least difference of a pair", code(config["pairs"]["threshold"])),
        ("beta, clipping", f"{code(config['loss']['beta'])}, {code(config['loss']['clip_range'])}"),
        ("weight average (EMA)", code(train["ema_decay"] or "off")),
        ("seed", code(config["seed"])),
    ]
    return "## Settings\n\n" + table(("setting", "value"), rows) + "\nAll others are in `config.json`.\n"


def _adapters(lora: Mapping[str, Any]) -> str:
    fresh = f"adapters of rank {code(lora['rank'])}"
    return f"the adapters that training started from, and fresh {fresh} beside them" if lora["init"] else fresh


def _diffusers(config: Mapping[str, Any], xl: bool, full: bool) -> str:
    """Python that makes a picture."""
    name = f"StableDiffusion{'XL' if xl else ''}Pipeline"
    parts = {} if full else {part: config[part] for part in ("unet", "vae") if config[part]}  # "model" has them
    classes = sorted(["DDIMScheduler", name, *(_PART_CLASSES[part] for part in parts)])
    imports = {f"from diffusers import {', '.join(classes)}"}
    dtype = f"torch_dtype=torch.{'bfloat16' if config['dtype'] == 'bfloat16' else 'float32'}"
    lines: list[str] = []
    options: list[str] = []
    for part, source in parts.items():
        first, more = _pretrained(source, imports)
        if find_file(source, "config.json") is None and find_file(source, f"{part}/config.json"):
            more = [*more, f'subfolder="{part}"']
        lines += [f"{part} = {_PART_CLASSES[part]}.from_pretrained({', '.join([first, *more, dtype])})"]
        options += [f"{part}={part}"]
    options += [dtype]
    if config["variant"] and not full:
        options = [f"variant={literal(config['variant'])}", *options]
    base, more = ('"model"', []) if full else _pretrained(config["model"], imports)
    method = "from_pretrained" if full or not is_weight_file(config["model"]) else "from_single_file"
    lines += [f"pipeline = {name}.{method}(", *(f"    {x}," for x in (base, *more, *options)), ")"]
    if not full:
        lines += ['pipeline.load_lora_weights(".", weight_name="pytorch_lora_weights.safetensors")']
    size = {key: config["sampling"][key] for key in ("height", "width") if config["sampling"][key]}
    arguments = [literal(_PROMPT), *(f"{key}={value}" for key, value in size.items())]
    arguments += [f"num_inference_steps={config['sampling']['num_steps']}"]
    arguments += [f"guidance_scale={config['sampling']['guidance_scale']}"]
    arguments += ["generator=torch.Generator(device).manual_seed(0)"]
    lines += [
        "pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        "pipeline.to(device)",
        "picture = pipeline(",
        *(f"    {argument}," for argument in arguments),
        ").images[0]",
        'picture.save("fox.png")',
    ]
    where = (
        "In this folder"
        if source_of(config["model"]) or is_emoji(config["model"]) or full
        else (f"In this folder, with the base model in {code(local_name(config['model']))}")
    )
    return f"{where}:\n\n" + "\n".join(["```python", "import torch", *sorted(imports), "", *lines, "```", ""])


def _pretrained(name: str, imports: set[str]) -> tuple[str, list[str]]:
    """The first argument of ``from_pretrained`` and those that go with it, for a model of a config."""
    source = source_of(name)
    if is_emoji(name):
        imports.add("from spo_jax.formats.hub import local")
        return f"local({literal(name)})", []
    if source is None:
        return literal(local_name(name)), []
    revision = f"revision={literal(source.commit)}"
    if source.inside:
        imports.add("from huggingface_hub import snapshot_download")
        return f"snapshot_download({literal(source.repo)}, {revision}) + {literal('/' + source.inside)}", []
    return literal(source.repo), [revision]


def _other_programs(config: Mapping[str, Any], xl: bool, full: bool, name: str) -> str:
    head = "### ComfyUI and A1111\n\n"
    if is_emoji(config["model"]):
        return head + "They know Stable Diffusion, not the emoji model.\n"
    if full:
        return (
            f"{head}They read one file, which this writes (WORKDIR is this folder):\n\n"
            + command("export", model="WORKDIR/model", format="checkpoint", out=f"{name}.safetensors")
            + "\n"
            + table(
                ("program", "folder for the file", "how to use it"),
                [
                    ("ComfyUI", "`ComfyUI/models/checkpoints`", "node *Load Checkpoint*"),
                    ("A1111", "`stable-diffusion-webui/models/Stable-diffusion`", "choose it at the top left"),
                ],
            )
        )
    return (
        f"{head}They, Forge, InvokeAI and kohya's tools read `{KOHYA_FILE_NAME}` of this folder, and of the other file "
        f"nothing at all. Copy it as `{name}.safetensors`:\n\n"
        + table(
            ("program", "folder for the file", "how to use it"),
            [
                ("ComfyUI", "`ComfyUI/models/loras`", "node *Load LoRA* (`LoraLoader`) behind that of the base model"),
                ("A1111", "`stable-diffusion-webui/models/Lora`", f"`<lora:{name}:1>` in the prompt"),
            ],
        )
        + "\nThis writes it with half the size:\n\n"
        + command("export", lora="WORKDIR", format="kohya", out=f"{name}.safetensors", dtype="float16")
    )


def _generate(config: Mapping[str, Any], full: bool) -> str:
    base = config["model"] if source_of(config["model"]) else local_name(config["model"])
    parts = {part: config[part] for part in ("unet", "vae")}
    parts = {part: name if source_of(name) else name and local_name(name) for part, name in parts.items()}
    return command(
        "generate",
        model="WORKDIR/model" if full else base,
        **{} if full else {"variant": config["variant"], **parts},
        lora=None if full else "WORKDIR",
        prompt=_PROMPT,
        steps=config["sampling"]["num_steps"],
        guidance_scale=config["sampling"]["guidance_scale"],
        height=config["sampling"]["height"],
        width=config["sampling"]["width"],
        dtype=config["dtype"],
        out="fox.png",
    )
