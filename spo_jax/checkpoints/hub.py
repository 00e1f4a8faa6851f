"""Models by name: a local folder, or a repository of the Hugging Face hub at one pinned commit.

A pinned commit never changes, so a run can be repeated, and what is cached (``HF_HOME``) needs no network. Only
configs, tokenizers and weights are fetched; no code is fetched or run.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path, PurePosixPath

from spo_jax.errors import UserError

_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[^/@]*)(?:/(?P<inside>.+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt")
_CONFIGS = ("*.json", "*.txt")
# Parts of published pipelines that have weights, and those that are never read here.
_PARTS = (".", "unet", "vae", "text_encoder", "text_encoder_2")
_UNUSED = ["safety_checker/*", "feature_extractor/*", "image_encoder/*", "vae_1_0/*"]


def resolve_model(name: str | Path, *, variant: str | None = None, weights: bool = True) -> Path:
    """The local folder (or weight file) that ``name`` stands for; fetches what the hub's cache lacks.

    Args:
      name: a local path, or ``org/name@commit`` with the 40 hexadecimal digits of a commit; a folder or a weight file
        inside the repository may follow, as in ``org/name@commit/tokenizer``.
      variant: of the weight files to fetch, such as ``"fp16"``.
      weights: False fetches configs and tokenizers only.

    Raises:
      UserError: no such local path; a hub id without a pinned commit; files that are neither cached nor to be had.
    """
    if Path(name).exists():
        return Path(name)
    match = _HUB_NAME.fullmatch(str(name))
    if match is None:
        raise UserError(
            f"Model {str(name)!r} does not exist here; give a local folder, or a repository of the Hugging Face hub "
            "with its commit: org/name@<40 digits>."
        )
    repo, revision, inside = match["repo"], match["revision"], PurePosixPath(match["inside"] or ".")
    if not _COMMIT.fullmatch(revision):
        raise UserError(
            f"Model {str(name)!r} is not pinned to a commit; write {repo}@<40 digits>, with the commit's hash from "
            f"https://huggingface.co/{repo}/commits/main."
        )
    if ".." in inside.parts or inside.is_absolute():
        raise UserError(f"Model {str(name)!r} names a path outside its repository.")
    if inside.suffix in _WEIGHT_SUFFIXES:
        patterns = [str(inside), *(str(inside.parent / pattern) for pattern in _CONFIGS)]
        return _fetch(repo, revision, patterns) / inside
    configs = [str(inside / pattern) for pattern in _CONFIGS]
    if not weights:
        return _fetch(repo, revision, configs) / inside
    folder = _fetch(repo, revision, configs + _weight_patterns(inside, variant, "safetensors")) / inside
    if _lacks_safetensors(folder):
        folder = _fetch(repo, revision, configs + _weight_patterns(inside, variant, "bin")) / inside
    return folder


def repository_of(name: str | Path) -> str | None:
    """``org/name`` of a hub id such as ``org/name@commit``; None if ``name`` is none."""
    match = _HUB_NAME.fullmatch(str(name))
    return match["repo"] if match else None


def find_file(name: str | Path, file: str) -> Path | None:
    """A file of a model (see ``resolve_model``) that is here already, in its folder or in the hub's cache, or None."""
    match = _HUB_NAME.fullmatch(str(name))
    if Path(name).exists() or match is None:
        path = Path(name) / file
    else:
        import huggingface_hub  # takes a second to import

        inside = str(PurePosixPath(match["inside"] or ".") / file)
        found = huggingface_hub.try_to_load_from_cache(match["repo"], inside, revision=match["revision"])
        path = Path(found) if isinstance(found, str) else Path()
    return path if path.is_file() else None


def missing(path: Path, what: str = "File") -> str:
    """The sentence for a file that is not there; if it belongs to the hub's cache, with the command that fetches it."""
    for folder in path.parents:
        if _COMMIT.fullmatch(folder.name) and folder.parent.name == "snapshots":
            repo = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
            file = shlex.quote(path.relative_to(folder).as_posix())
            return (
                f"{what} {path} is not in the hub's cache; if {repo} has it, fetch it with "
                f"`hf download {repo} {file} --revision {folder.name}`."
            )
    return f"{what} {path} does not exist; is {path.parent} a complete model folder?"


def _weight_patterns(inside: PurePosixPath, variant: str | None, kind: str) -> list[str]:
    """``*model.safetensors``, its variant and its shards: pipelines and CLIPs, but no checkpoints of other programs."""
    dot = f".{variant}" if variant else ""
    return [str(inside / f"*model{dot}.{kind}"), str(inside / f"*model{dot}-*-of-*.{kind}")]


def _lacks_safetensors(folder: Path) -> bool:
    """Whether a model of the snapshot came without the weights that were asked for first."""
    models = [folder / part for part in _PARTS if (folder / part / "config.json").is_file()] or [folder]
    return any(not any(model.glob("*.safetensors")) for model in models)


def _fetch(repo: str, revision: str, patterns: list[str]) -> Path:
    """The snapshot of a commit in the hub's cache, with all files of the repository that match ``patterns``."""
    import huggingface_hub  # takes a second to import, and a local folder does not need it

    try:
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=patterns, ignore_patterns=_UNUSED
        )
    # Network, proxy, authentication and disk fail in many ways, which all end the same for the user.
    except Exception as error:
        command = " ".join([f"hf download {repo} --revision {revision}", *(f'--include "{p}"' for p in patterns)])
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"Model {repo} at {revision} is not complete in the hub's cache and could not be fetched ({reason}); "
            f"with network, fetch it with `{command}`."
        ) from error
    return Path(folder)
