"""One step on given pairs against PyTorch: diffusers' UNet, peft's adapters, and a loss and a step written here.

Both sides get the same clean latents, noise, timesteps and prompts. Winner and loser are ordered, noised and put into
the network by each side in its own way; here as the authors' code does it, first all winners and then all losers.
"""

import copy
import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig

from spo_jax import rng
from spo_jax.diffusion.guidance import make_guided_prediction
from spo_jax.diffusion.schedule import make_schedule
from spo_jax.dpo import config as dpo_config
from spo_jax.dpo.update import PairView, dpo_metrics, make_dpo_update, make_pair_errors, see_pairs
from spo_jax.formats.names import from_torch, torch_key
from spo_jax.formats.pipeline import read_pipeline, read_unet
from spo_jax.formats.tokenizers import tokenize_prompts
from spo_jax.models.lora import TARGETS
from spo_jax.preference.losses import LossOptions
from spo_jax.preference.offline import OFFLINE
from spo_jax.runs.optimizer import make_optimizer, warmup_constant
from spo_jax.runs.state import Optimizer, TrainState
from spo_jax.sampling.encode import make_encode_captions
from spo_jax.sampling.noisy_pairs import make_add_noise, pair_keys
from spo_jax.types import AddedConditions, LabelledPairs, PromptBatch
from tests.lora_files import matrices, random_adapters
from tests.parity.test_live_pytorch import randomize
from tests.small_pipeline import small_pipeline

PAIRS, TEXT, CONTEXT, POOLED, SIDE = 6, 5, 24, 20, 8
SCHEDULER = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COMMON = dict(
    sample_size=SIDE,
    block_out_channels=(16,),
    down_block_types=("CrossAttnDownBlock2D",),
    up_block_types=("UpBlock2D",),
    layers_per_block=1,
    norm_num_groups=4,
    cross_attention_dim=CONTEXT,
    attention_head_dim=2,
)
UNETS = {
    "sd": COMMON,
    "sdxl": COMMON
    | dict(
        transformer_layers_per_block=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=6,
        projection_class_embeddings_input_dim=POOLED + 6 * 6,
    ),
}
LEARNING_RATE = 1e-3
QUICK = {"xla_backend_optimization_level": 0}  # most of the time is compilation
KEY = jax.random.key(3)


def some_pairs():
    """Pairs whose "images" are latents already; the second is better in two of them, and one is a tie."""
    generator = np.random.default_rng(0)
    labels = [[1, 0], [0, 1], [0.5, 0.5], [1, 0], [0, 1], [0.9, 0.1]]
    return LabelledPairs(
        images=generator.integers(0, 256, (PAIRS, 2, SIDE, SIDE, 4), np.uint8),
        tokens=(np.arange(PAIRS, dtype=np.int32)[:, None],),
        crops=generator.integers(0, 90, (PAIRS, 2, 4), np.int32),
        scorer_tokens=None,
        labeller_tokens=None,
        labels=np.array(labels, np.float32),
        weights=np.ones(PAIRS, np.float32),
        positions=np.arange(PAIRS, dtype=np.uint32) + 40,
    )


def texts(kind):
    """Hidden states of each prompt, and of SDXL pooled ones and the time ids that say nothing of the image."""
    generator = np.random.default_rng(1)
    embeddings = generator.standard_normal((PAIRS, TEXT, CONTEXT)).astype(np.float32)
    if kind == "sd":
        return {"embeddings": embeddings}
    pooled = generator.standard_normal((PAIRS, POOLED)).astype(np.float32)
    time_ids = np.tile(np.float32([64, 64, 0, 0, 64, 64]), (PAIRS, 1))
    return {"embeddings": embeddings, "pooled": pooled, "time_ids": time_ids}


