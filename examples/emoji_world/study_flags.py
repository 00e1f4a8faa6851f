"""The flags that all studies of the emoji world have: ``study``, ``comparison`` and ``labels``."""

from __future__ import annotations

from absl import flags

WORKDIR = flags.DEFINE_string("workdir", None, "Folder for the runs and what is written of them.")
TABLE = flags.DEFINE_bool("table", False, "Write what the runs that are there have found, and make none.")
