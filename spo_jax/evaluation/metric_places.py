"""Where the files of the published metrics are by default, each at a commit."""

from __future__ import annotations

CLIP_L = "openai/clip-vit-large-patch14@32bd64288804d66eefd0ccbe215aa642df71cc41"
_HPSV2 = "xswu/HPSv2@697403c78157020a1ae59d23f111aa58ced35b0a"
HPSV2_FILES = {"hpsv2": "HPS_v2_compressed.pt", "hpsv2.1": "HPS_v2.1_compressed.pt"}
AESTHETIC_FILE = "sac+logos+ava1-l14-linearMSE.pth"
# Where each metric's weights are by default. All read the vocabulary of CLIP_L, the same in all of them.
PLACES = {
    "pickscore": "yuvalkirstain/PickScore_v1@a4e4367c6dfa7288a00c550414478f865b875800",
    "hpsv2": f"{_HPSV2}/{HPSV2_FILES['hpsv2']}",
    "hpsv2.1": f"{_HPSV2}/{HPSV2_FILES['hpsv2.1']}",
    "aesthetic": "github:christophschuhmann/improved-aesthetic-predictor@6934dd81792f086e613a121dbce43082cb8be85e/"
    f"{AESTHETIC_FILE}#sha256=21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    "clip": CLIP_L,
    "clip_h": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K@1c2b8495b28150b8a4922ee1c8edee224c284c0c",
}


def places_of(metric: str) -> list[tuple[str, bool]]:
    """What a metric reads by default, and whether of it weights are read or the vocabulary alone.

    ``metric`` is NAME or NAME=PLACE; the files of a place that a user names are not listed.
    """
    if metric not in PLACES:
        return []
    vocabulary = [(CLIP_L, metric == "aesthetic")] if PLACES[metric] != CLIP_L else []
    return [(PLACES[metric], True), *vocabulary]