def view_of(unet, true_size):
    """An autoencoder that only scales, and text encoders that look prompts up."""
    process = make_schedule(SCHEDULER, 10)

    def encode(params, tokens):
        found = {name: jnp.asarray(rows)[tokens[0][:, 0]] for name, rows in params["texts"].items()}
        added = AddedConditions(found["pooled"], found["time_ids"]) if "pooled" in found else None
        embeddings = found["embeddings"]
        return PromptBatch(embeddings, embeddings[:1], None, added, None)

    def add_noise(_params, images, timesteps, keys):
        clean = images.astype(jnp.float32) / 64.0 - 2.0
        noise = jax.vmap(lambda key: jax.random.normal(rng.stream(key, "noise"), clean.shape[2:]))(keys)
        return jax.vmap(process.add_noise)(clean, noise[:, None], timesteps), noise

    return PairView(
        encode=encode,
        add_noise=add_noise,
        predict=make_guided_prediction(unet.apply, 1.0),
        process=process,
        empty_tokens=(np.zeros((1, 1), np.int32),),
        true_size=true_size,
    )


class Case:
    """Both sides of a policy near its reference; ``trained`` is ours and ``policy`` theirs."""

    def __init__(self, kind, full, folder):
        self.kind, self.full, self.pairs = kind, full, some_pairs()
        self.true_size = kind == "sdxl" and not full
        reference = randomize(UNet2DConditionModel(**UNETS[kind]), seed=1)
        reference.save_pretrained(folder / "reference")
        unet, self.base = read_unet(folder / "reference")
        self.view = view_of(unet, self.true_size)
        self.frozen = {"unet": self.base, "texts": texts(kind)}
        self.policy = copy.deepcopy(reference)
        if full:
            generator = torch.Generator().manual_seed(2)
            with torch.no_grad():
                for parameter in self.policy.parameters():
                    parameter.add_(1e-3 * torch.randn(parameter.shape, generator=generator))
            self.policy.save_pretrained(folder / "policy")
            self.trained = {"params": read_unet(folder / "policy")[1]}
            self.reference = reference
        else:
            lora = random_adapters({"unet": self.base}, strength=0.1, only=lambda _, path: path[-1] in TARGETS)
            self.trained = {"lora": lora["unet"]}
            targets = [name.replace("to_out_0", "to_out.0") for name in TARGETS]
            self.policy.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=targets))
            modules = dict(self.policy.named_modules())
            for (_, name), (down, up) in matrices(lora).items():
                modules[name].lora_A["default"].weight.data = torch.from_numpy(down)
                modules[name].lora_B["default"].weight.data = torch.from_numpy(up)
            assert sum(hasattr(part, "lora_A") for part in modules.values()) == len(matrices(lora)) > 0
            self.reference = None

    def weights(self):
        """Their trained parameters, by our paths."""
        if self.full:
            named = dict(self.policy.named_parameters())
            return {path: named[torch_key(path)] for path in flax.traverse_util.flatten_dict(self.trained["params"])}
        modules, found = dict(self.policy.named_modules()), {}
        for path in flax.traverse_util.flatten_dict(self.trained["lora"]):
            layer = modules[torch_key((*path[:-1], "")).removesuffix(".")]
            found[path] = getattr(layer, f"lora_{path[-1]}")["default"].weight
        return found

    def ours(self, tree):
        """The arrays of a tree in the form of ``trained``, by path."""
        (part,) = tree.values()
        return {path: np.asarray(x) for path, x in flax.traverse_util.flatten_dict(part).items()}

    def to_ours(self, path, tensor):
        array = tensor.detach().numpy().copy()  # a step changes it in place
        return from_torch(path, array) if self.full else array.T

    # ------------------------------------------------------------------------------------------------- PyTorch's side
    def inputs(self, timesteps):
        """Latents, timesteps, context and more of all winners and then all losers; and the noise."""
        swapped = self.pairs.labels[:, 1] > self.pairs.labels[:, 0]
        order = np.where(swapped[:, None], [1, 0], [0, 1])
        rows = np.arange(PAIRS)
        winners_losers = np.concatenate([self.pairs.images[rows, order[:, i]] for i in (0, 1)])
        clean = torch.from_numpy(winners_losers.astype(np.float32) / 64.0 - 2.0).permute(0, 3, 1, 2)
        keys = pair_keys(KEY if timesteps is None else jax.random.fold_in(KEY, timesteps), self.pairs.positions)
        if timesteps is None:  # those that the update draws
            drawn = [jax.random.randint(rng.stream(key, "timestep"), (), 0, 1000) for key in keys]
            times = torch.tensor([int(t) for t in drawn])
        else:
            times = torch.full((PAIRS,), timesteps)
        noise = np.stack([jax.random.normal(rng.stream(key, "noise"), (SIDE, SIDE, 4)) for key in keys])
        noise = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()).repeat(2, 1, 1, 1)
        scheduler = DDPMScheduler(num_train_timesteps=1000, **SCHEDULER)
        noisy = scheduler.add_noise(clean, noise, times.repeat(2))
        given = {name: torch.from_numpy(rows) for name, rows in self.frozen["texts"].items()}
        more = {}
        if self.kind == "sdxl":
            time_ids = given["time_ids"].repeat(2, 1)
            if self.true_size:
                own = np.concatenate([self.pairs.crops[rows, order[:, i]] for i in (0, 1)])
                time_ids = torch.cat([torch.from_numpy(own.astype(np.float32)), time_ids[:, 4:]], dim=1)
            more = {"added_cond_kwargs": {"text_embeds": given["pooled"].repeat(2, 1), "time_ids": time_ids}}
        return (noisy, times.repeat(2), given["embeddings"].repeat(2, 1, 1)), more, noise

    def outputs(self, timesteps=None):
        """The noise that policy and reference find, and the true one, [2 PAIRS, 4, h, w] each."""
        args, more, noise = self.inputs(timesteps)
        if self.reference is None:
            self.policy.disable_adapters()
        with torch.no_grad():
            of_reference = (self.reference or self.policy)(*args, **more).sample
        if self.reference is None:
            self.policy.enable_adapters()
        return self.policy(*args, **more).sample, of_reference, noise


