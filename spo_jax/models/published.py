"""The published ``config.json`` files, so that a model can be planned for without having it.

They are in ``published.json`` by a name each; bookkeeping fields are left out where they are long, and towers that are
repeated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Config = dict[str, Any]

_FILE = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
CONFIGS: dict[str, Config] = _FILE["configs"]
CLIP_VIT_H = CONFIGS["CLIP_VIT_H"]
# By repository of the hub: the parts of a pipeline, a CLIP, or an autoencoder.
PIPELINES: dict[str, dict[str, Config]] = {
    repository: {part: CONFIGS[name] for part, name in parts.items()}
    for repository, parts in _FILE["pipelines"].items()
}
CLIPS: dict[str, Config] = {repository: CONFIGS[name] for repository, name in _FILE["clips"].items()}
VAES: dict[str, Config] = {repository: CONFIGS[name] for repository, name in _FILE["vaes"].items()}
