"""The labelling page: one file without others, plain, and the policy that lets it run its own script and no other."""

import base64
import hashlib

_STYLE = """
:root { color-scheme: light dark; --paper: #f6f6f4; --card: #fff; --ink: #1c1f1e; --soft: #5d6462; --line: #0002;
  --main: #0a7d6c; --wrong: #b4501e; }
@media (prefers-color-scheme: dark) { :root { --paper: #141716; --card: #1f2423; --ink: #ecefee; --soft: #a0a9a6;
  --line: #fff2; --main: #4fd1bd; --wrong: #f0a070; } }
* { box-sizing: border-box; } [hidden] { display: none !important; }
body { margin: 0; min-height: 100dvh; display: flex; flex-direction: column; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
header, main, footer { width: 100%; max-width: 1280px; margin: 0 auto; padding: 0 clamp(.8rem, 3vw, 2rem); }
header { display: flex; align-items: center; gap: 1rem; padding-top: .9rem; font-size: .9rem; color: var(--soft); }
progress { appearance: none; flex: 1; height: 6px; border: 0; border-radius: 3px; background: var(--line);
  overflow: hidden; }
progress::-webkit-progress-bar { background: transparent; }
progress::-webkit-progress-value { background: var(--main); border-radius: 3px; }
progress::-moz-progress-bar { background: var(--main); border-radius: 3px; }
#count { font-variant-numeric: tabular-nums; white-space: nowrap; }
main { flex: 1; display: flex; flex-direction: column; justify-content: center; gap: clamp(.6rem, 2vh, 1.4rem);
  padding-block: clamp(.6rem, 2vh, 1.4rem); }
#caption { margin: 0 auto; max-width: 62rem; max-height: 7.2em; overflow-y: auto; text-align: center;
  text-wrap: balance; overflow-wrap: anywhere; font-size: clamp(1.05rem, min(2.2vw, 3vh), 1.5rem); line-height: 1.35;
  font-weight: 600; }
#pair { display: flex; flex-direction: column; gap: inherit; }
.images, .keys { display: grid; gap: clamp(.5rem, 1.6vw, 1.2rem); }
.images { grid-template-columns: 1fr 1fr; } .keys { grid-template-columns: 1fr minmax(5.5rem, .5fr) 1fr; }
button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: .8rem;
  cursor: pointer; touch-action: manipulation; transition: border-color .12s, transform .08s; }
button:hover:enabled { border-color: var(--main); } button:active:enabled { transform: scale(.985); }
button:focus-visible { outline: 3px solid var(--main); outline-offset: 2px; }
button:disabled { cursor: default; opacity: .55; }
.images button { padding: clamp(.35rem, 1vw, .8rem); display: grid; place-items: center; }
.images button:disabled { opacity: 1; }
.images img { display: block; width: 100%; height: min(46vw, max(150px, 100dvh - 22rem)); object-fit: contain;
  border-radius: .4rem; }
.images img.small { image-rendering: pixelated; }
.keys button { padding: .6rem .4rem; font-weight: 600; line-height: 1.3; }
kbd { font: inherit; font-size: .85em; font-weight: 400; color: var(--soft); white-space: nowrap; }
.keys kbd { display: block; }
@media (hover: none) and (max-width: 700px) { kbd, .keys kbd { display: none; } }
footer { display: flex; align-items: center; justify-content: space-between; gap: 1rem; min-height: 3.6rem;
  padding-bottom: .9rem; font-size: .9rem; color: var(--soft); }
footer button { padding: .4rem .9rem; white-space: nowrap; } #said.wrong { color: var(--wrong); font-weight: 600; }
#done { background: var(--card); border: 1px solid var(--line); border-radius: 1rem; max-width: 46rem; width: 100%;
  margin: 0 auto; padding: clamp(1.2rem, 4vw, 2.4rem); }
#done h1 { margin: 0 0 .6rem; font-size: 1.5rem; line-height: 1.25; } #done p { margin: .4rem 0; }
#done dt { margin-top: .9rem; color: var(--soft); font-size: .9rem; } #done dd { margin: 0; }
code { font: .9rem/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
"""

