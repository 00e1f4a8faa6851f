"""The closed world of captions: a thing that has an emoji, on a background of a named colour.

Every pair of a concept and a colour is one prompt. The prompts are split once and for all: `HELD_OUT_PROMPTS` are shown
neither to the base model nor to preference optimization, so a gain on them is a gain on captions never seen; every
concept and every colour does occur in `TRAIN_PROMPTS`.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

NUM_HELD_OUT = 240


class Concept(NamedTuple):
    """One thing: the character whose emoji shows it, and its English name."""

    char: str
    name: str


class ColorRange(NamedTuple):
    """The shades a colour name covers: (low, high) of hue, saturation and value in 0..1; hues wrap around at 1."""

    hue: tuple[float, float]
    saturation: tuple[float, float]
    value: tuple[float, float]


class Prompt(NamedTuple):
    """One caption as indices into `CONCEPTS` and `COLOR_NAMES`."""

    concept: int
    color: int


# Single code points with their short names from Unicode CLDR (examples/emoji_world/pictures.py --check compares them).
# Chosen by eye: each must be recognisable at 32 pixels and not look like another one.
_TABLE = """
🐒 monkey; 🦍 gorilla; 🐶 dog face; 🦊 fox; 🦝 raccoon; 🐱 cat face; 🦁 lion; 🐯 tiger face;
🐴 horse face; 🦄 unicorn; 🦓 zebra; 🐮 cow face; 🐷 pig face; 🦒 giraffe; 🐘 elephant; 🐭 mouse face;
🐰 rabbit face; 🦔 hedgehog; 🐻 bear; 🐨 koala; 🐼 panda; 🦩 flamingo; 🦜 parrot; 🐸 frog; 🐊 crocodile;
🐢 turtle; 🐍 snake; 🐧 penguin; 🦉 owl; 🦆 duck; 🐓 rooster; 🐤 baby chick; 🐬 dolphin;
🐳 spouting whale; 🐠 tropical fish; 🐙 octopus; 🐌 snail; 🦋 butterfly; 🐞 lady beetle; 🐝 honeybee;
🦀 crab; 🦕 sauropod; 🐲 dragon face; 🌹 rose; 🌺 hibiscus; 🌻 sunflower; 🌷 tulip; 🌲 evergreen tree;
🌵 cactus; 🍁 maple leaf; 🍄 mushroom; 🍀 four leaf clover; 🍉 watermelon; 🍊 tangerine; 🍋 lemon;
🍌 banana; 🍍 pineapple; 🍎 red apple; 🍐 pear; 🍑 peach; 🍓 strawberry; 🥝 kiwi fruit; 🥥 coconut;
🥑 avocado; 🍆 eggplant; 🥕 carrot; 🌶 hot pepper; 🥦 broccoli; 🥐 croissant; 🥨 pretzel;
🧀 cheese wedge; 🍔 hamburger; 🍕 pizza; 🌭 hot dog; 🌮 taco; 🍩 doughnut; 🍪 cookie; 🎂 birthday cake;
🧁 cupcake; 🍭 lollipop; 🍬 candy; 🍯 honey pot; 🫖 teapot; 🍺 beer mug; 🍞 bread; 🌽 ear of corn;
🚂 locomotive; 🚌 bus; 🚒 fire engine; 🚓 police car; 🚕 taxi; 🚜 tractor; 🛵 motor scooter; 🚢 ship;
🛩 small airplane; 🚁 helicopter; 🚀 rocket; 🛸 flying saucer; ⛵ sailboat; ⚓ anchor; 🏠 house;
🏰 castle; ⛺ tent; 🌋 volcano; 🌈 rainbow; 🔥 fire; ⭐ star; ☀ sun; 🌙 crescent moon; 🪐 ringed planet;
☃ snowman; 🎁 wrapped gift; 🏆 trophy; 🏀 basketball; ⚽ soccer ball; ⚾ baseball; 🎯 bullseye;
🎲 game die; 🧩 puzzle piece; 🧸 teddy bear; 🧶 yarn; 👗 dress; 👑 crown; 🎩 top hat; 👟 running shoe;
💎 gem stone; 🔔 bell; 🎸 guitar; 🎷 saxophone; 🥁 drum; 📺 television; 📷 camera; 💡 light bulb;
🕯 candle; 📕 closed book; 📦 package; ✏ pencil; 🔑 key; 🔨 hammer; 🪓 axe; 🧲 magnet; ⏰ alarm clock;
🤖 robot; 👻 ghost; 👽 alien; 💀 skull; 🎒 backpack; 🧭 compass; ❤ red heart; 💣 bomb; 🧢 billed cap;
🛹 skateboard; 🪁 kite; 🪣 bucket; 🎈 balloon
"""

CONCEPTS: tuple[Concept, ...] = tuple(Concept(*entry.strip().split(" ", 1)) for entry in _TABLE.split(";"))

# Saturation ranges are wide on purpose: one caption has dull and vivid pictures, so that preference tuning for
# colourfulness has something to move. Hues keep a distance, which `unseen` backgrounds use. Brown is dark orange.
COLORS: dict[str, ColorRange] = {
    "red": ColorRange((-0.015, 0.015), (0.25, 1.0), (0.60, 0.95)),
    "orange": ColorRange((0.070, 0.095), (0.25, 1.0), (0.85, 1.00)),
    "yellow": ColorRange((0.145, 0.170), (0.25, 1.0), (0.85, 1.00)),
    "green": ColorRange((0.310, 0.360), (0.25, 1.0), (0.45, 0.80)),
    "teal": ColorRange((0.485, 0.515), (0.25, 1.0), (0.45, 0.80)),
    "blue": ColorRange((0.600, 0.650), (0.25, 1.0), (0.60, 1.00)),
    "purple": ColorRange((0.750, 0.785), (0.25, 1.0), (0.50, 0.85)),
    "pink": ColorRange((0.880, 0.920), (0.25, 1.0), (0.92, 1.00)),
    "brown": ColorRange((0.055, 0.085), (0.25, 0.9), (0.28, 0.48)),
    "gray": ColorRange((0.0, 1.0), (0.0, 0.04), (0.40, 0.65)),
    "black": ColorRange((0.0, 1.0), (0.0, 0.04), (0.00, 0.12)),
    "white": ColorRange((0.0, 1.0), (0.0, 0.03), (0.93, 1.00)),
}
COLOR_NAMES: tuple[str, ...] = tuple(COLORS)


def caption(concept: int, color: int) -> str:
    """The caption of one prompt, such as ``an owl on a teal background``; see ``Prompt``."""
    return f"{_with_article(CONCEPTS[concept].name)} on {_with_article(COLOR_NAMES[color])} background"


def captions(prompts: tuple[Prompt, ...]) -> list[str]:
    """The captions of some prompts, in their order."""
    return [caption(*prompt) for prompt in prompts]


def words() -> list[str]:
    """Every word that occurs in a caption, sorted, once each."""
    return sorted({word for prompt in ALL_PROMPTS for word in caption(*prompt).split()})


def _with_article(noun: str) -> str:
    # "unicorn" begins with a vowel letter but not with a vowel sound.
    return f"{'an' if noun[0] in 'aeiou' and not noun.startswith('uni') else 'a'} {noun}"


ALL_PROMPTS: tuple[Prompt, ...] = tuple(
    Prompt(concept, color) for concept in range(len(CONCEPTS)) for color in range(len(COLOR_NAMES))
)
# The prompts with the smallest SHA-256 of their caption are held out: fixed, and blind to the table's order.
_BY_HASH = sorted(ALL_PROMPTS, key=lambda prompt: hashlib.sha256(caption(*prompt).encode()).digest())
HELD_OUT_PROMPTS: tuple[Prompt, ...] = tuple(sorted(_BY_HASH[:NUM_HELD_OUT]))
TRAIN_PROMPTS: tuple[Prompt, ...] = tuple(sorted(_BY_HASH[NUM_HELD_OUT:]))
# Preference optimization samples for the captions the base model knows, and is judged on both sets.
SPO_PROMPTS = TRAIN_PROMPTS


def prompt_files() -> dict[str, str]:
    """The prompt files that ship in ``spo_jax/emoji/prompts``, by name: a caption a line, order fixed by hash."""

    def text(prompts: tuple[Prompt, ...]) -> str:
        ordered = sorted(captions(prompts), key=lambda line: hashlib.sha256(f"order {line}".encode()).digest())
        return "".join(f"{line}\n" for line in ordered)

    return {"spo.txt": text(SPO_PROMPTS), "held_out.txt": text(HELD_OUT_PROMPTS)}