def errors_in_torch(output, noise):
    """Of the winners and of the losers."""
    return (output - noise).pow(2).mean(dim=[1, 2, 3]).chunk(2)


def loss_in_torch(kind, beta, policy, reference, noise, tied):
    """The losses as their authors' code has them (DIFFUSION_DPO.md, A1 and A7)."""
    (win, lose), (win_reference, lose_reference) = (errors_in_torch(x, noise) for x in (policy, reference))
    u = -0.5 * beta * ((win - lose) - (win_reference - lose_reference))
    if kind == "dpo":
        return -torch.nn.functional.logsigmoid(u).mean()
    if kind == "kto":  # rows, each with its own label
        gains = torch.cat([win_reference - win, lose_reference - lose])
        y = torch.cat([torch.ones_like(u), tied.float()])
        zero = gains.mean().clamp(min=0).detach()
        return (1 - torch.sigmoid((2 * y - 1) * beta * (gains - zero))).mean()
    assert kind == "dspo"
    output, of_reference, target = (x.chunk(2)[0] for x in (policy, reference, noise))
    weight = beta * (1 - torch.sigmoid(u))[:, None, None, None]
    return ((output - target) - weight * (output - of_reference)).pow(2).mean()


# --------------------------------------------------------------------------------------------------------------- tests
@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return functools.cache(lambda kind, full: Case(kind, full, tmp_path_factory.mktemp(f"{kind}{full}")))


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("kind", UNETS)
def test_the_four_errors_of_each_pair_are_those_of_pytorch(case, kind, full):
    made = case(kind, full)
    # One program, of policy and reference.
    errors_of = make_pair_errors(made.view._replace(predict=jax.jit(made.view.predict, compiler_options=QUICK)))
    for timestep in (17, 640):
        errors, *_ = errors_of(made.trained, None, made.frozen, made.pairs, jnp.int32(timestep), KEY)
        with torch.no_grad():
            policy, reference, noise = made.outputs(timestep)
        expected = [*errors_in_torch(policy, noise), *errors_in_torch(reference, noise)]
        for name, values in zip(("win", "lose", "win_reference", "lose_reference"), expected, strict=True):
            np.testing.assert_allclose(getattr(errors, name), values.numpy(), rtol=0, atol=1e-5, err_msg=name)
        moved = np.abs(errors.win - errors.win_reference)
        assert moved.min() > 1e-5, "policy and reference should differ by more than what is compared"