_SCRIPT = """
"use strict";
const at = (id) => document.getElementById(id);
const SAID = { left: "left is better", right: "right is better", tie: "a tie" };
const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", Backspace: "undo" };
let state = null, ready = false, busy = false;
const kept = new Map();

function pictures(number) {
  if (!kept.has(number)) kept.set(number, [0, 1].map((side) => {
    const image = new Image();
    image.alt = side ? "right image" : "left image";
    image.draggable = false;
    image.src = "image/" + number + "/" + side;
    return image;
  }));
  return kept.get(number);
}

function say(text, wrong) {
  at("said").textContent = text;
  at("said").className = wrong ? "wrong" : "";
}

function enable() {
  document.querySelectorAll("[data-choice]").forEach((button) => {
    button.disabled = button.dataset.choice === "undo" ? !(state && state.number > 0) : !ready;
  });
}

function show(next) {
  const { number, total } = state = next, done = number === total;
  ready = false;
  at("pair").hidden = done;
  at("done").hidden = !done;
  at("bar").max = total;
  at("bar").value = number;
  at("count").textContent = done ? total + " of " + total : "Pair " + (number + 1) + " of " + total;
  document.title = (done ? "Done" : number + 1 + "/" + total) + " - which image is better?";
  document.body.dataset.number = number;
  document.body.dataset.ready = done ? "done" : "";
  for (const old of [...kept.keys()]) if (old < number - 1 || old > number + 2) kept.delete(old);
  enable();
  if (done) {
    at("all").textContent = total === 1 ? "The pair has a label." : "All " + total + " pairs have a label.";
    at("ties").textContent = state.ties === 1 ? "1 is a tie." : (state.ties || "None") + " of them are ties.";
    at("pairs").textContent = state.pairs;
    at("images").textContent = state.images;
    at("next").textContent = state.next;
    return;
  }
  at("caption").textContent = state.caption;
  const images = pictures(number);
  ["left", "right"].forEach((side, i) => at(side).replaceChildren(images[i]));
  Promise.all(images.map((image) => image.decode())).then(() => {
    if (state.number !== number) return;
    images.forEach((image) => (image.className = image.naturalWidth < 200 ? "small" : ""));
    ready = true;
    document.body.dataset.ready = "yes";
    enable();
    if (number + 1 < total) pictures(number + 1);
  }).catch(() => {
    kept.delete(number);
    if (state.number === number) say("An image of this pair cannot be shown. Start the command again.", true);
  });
}

async function load() {
  const answer = await fetch("state");
  if (answer.ok) show(await answer.json());
  else say(await answer.text(), true);
}

async function ask(work) {
  if (busy) return;
  busy = true;
  try {
    await work();
  } catch {
    say("The command has ended. Start it again and open its new address: no label is lost.", true);
  }
  busy = false;
}

const press = (choice) => ask(async () => {
  if (!state || (choice === "undo" ? state.number === 0 : !ready)) return;
  const before = state.number + 1;
  const body = JSON.stringify({ choice, at: state.at });
  const answer = await fetch("press", { method: "POST", headers: { "Content-Type": "application/json" }, body });
  if (answer.ok) {
    show(await answer.json());
    const text = choice === "undo" ? (state.number + 1) + " is open again." : before + ": " + SAID[choice] + ".";
    say("Pair " + text);
  } else {
    say(await answer.text(), true);
    await load();
  }
});

document.querySelectorAll("[data-choice]").forEach((button) => {
  button.onclick = () => { button.blur(); press(button.dataset.choice); };
});
addEventListener("keydown", (event) => {
  if (!(event.key in KEYS) || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  if (!event.repeat) press(KEYS[event.key]);
});
ask(load);
"""

_BODY = """
<header><span>Which image is better?</span><progress id="bar" value="0" aria-label="pairs with a label"></progress>
<span id="count"></span></header>
<main>
<section id="pair" hidden>
<p id="caption"></p>
<div class="images"><button id="left" data-choice="left" aria-label="left is better" disabled></button>
<button id="right" data-choice="right" aria-label="right is better" disabled></button></div>
<div class="keys"><button data-choice="left" disabled>Left <kbd>&larr;</kbd></button>
<button data-choice="tie" disabled>Tie <kbd>&darr;</kbd></button>
<button data-choice="right" disabled>Right <kbd>&rarr;</kbd></button></div>
</section>
<section id="done" hidden>
<h1 id="all"></h1>
<p><span id="ties"></span> You can close this page and end the command with Ctrl-C.</p>
<dl><dt>Pairs</dt><dd><code id="pairs"></code></dd><dt>Images</dt><dd><code id="images"></code></dd>
<dt>Make them ready for training</dt><dd><code id="next"></code></dd></dl>
</section>
</main>
<footer><span id="said" role="status" aria-live="polite"></span>
<button data-choice="undo" disabled>Undo <kbd>&nbsp;Backspace</kbd></button></footer>
"""

PAGE = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Which image is better?</title>'
    f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head>'
    f"<body>{_BODY}<script>{_SCRIPT}</script></body></html>\n"
)


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# Nothing from elsewhere, no script or style but these, and in nobody's frame.
POLICY = (
    "default-src 'none'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    f"frame-ancestors 'none'; script-src {_source(_SCRIPT)}; style-src {_source(_STYLE)}"
)
