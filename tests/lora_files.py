"""Adapters of all layers of a pipeline, and LoRA files of them in the layouts that trainers write.

The names are spelled with nothing of the reader's.
"""

import re

import flax.traverse_util
import jax
import numpy as np

PARTS = ("unet", "text_encoder", "text_encoder_2")
ATTENTION = re.compile(r"\.(to_q|to_k|to_v|to_out\.0|[qkv]_proj|out_proj)$")


def random_adapters(params, *, rank=3, window_rank=2, strength=0.2, seed=0, only=lambda part, path: True):
    """Adapters by part, with ``strength`` times the spread of the layers they are on; some layers are left out by
    ``only``."""
    generator = np.random.default_rng(seed)
    lora = {}
    for part in PARTS:
        for path, kernel in sorted(flax.traverse_util.flatten_dict(params.get(part, {})).items()):
            if path[-1] != "kernel" or not only(part, path[:-1]):
                continue
            *inputs, fan_out = kernel.shape
            r = window_rank if np.prod(inputs[:-1]) > 1 else rank
            a = generator.standard_normal((*inputs, r)) / np.sqrt(np.prod(inputs))
            b = generator.standard_normal((r, fan_out)) * (strength * np.std(kernel) * np.sqrt(np.prod(inputs) / r))
            lora[(part, *path[:-1], "A")], lora[(part, *path[:-1], "B")] = np.float32(a), np.float32(b)
    return flax.traverse_util.unflatten_dict(lora)


def matrices(lora):
    """``{(part, module in diffusers' names): (down, up)}`` as PyTorch's layers have them."""
    flat = flax.traverse_util.flatten_dict(lora)
    found = {}
    for (part, *path, name), a in flat.items():
        if name == "A":
            b = np.asarray(flat[(part, *path, "B")])
            a = np.asarray(a)
            module = ".".join(p if p in ("linear_1", "linear_2") else re.sub(r"_(\d+)$", r".\1", p) for p in path)
            down, up = (a.T, b.T) if a.ndim == 2 else (a.transpose(3, 2, 0, 1), b.T[:, :, None, None])
            found[(part, module)] = np.ascontiguousarray(down), np.ascontiguousarray(up)
    return found


def products(lora):
    """What the matrices of each layer make together, float64, by part and path."""
    found = flax.traverse_util.flatten_dict(jax.tree.map(lambda x: np.asarray(x, np.float64), lora))
    return {p[:-1]: a @ found[(*p[:-1], "B")] for p, a in found.items() if p[-1] == "A"}


def original(module, layers_per_block, first_attends):
    """The name of a UNet's layer in the original checkpoints, counted along the blocks."""
    outside = {
        **{"conv_in": "input_blocks.0.0", "conv_out": "out.2"},
        **{"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"},
        **{"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"},
    }
    resnet = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
    resnet["conv_shortcut"] = "skip_connection"
    if module in outside:
        return outside[module]
    parts = module.split(".")
    if parts[0] == "mid_block":
        kind, i, rest = parts[1], int(parts[2]), ".".join(parts[3:])
        return f"middle_block.1.{rest}" if kind == "attentions" else f"middle_block.{2 * i}.{resnet[rest]}"
    (way, block, kind, i), rest = (parts[0], int(parts[1]), parts[2], int(parts[3])), ".".join(parts[4:])
    rest = resnet.get(rest, rest)
    size = layers_per_block + 1
    if way == "down_blocks":
        number = 1 + block * size + (layers_per_block if kind == "downsamplers" else i)
        where = {"resnets": "0", "attentions": "1", "downsamplers": "0"}[kind]
        return f"input_blocks.{number}.{where}.{'op' if kind == 'downsamplers' else rest}"
    number = block * size + (layers_per_block if kind == "upsamplers" else i)
    where = {"resnets": "0", "attentions": "1", "upsamplers": "2" if first_attends else "1"}[kind]
    return f"output_blocks.{number}.{where}.{rest}"


