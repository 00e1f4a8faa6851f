"""One CPU platform with eight simulated devices, no network, and the same hypothesis examples in every run.

What is compiled lies in one folder for the workers of pytest-xdist and the commands they start, and goes with the
session: many tests run the same programs, and to compile them takes most of the time.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers have it from the process that starts them
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="spo_jax_compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import hypothesis
import jax
import pytest

# The modules of tests/unit that `-m fast` runs: without PyTorch, and quick, because they compile no network.
FAST = frozenset(
    f"test_{name}.py"
    for name in (
        *(
            "accuracy",
            "artifacts",
            "colorfulness",
            "exchange",
            "fast",
            "files",
            "guidance",
            "layers",
            "mesh",
            "metrics",
        ),
        *(
            "pairs",
            "processes",
            "prompts",
            "recorded_checkpoint",
            "records",
            "remote",
            "report",
            "roll_call",
            "prompt_files",
        ),
        *("seams", "spm_report", "write_pipeline"),
    )
)

jax.config.update("jax_num_cpu_devices", 8)
hypothesis.settings.register_profile("spo_jax", derandomize=True, deadline=None, max_examples=25)
hypothesis.settings.load_profile("spo_jax")


def _is_fast(path: Path) -> bool:
    return path.parent.name == "unit" and path.name in FAST


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Other modules are not even imported for ``-m fast``: it takes seconds, and some need PyTorch."""
    alone = config.option.markexpr == "fast" and collection_path.name.startswith("test_")
    return True if alone and not _is_fast(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is fast."""
    for item in items:
        if _is_fast(item.path):
            item.add_marker("fast")