@pytest.mark.parametrize(
    "kind, full, objective",
    [
        ("sd", False, "dpo"),
        ("sd", True, "dpo"),
        ("sdxl", False, "dpo"),
        ("sdxl", True, "dpo"),
        # In the suite: tests/dpo/test_objectives.py, with a linear UNet.
        pytest.param("sd", False, "kto", marks=pytest.mark.slow),
        pytest.param("sdxl", True, "dspo", marks=pytest.mark.slow),
    ],
)
def test_loss_gradients_and_the_first_step_of_adamw_are_those_of_pytorch(case, kind, full, objective):
    """Each tensor of the gradient differs by at most 1e-3 of its length, and by 1e-3 of its largest entry anywhere."""
    made = case(kind, full)
    beta = {"dpo": 200.0, "kto": 200.0, "dspo": 0.5}[objective]
    train = dpo_config.get_config().train
    train.accumulation_steps = 1
    optimizer = make_optimizer(train, warmup_constant(LEARNING_RATE, 0)).transformation
    optimizer = Optimizer(optax.chain(optax.trace(0.0), optimizer))  # its state is the gradient
    update = make_dpo_update(made.view, OFFLINE[objective], LossOptions(beta), optimizer)
    update = jax.jit(update, compiler_options=QUICK)
    state, metrics = update(TrainState.create(made.trained, optimizer), made.frozen, made.pairs, KEY)
    row, gradients = dpo_metrics([metrics], guard=False), made.ours(state.opt_state[0].trace)

    policy = copy.deepcopy(made.policy)  # the next test is to find what this one found
    theirs, made.policy = made.policy, policy
    try:
        weights = made.weights()
        outputs = made.outputs()
        tied = torch.from_numpy(made.pairs.labels[:, 0] == 0.5)
        loss = loss_in_torch(objective, beta, *outputs, tied)
        loss.backward()
        found = {path: made.to_ours(path, weight.grad) for path, weight in weights.items()}
        optimizer = torch.optim.AdamW(weights.values(), lr=LEARNING_RATE, weight_decay=1e-2)
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
    finally:
        made.policy = theirs

    assert row["num_pairs"] == PAIRS
    # Errors are rounded at 2.4e-7 each, and a logit is half of beta times four of them.
    np.testing.assert_allclose(row["loss"], loss.item(), rtol=2e-6, atol=beta * 5e-7)
    np.testing.assert_allclose(row["grad_norm"], norm.item(), rtol=1e-3)
    for name, values in zip(
        ("error/chosen", "error/rejected", "error/chosen_reference", "error/rejected_reference"),
        [e for output in outputs[:2] for e in errors_in_torch(output.detach(), outputs[2])],
        strict=True,
    ):
        np.testing.assert_allclose(row[name], values.mean().item(), rtol=1e-5, err_msg=name)
    assert found.keys() == gradients.keys()
    worst = {}
    for path, expected in found.items():
        difference = np.abs(gradients[path] - expected)
        assert np.linalg.norm(expected) > 0, path
        worst[path] = max(
            np.linalg.norm(difference) / np.linalg.norm(expected), difference.max() / np.abs(expected).max()
        )
    assert max(worst.values()) <= 1e-3, sorted(worst.items(), key=lambda item: -item[1])[:5]

    assert norm > 1.0 or not full, "the clip should show"
    # Adam's first step is the gradient's sign where the gradient is clear; elsewhere only its length is known.
    stepped, clear, count = made.ours(state.trained), 0, 0
    for path, weight in weights.items():
        before, after = made.ours(made.trained)[path], made.to_ours(path, weight)
        large = np.abs(found[path]) > 1e-2 * np.sqrt(np.mean(np.square(found[path])))
        clear, count = clear + large.sum(), count + large.size
        np.testing.assert_allclose(stepped[path][large], after[large], rtol=1e-6, atol=1e-2 * LEARNING_RATE)
        assert np.abs(stepped[path] - before).max() <= 1.02 * LEARNING_RATE
    assert clear > 0.9 * count


