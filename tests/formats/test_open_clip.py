"""Files and captions of open_clip: each parameter at its place, other files refused, ids exact."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
import torch

from spo_jax.errors import UserError
from spo_jax.formats import names
from spo_jax.formats.networks import build
from spo_jax.formats.open_clip import cleaned, open_clip_ids, originals, read_open_clip
from spo_jax.formats.tokenizers import read_tokenizer, tokenize
from spo_jax.models import CLIPModel
from spo_jax.models.published import CLIP_VIT_H
from tests import golden_metrics
from tests.golden_metrics import CAPTIONS, FOLDER

GOLDEN = golden_metrics.load()
FILE = FOLDER / "hpsv2" / "HPS_v2.1_compressed.pt"
SMALL, REAL = (read_tokenizer(FOLDER / name) for name in ("tokenizer", "tokenizer_real"))


# ---------------------------------------------------------------------------------------------------------------- ids
def test_ids_of_open_clip_and_of_transformers_are_exact():
    np.testing.assert_array_equal(open_clip_ids(SMALL, CAPTIONS), GOLDEN["hps_ids"])
    ours, theirs = tokenize(SMALL, CAPTIONS), GOLDEN["clip_ids"]
    for row, expected in zip(ours, theirs, strict=True):
        end = np.argmax(expected == SMALL.eos_token_id) + 1
        np.testing.assert_array_equal(row[:end], expected[:end])


def test_real_ids_are_exact():
    """``tokenizer_real`` has the real vocabulary's ids, and of its merges those that these captions take."""
    np.testing.assert_array_equal(open_clip_ids(REAL, CAPTIONS), GOLDEN["real_ids_open_clip"])
    np.testing.assert_array_equal(tokenize(REAL, CAPTIONS), GOLDEN["real_ids_transformers"])
    both = tokenize(REAL, [cleaned(text) for text in CAPTIONS])
    np.testing.assert_array_equal(both, GOLDEN["real_ids_transformers_cleaned"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  A\tCAT \n sat ", "a cat sat"),
        ("&amp;lt;b&amp;gt; caf&eacute;", "<b> café"),
        ("schÃ¶n", "schön"),
        ("“quoted”", '"quoted"'),
        ("", ""),
    ],
)
def test_text_is_cleaned_as_by_open_clip(text, expected):
    assert cleaned(text) == expected


def test_special_tokens_are_found_where_open_clip_finds_them():
    """Its pattern takes a run of punctuation as one word, so that behind such a run the token is not seen."""
    start, end = SMALL.bos_token_id, SMALL.eos_token_id

    def specials(text):
        ids = open_clip_ids(SMALL, [text])[0]
        inner = ids[1 : int((ids != 0).sum()) - 1]
        return [i for i in inner if i in (start, end)]

    assert specials("a <end_of_text> b") == [end] and specials("a<END_OF_TEXT>") == [end]
    assert specials("<start_of_text><end_of_text>") == [start, end]
    assert specials("!!<end_of_text>") == [] and specials("<|endoftext|>") == []


# -------------------------------------------------------------------------------------------------------------- files
def copied(folder, change=lambda state: None, config=True, **beside):
    """The recorded file after ``change``, with other values ``beside`` its state dict."""
    whole = torch.load(FILE, weights_only=True)
    change(whole["state_dict"])
    torch.save(whole | beside, folder / "m.pt")
    if config:
        shutil.copy(FILE.with_name("open_clip_config.json"), folder)
    return folder / "m.pt"


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_files_of_training_programs_and_flat_ones_are_read_alike(tmp_path):
    _, expected = read_open_clip(FILE)
    optimizer = {"state": {0: {"exp_avg": torch.ones(3), "step": 4}}, "param_groups": [{"betas": (0.9, 0.98)}]}
    path = copied(tmp_path, optimizer=optimizer, scaler={"scale": 65536.0, "_growth_tracker": 0}, epoch=None, best=True)
    same(read_open_clip(path)[1], expected)
    state = torch.load(FILE, weights_only=True)["state_dict"]
    torch.save(state, path)
    same(read_open_clip(path)[1], expected)
    torch.save({"state_dict": {key: value.half() for key, value in state.items()}}, path)
    halves = read_open_clip(path)[1]
    same(halves, jax.tree.map(lambda x: np.asarray(x).astype(np.float16).astype(np.float32), expected))


