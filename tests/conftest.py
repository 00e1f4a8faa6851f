"""One CPU platform with eight simulated devices, no network, and the same hypothesis examples in every run."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import jax

jax.config.update("jax_num_cpu_devices", 8)
hypothesis.settings.register_profile("spo_jax", derandomize=True, deadline=None, max_examples=25)
hypothesis.settings.load_profile("spo_jax")