def _kohya(part, xl, one="lora_te"):
    return {"unet": "lora_unet", "text_encoder": "lora_te1" if xl else one, "text_encoder_2": "lora_te2"}[part]


def spelled(layout, lora, params):
    """The tensors of a file in the layout, by key; None if it has no names for some of these adapters."""
    xl = "text_encoder_2" in params
    layers = sum(name.startswith("resnets") for name in params["unet"]["down_blocks_0"])
    tensors = {}

    def put(name, down, up, low="lora_down.weight", high="lora_up.weight", alpha=True):
        tensors[f"{name}.{low}"], tensors[f"{name}.{high}"] = down, up
        if alpha:
            tensors[f"{name}.alpha"] = np.array(len(down), np.float32)

    for (part, module), (down, up) in matrices(lora).items():
        names = {"unet": "unet", "text_encoder": "clip_l", "text_encoder_2": "clip_g"}
        first = "attentions_0" in params["unet"].get("up_blocks_0", {})
        old = original(module, layers, first) if part == "unet" and "original" in layout else module
        if layout in ("kohya", "kohya, original names"):
            put(f"{_kohya(part, xl)}_{old.replace('.', '_')}", down, up)
        elif layout == "kohya, 1x1 as linear":
            squeezed = (
                (down.reshape(len(down), -1), up.reshape(len(up), -1)) if down.shape[2:] == (1, 1) else (down, up)
            )
            put(f"{_kohya(part, xl)}_{module.replace('.', '_')}", *squeezed)
        elif layout == "kohya, linear as 1x1":
            whole = [x[:, :, None, None] if x.ndim == 2 else x for x in (down, up)]
            put(f"{_kohya(part, xl)}_{module.replace('.', '_')}", *whole)
        elif layout == "OneTrainer, dotted":
            put(f"{_kohya(part, xl)}.{module}", down, up)
        elif layout == "OneTrainer, original names":
            put(f"{names[part]}.{old}", down, up)
        elif layout == "diffusers":
            put(f"{part}.{module}", down, up, "lora_A.weight", "lora_B.weight", alpha=False)
        elif layout == "diffusers, named adapter":
            put(f"{part}.{module}", down, up, "lora_A.default.weight", "lora_B.default.weight", alpha=False)
        elif layout == "diffusers, transformers 5":
            module = module.removeprefix("text_model.")
            put(f"{part}.{module}", down, up, "lora_A.weight", "lora_B.weight", alpha=False)
        elif layout == "diffusers, base_model":
            put(f"{part}.base_model.model.{module}", down, up, "lora_A.weight", "lora_B.weight", alpha=False)
        elif layout == "before peft":
            lora_name = "lora" if part == "unet" else "lora_linear_layer"
            put(f"{part}.{module}", down, up, f"{lora_name}.down.weight", f"{lora_name}.up.weight", alpha=False)
        elif layout == "processor":
            name = re.sub(r"\.(to_out)\.0$", r".\1", module) if part == "unet" else module
            name = re.sub(r"\.([qkv]|out)_proj$", r".to_\1", name)
            block, projection = name.rsplit(".", 1)
            processor = ".processor" if part == "unet" else ""
            name = f"{part}.{block}{processor}.{projection}_lora"
            put(name, down, up, "down.weight", "up.weight", alpha=False)
        elif layout == "without prefix":
            put(module, down, up, "lora_A.weight", "lora_B.weight", alpha=False)
        else:
            raise ValueError(layout)
    return tensors


# Those of all layers, those that reach only attention, and those of one part.
LAYOUTS = (
    "kohya",
    "kohya, original names",
    "kohya, 1x1 as linear",
    "kohya, linear as 1x1",
    "OneTrainer, dotted",
    "OneTrainer, original names",
    "diffusers",
    "diffusers, named adapter",
    "diffusers, transformers 5",
    "diffusers, base_model",
    "before peft",
)
ATTENTION_LAYOUTS = ("processor",)
UNET_LAYOUTS = ("without prefix",)