def test_the_better_image_comes_first_and_both_have_the_timestep_and_the_noise_of_their_pair():
    """From images and captions on, with the random numbers of ours: autoencoder, noise and text in PyTorch."""
    folder = small_pipeline()
    pipeline, theirs = read_pipeline(folder), StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    process = make_schedule(pipeline.scheduler_config, 10)
    encode = make_encode_captions(pipeline)
    predict = make_guided_prediction(pipeline.unet.apply, 1.0)
    view = PairView(encode, make_add_noise(pipeline, process), predict, process, tokenize_prompts(pipeline, [""]))
    captions = ["a fox", "a lemon on a teal background", ""]
    labels = np.array([[0, 1], [1, 0], [0.5, 0.5]], np.float32)
    images = np.random.default_rng(0).integers(0, 256, (3, 2, *pipeline.image_size, 3), np.uint8)
    pairs = LabelledPairs(
        images=images,
        tokens=tokenize_prompts(pipeline, captions),
        crops=np.zeros((3, 2, 4), np.int32),
        scorer_tokens=None,
        labeller_tokens=None,
        labels=labels,
        weights=np.ones(3, np.float32),
        positions=np.arange(3, dtype=np.uint32),
    )
    times, keys = jnp.array([3, 500, 998]), pair_keys(KEY, pairs.positions)
    seen = jax.jit(functools.partial(see_pairs, view))(pipeline.params, pairs, times, keys)
    assert seen.timesteps.tolist() == [3, 3, 500, 500, 998, 998]
    assert seen.tied.tolist() == [False, False, True]

    scheduler = DDPMScheduler.from_config(theirs.scheduler.config)
    with torch.no_grad():
        context, _ = theirs.encode_prompt(captions, "cpu", 1, False)
        for i, key in enumerate(keys):
            winner_first = images[i, ::-1] if labels[i, 1] > labels[i, 0] else images[i]
            pixels = torch.from_numpy(winner_first.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1
            posterior = theirs.vae.encode(pixels).latent_dist
            draw = jax.random.normal(rng.stream(key, "posterior"), (2, *pipeline.latent_shape))
            latents = posterior.mean + posterior.std * torch.tensor(np.moveaxis(np.asarray(draw), -1, 1))
            noise = np.asarray(jax.random.normal(rng.stream(key, "noise"), pipeline.latent_shape))
            np.testing.assert_array_equal(seen.noise[i], noise)
            both = torch.tensor(np.moveaxis(noise, -1, 0)).expand(2, -1, -1, -1)
            scaled = latents * theirs.vae.config.scaling_factor
            noisy = np.moveaxis(scheduler.add_noise(scaled, both, torch.tensor([int(times[i])] * 2)).numpy(), 1, -1)
            np.testing.assert_allclose(seen.latents[2 * i : 2 * i + 2], noisy, rtol=0, atol=1e-4, err_msg=str(i))
            for row in (2 * i, 2 * i + 1):
                np.testing.assert_allclose(seen.prompts.embeddings[row], context[i].numpy(), rtol=0, atol=1e-4)