def renamed(state):
    for key in list(state):
        state[f"module.{key}"] = state.pop(key)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("visual.proj"), r"has no key 'visual\.proj'"),
        (renamed, r"has no key .* \(its keys: module\.ln_final\.bias"),
        (lambda s: s.update({"visual.proj": torch.zeros(20, 24)}), r"has shape \(20, 24\), and not \(24, 20\)"),
        (lambda s: s.update({"visual.attn_pool.query": torch.zeros(2)}), r"1 keys .* visual\.attn_pool\.query"),
        (lambda s: s["visual.proj"].fill_(torch.nan), "not finite"),
    ],
)
def test_another_model_is_refused_by_its_keys_and_shapes(tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        read_open_clip(copied(tmp_path, change))


def test_without_a_config_the_file_is_a_vit_h(tmp_path):
    with pytest.raises(UserError, match=r"as a ViT-H-14 \(for another model, put its open_clip_config\.json beside it"):
        read_open_clip(copied(tmp_path, config=False))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("model_cfg"), "describes no CLIP of open_clip"),
        (lambda c: c["model_cfg"]["text_cfg"].pop("heads"), "describes no CLIP of open_clip"),
        (lambda c: c["model_cfg"].update(custom_text=True), r"model_cfg\.custom_text is not supported"),
        (lambda c: c["model_cfg"]["vision_cfg"].update(attentional_pool=True), r"vision_cfg\.attentional_pool"),
        (lambda c: c["model_cfg"]["text_cfg"].update(hf_model_name="x"), r"text_cfg\.hf_model_name is not supported"),
    ],
)
def test_a_config_of_another_kind_is_refused(tmp_path, change, words):
    path = copied(tmp_path)
    file = tmp_path / "open_clip_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    change(config)
    file.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match=words):
        read_open_clip(path)


def test_missing_and_truncated_files_are_told(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_open_clip(tmp_path / "m.pt")
    path = copied(tmp_path)
    os.truncate(path, 1000)
    with pytest.raises(UserError, match=r"m\.pt"):
        read_open_clip(path)


def expected_vit_h():
    """Keys and shapes of open_clip's ViT-H-14, written down from its sizes."""
    shapes = {
        "logit_scale": (),
        "positional_embedding": (77, 1024),
        "text_projection": (1024, 1024),
        "token_embedding.weight": (49408, 1024),
        "visual.class_embedding": (1280,),
        "visual.positional_embedding": (257, 1280),
        "visual.proj": (1280, 1024),
        "visual.conv1.weight": (1280, 3, 14, 14),
    }
    norms = {"ln_final": 1024, "visual.ln_pre": 1280, "visual.ln_post": 1280}
    for tower, width, layers in (("", 1024, 24), ("visual.", 1280, 32)):
        for i in range(layers):
            block = f"{tower}transformer.resblocks.{i}"
            norms |= {f"{block}.ln_1": width, f"{block}.ln_2": width}
            shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
            for layer, size in (("attn.out_proj", (width, width)), ("mlp.c_fc", (4 * width, width))):
                shapes |= {f"{block}.{layer}.weight": size, f"{block}.{layer}.bias": size[:1]}
            shapes |= {f"{block}.mlp.c_proj.weight": (width, 4 * width), f"{block}.mlp.c_proj.bias": (width,)}
    return shapes | {f"{key}.{leaf}": (width,) for key, width in norms.items() for leaf in ("weight", "bias")}


def test_names_and_shapes_of_the_real_vit_h():
    _, shapes = build(CLIPModel, CLIP_VIT_H, np.float32, where="ViT-H-14", step_aware=False)
    found = {}
    for path, original in originals(shapes).items():
        leaf = shapes
        for name in path:
            leaf = leaf[name]
        found[original.key] = original.shape(names.torch_shape(path, leaf.shape))
    assert found == expected_vit_h()
