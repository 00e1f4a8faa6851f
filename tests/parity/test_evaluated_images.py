"""The PNG files that ``spo_jax.evaluate`` wrote, scored again by PyTorch, transformers and Pillow alone."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import transformers

from spo_jax.formats.hub import local
from tests.system.commands import environment
from tests.system.forks import run_forked

PROMPTS = ["a red apple", "a fox on a teal background", "a blue owl"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def scores_by_pytorch(folder: Path, tokenizer: Path, out: Path) -> dict[tuple[str, str], float]:
    """100 times the cosine of each image and its prompt, by file name; nothing of this package."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    words = transformers.CLIPTokenizer.from_pretrained(tokenizer)
    prompts = json.loads((out / "prompts.json").read_text(encoding="utf-8"))
    size, found = model.config.vision_config.image_size, {}
    for path in sorted((out / "images").rglob("*.png")):
        image = PIL.Image.open(path).convert("RGB")
        assert image.width == image.height
        image = image.resize((size, size), PIL.Image.Resampling.BICUBIC)
        pixels = (torch.tensor(np.asarray(image)).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        length = model.config.text_config.max_position_embeddings
        ids = words(
            prompts[int(path.name[:5])], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            output = model(input_ids=ids, pixel_values=pixels.permute(2, 0, 1)[None])
        found[path.parent.name, path.name] = 100 * float((output.image_embeds * output.text_embeds).sum())
    return found


def test_the_scores_are_the_same(tmp_path):
    out = tmp_path / "out"
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    options = [f"--prompts={tmp_path}/prompts.txt", "--metrics=clip=emoji:model/clip", "--seeds=2", "--num_steps=4"]
    command = [sys.executable, "-m", "spo_jax.evaluate", "--model=emoji:model", *options, f"--out={out}"]
    result = run_forked(command, environment())
    assert result.returncode == 0, result.stderr
    expected = scores_by_pytorch(local("emoji:model/clip"), local("emoji:model/tokenizer"), out)
    with (out / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(expected) == 6
    for row in rows:
        name = f"{int(row['prompt_id']):05d}_{row['seed']}.png"
        np.testing.assert_allclose(float(row["clip"]), expected[row["model"], name], atol=2e-3)
