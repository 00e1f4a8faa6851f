"""Prompt sets that the field measures with, by name, each at a pinned commit.

They are other people's sentences: fetched and checked, not shipped. Who uses them: docs/metrics.md.
"""

from __future__ import annotations

_SDPO = "github:AIDC-AI/Diffusion-SDPO@84fb241c1b89705a247da8b0d6047798ca49830d/prompts/"

PROMPT_SETS = {
    # The paper's 4,000 to train on, out of Pick-a-Pic's training split.
    "spo-4k": (
        "github:RockeyCoss/SPO@27a86428edcff3b25dcce8001be94a7a01608f58/"
        "spo_training_and_inference/assets/prompts/4k_training_prompts.json"
        "#sha256=804018fcb30bc9bed28a2a0518855bffd386675a3c5138f96b925071cbae6fc4"
    ),
    # 487 of Pick-a-Pic v2's test split; the papers' 500 left the hub with their data set.
    "pickapic-test": f"{_SDPO}papv2.json#sha256=531f3ca923035b5f17dbcbc60a7d7dfa476219e59b0e99617bb3f0afabf5663b",
    "hpd": f"{_SDPO}hpsv2.json#sha256=417a2ce00b3307780402c1d27528a0e41ed26651384687bbf3aa06c4c7e559fd",
    "parti": f"{_SDPO}partiprompts.json#sha256=b11d46a91c4202461d6d1df69da0b9af5070851403574de6efd6736ccad22291",
    "geneval": "github:djghosh13/geneval@af4902f24d3ca90ebbb446dd9891a59e0f82725f/prompts/evaluation_metadata.jsonl",
}
