"""Weights & Biases, for a run whose config names a ``wandb.project``.

The only module that imports wandb, which is no requirement: ``pip install wandb``. Process 0 alone has a run. W&B's own
variables (``WANDB_MODE=offline``, ``WANDB_API_KEY``, ``WANDB_BASE_URL``) hold; its files lie in ``workdir/wandb``.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from spo_jax.distributed.agreement import agree
from spo_jax.errors import UserError, notice
from spo_jax.files import write_text
from spo_jax.runs.metrics import METRICS_FILE, read_metrics

ID_FILE = "wandb_run_id.txt"
_FINISH_SECONDS = 60  # at the end, for the last rows; without network W&B would wait for it without an end


class WandbRun:
    """A run on W&B, or nothing: without a project, in the processes after the first, and after W&B has failed.

    A failure is said once, and training goes on without W&B; the rows are in ``metrics.jsonl`` in any case.
    """

    def __init__(self) -> None:
        self._run: Any = None

    def start(self, config: ConfigDict, workdir: Path, resume_step: int) -> int:
        """See the function ``start``, which calls this in the first process."""
        import wandb

        path = workdir / ID_FILE
        run_id = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
        if not re.fullmatch(r"[0-9a-f]{16}", run_id):
            run_id = secrets.token_hex(8)
            write_text(path, run_id + "\n")
        try:
            run = self._run = wandb.init(
                project=config.wandb.project,
                entity=config.wandb.entity or None,
                name=config.wandb.name or None,
                id=run_id,
                resume="allow",
                reinit="finish_previous",
                dir=str(workdir),
                config=config.to_dict(),
                allow_val_change=True,  # of what may change when a run goes on, such as the number of devices
                settings=wandb.Settings(silent=True, console="off", finish_timeout=_FINISH_SECONDS),
            )
            if run.offline:
                # What lies on disk cannot be continued, and of two folders of one run W&B shows the one that it gets
                # last: each has to hold the whole run.
                for row in read_metrics(workdir / METRICS_FILE, resume_step):
                    run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])
                print(f"W&B: offline; `wandb sync {run.settings.sync_dir}` sends the run later.")
            elif run.url:
                print(f"W&B: {run.url}")
        except Exception as error:
            if not resume_step:
                raise UserError(
                    f"W&B does not take the run ({_reason(error)}); mend that, set WANDB_MODE=offline to keep the rows "
                    "here, or leave config.wandb.project empty."
                ) from error
            self._run = None
            _warn(error)
        return 0

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One row. W&B drops rows up to the last step it has: those that a resumed run makes again are the same."""
        self._try(lambda run: run.log({name: float(value) for name, value in scalars.items()}, step=step))

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """One picture, uint8 [H, W, 3]."""
        self._try(lambda run: run.log({name: sys.modules["wandb"].Image(image)}, step=step))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """What ``summary.json`` holds, without the config, which W&B has since the start."""
        self._try(lambda run: run.summary.update({name: x for name, x in summary.items() if name != "config"}))

    def _try(self, call: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            call(self._run)
        # Network, disk and W&B's own process fail in many ways, and none of them is worth a run.
        except Exception as error:
            self._run = None
            _warn(error)


def check(config: ConfigDict) -> None:
    """Makes sure that W&B can be used if ``config.wandb.project`` asks for it; all processes must call this.

    Raises:
      UserError: wandb is not installed, or nobody is logged in.
    """

    def check_first() -> int:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "config.wandb.project is set, but wandb is not installed; install it with `pip install wandb`, or "
                "leave the key empty."
            ) from error
        try:
            # Asks nobody: a question would stop a run that its scheduler has started. What is configured is not tried.
            online = wandb.setup(settings=wandb.Settings(silent=True)).settings.mode == "online"
            ready = not online or wandb.login(prompt=False, verify=False)
        except Exception as error:
            what = f"W&B's settings do not work ({_reason(error)})"
            raise UserError(f"config.wandb.project is set, but {what}.") from error
        if not ready:
            raise UserError(
                "config.wandb.project is set, but nobody is logged in to W&B; run `wandb login`, set "
                "WANDB_MODE=offline to keep the rows here, or leave the key empty."
            )
        return 0

    if config.wandb.project:
        agree(check_first)


def start(config: ConfigDict, workdir: Path, resume_step: int) -> WandbRun:
    """The run of ``workdir``, new or continued; all processes must call this. Without a project nothing happens.

    ``workdir`` gets W&B's files, and the run's id, by which the same command goes on with the same run. ``resume_step``
    is that of the checkpoint that the run goes on from; 0 if there is none.

    Raises:
      UserError: W&B does not take the run. A run that is resumed goes on without W&B instead: its scheduler may have
        started it, and nobody is there to mend anything.
    """
    opened = WandbRun()
    if config.wandb.project:
        agree(lambda: opened.start(config, workdir, resume_step))
    return opened


@contextlib.contextmanager
def finished() -> Iterator[None]:
    """Around what trains: however it ends, W&B is told so and gets the last rows."""
    exit_code = 1
    try:
        yield
        exit_code = 0
    finally:
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            try:
                wandb.run.finish(exit_code=exit_code)
            except Exception as error:
                _warn(error)


def _warn(error: Exception) -> None:
    notice(f"warning: W&B failed ({_reason(error)}); what it lacks is in {METRICS_FILE}.")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
