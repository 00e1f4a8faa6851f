"""What report and model card say of a method: each method that tunes a UNet fills a ``Words``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Paper(NamedTuple):
    """A paper to cite: its link in Markdown, with where it appeared, and its entry in BibTeX."""

    link: str
    bibtex: str


# Here, because a preference model cites it as well.
SPO_PAPER = Paper(
    "[SPO](https://arxiv.org/abs/2406.04314), CVPR 2025",
    """\
@inproceedings{liang2025spo,
  title     = {Aesthetic Post-Training Diffusion Models from Generic Preferences
               with Step-by-step Preference Optimization},
  author    = {Liang, Zhanhao and Yuan, Yuhui and Gu, Shuyang and Chen, Bohan and Hang, Tiankai and Cheng, Mingxi
               and Li, Ji and Zheng, Liang},
  booktitle = {CVPR},
  year      = {2025},
  url       = {https://arxiv.org/abs/2406.04314},
}
""",
)
# The beginning of a card's limits, for what is trained with a scorer, and for a scorer.
LIMITS_OF_SCORERS = (
    "It learned from a model of preferences: what that model gets wrong, or its data do not show, it gets wrong as well"
)


class Words(NamedTuple):
    """A method's own words for the report and the model card of a run.

    Attributes:
      name: in titles, such as "SPO".
      title: of the report.
      teacher: what the model learned from, behind "learning from", such as "a preference model".
      point: what a point of the report's curves is of, such as "a batch of prompts".
      curves: of the report: title, what a good run looks like, and keys of ``metrics.jsonl``, with spaces between.
      times: of the report: what the seconds under a key of ``metrics.jsonl`` were spent on.
      training: the method's full name, behind "trained with" on the card.
      introduction: sentences of the card on how the model has learned.
      limits: how the sentence begins that tells what not to expect; the base model's biases follow.
      paper: what the card cites.
      notes: by key of the config, what the card's table of what the model was made from adds to what the key is for.
      more: further rows of that table: part, what, licence.
    """

    name: str
    title: str
    teacher: str
    point: str
    curves: Sequence[tuple[str, str, str]]
    times: Mapping[str, str]
    training: str
    introduction: str
    limits: str
    paper: Paper
    notes: Mapping[str, str]
    more: Sequence[tuple[str, str, str]] = ()
