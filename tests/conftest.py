"""One CPU platform with eight simulated devices, no network, and the same hypothesis examples in every run.

What is compiled lies in one folder for the workers of pytest-xdist and the commands they start, and goes with the
session: many tests run the same programs, and to compile them takes most of the time.
"""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers have it from the process that starts them
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="spo_jax_compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import hypothesis
import jax

jax.config.update("jax_num_cpu_devices", 8)
hypothesis.settings.register_profile("spo_jax", derandomize=True, deadline=None, max_examples=25)
hypothesis.settings.load_profile("spo_jax")
