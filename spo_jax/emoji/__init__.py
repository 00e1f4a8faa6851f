"""The emoji world: a closed world of captions and pictures, and the models trained on it that ship with the package.

Configs name its files as ``emoji:model``, ``emoji:model/scorer`` or ``emoji:prompts/spo.txt``.
"""
