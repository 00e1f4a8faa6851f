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
import jaxtyping
import pytest

import tests.shapes  # noqa: F401 (named below)
from spo_jax import errors

# What `-m fast` runs: modules without PyTorch, and quick, because they compile no network.
FAST = {
    "commands": ("test_readme.py",),
    "data": ("test_prompt_files.py", "test_prompts.py"),
    "diffusion": ("test_guidance.py", "test_process.py"),
    "distributed": ("test_mesh.py", "test_roll_call.py"),
    "evaluation": (
        "test_colorfulness.py",
        "test_evaluation_report.py",
        "test_layouts.py",
        "test_preprocess.py",
        "test_results.py",
        "test_score_table.py",
        "test_statistics.py",
    ),
    "formats": ("test_home.py", "test_hub.py", "test_remote.py", "test_safetensors_io.py", "test_write_pipeline.py"),
    "labelling": ("test_server.py", "test_session.py"),
    "models": ("test_configs.py", "test_layers.py"),
    "planning": ("test_collectives.py",),
    "preference": ("test_accuracy.py", "test_pairs.py"),
    "root": ("test_fast.py", "test_files.py", "test_rng.py", "test_shapes.py"),
    "runs": ("test_artifacts.py", "test_config_check.py", "test_metrics.py", "test_recorded_checkpoint.py"),
    "spm": ("test_spm_report.py",),
    "spo": ("test_exchange.py", "test_report.py"),
    "system": ("test_processes.py", "test_wheel.py"),
}

# Shapes are checked where a module annotates them. Elsewhere the check would find nothing and slow every call.
PACKAGE = Path(__file__).parents[1] / "spo_jax"
ANNOTATED = [path for path in PACKAGE.rglob("*.py") if "[Array, " in path.read_text(encoding="utf-8")]
MODULES = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in ANNOTATED]
jaxtyping.install_import_hook(MODULES, "tests.shapes.check")
jaxtyping.Array = jaxtyping.ArrayLike  # JAX's functions take NumPy's arrays and numbers as well
jax.config.update("jax_num_cpu_devices", 8)
hypothesis.settings.register_profile("spo_jax", derandomize=True, deadline=None, max_examples=25)
hypothesis.settings.load_profile("spo_jax")


def _is_fast(path: Path) -> bool:
    return path.name in FAST.get(path.parent.name, ())


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Other modules are not even imported for ``-m fast``: it takes seconds, and some need PyTorch."""
    alone = config.option.markexpr == "fast" and collection_path.name.startswith("test_")
    return True if alone and not _is_fast(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what is fast."""
    for item in items:
        if _is_fast(item.path) and item.get_closest_marker("slow") is None:
            item.add_marker("fast")


@pytest.fixture(autouse=True)
def _notices_are_said_again() -> None:
    """A process says a sentence once; each test is to see those of its own."""
    errors.notice.cache_clear()
