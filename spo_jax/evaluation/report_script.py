"""Style and script of the report of an evaluation: plain, without other files."""

STYLE = """
:root { color-scheme: light dark; --paper: Canvas; --ink: CanvasText; --line: #8885; --soft: #8881;
  --win: #0a7d6c; --lose: #b4501e; --open: #777; }
@media (prefers-color-scheme: dark) { :root { --win: #4fd1bd; --lose: #f0a070; --open: #999; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1360px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.lead, .hint { opacity: .8; max-width: 52rem; } .hint { font-size: .85rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; } th, td { text-align: left; vertical-align: top; padding: .35rem 1.4rem .35rem 0; }
.numbers td, .numbers th { border-top: 1px solid var(--line); } .numbers b { font-weight: 600; }
.mean b { font-size: 1.2rem; }
.numbers td { font-variant-numeric: tabular-nums; white-space: nowrap; font-size: .9rem; }
.role { white-space: normal; max-width: 16rem; font-size: .8rem; font-style: italic; }
.range { font-size: .8rem; opacity: .75; }
.win { color: var(--win); } .lose { color: var(--lose); }
svg { max-width: 100%; height: auto; }
.settings td { padding: .1rem 1.4rem .1rem 0; font-size: .85rem; } code { overflow-wrap: anywhere; }
.bar { display: flex; flex-wrap: wrap; gap: .6rem 1rem; align-items: end; background: var(--soft); padding: .8rem 1rem;
  border-radius: .6rem; }
.bar label { display: block; font-size: .8rem; } .bar select, .bar input { display: block; font: inherit; }
.pager { display: flex; gap: .8rem; align-items: center; margin: .8rem 0; } .pager button { font: inherit; }
#cases { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--card)), 1fr)); }
.case { background: var(--soft); border-radius: .6rem; padding: .8rem 1rem; overflow-x: auto; }
.case p { margin: 0 0 .4rem; overflow-wrap: anywhere; } .case .hint { float: right; margin-left: 1rem; }
.case table { font-size: .85rem; font-variant-numeric: tabular-nums; }
.case td, .case th { padding: .1rem .6rem .1rem 0; }
.case th { font-weight: 600; max-width: var(--picture); }
.case th { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.case td:first-child { opacity: .8; max-width: 8rem; overflow-wrap: anywhere; }
.case img, .none { width: var(--picture); height: var(--picture); border-radius: .3rem; background: var(--soft); }
.case img { object-fit: contain; display: block; }
.case img.small { image-rendering: pixelated; } .none { display: grid; place-items: center; font-size: .8rem; }
"""

# DATA: models, metrics (name, title, digits), prompts, seeds, scores [model][metric][prompt][seed], disagreement
# [model - 1][prompt][seed], images (whether there are files).
SCRIPT = """
"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const PAGE = 50, many = DATA.models.length > 1;
const at = (id) => document.getElementById(id);
const make = (tag, text, name) => {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (name) element.className = name;
  return element;
};
const cases = [];
DATA.prompts.forEach((_, p) => DATA.seeds.forEach((_, s) => cases.push([p, s])));
const lower = DATA.prompts.map((prompt) => prompt.toLowerCase());
let found = cases, page = 0;

const difference = (k, [p, s], model) => DATA.scores[model][k][p][s] - DATA.scores[0][k][p][s];
const compared = () => (many ? Number(at("model").value) : 0);
const outcome = (d) => (d > 0 ? "won" : d < 0 ? "lost" : "tied");

function choose() {
  const model = compared(), words = at("search").value.toLowerCase().split(/\\s+/).filter(Boolean);
  const filters = DATA.metrics.map((_, k) => (many ? at("filter" + k).value : "any"));
  found = cases.filter((place) =>
    words.every((word) => (/^#\\d+$/.test(word) ? word === "#" + place[0] : lower[place[0]].includes(word))) &&
    filters.every((filter, k) => filter === "any" || filter === outcome(difference(k, place, model))));
  const [kind, k] = at("sort").value.split(" ");
  const keys = {
    disagreement: ([p, s]) => -DATA.disagreement[model - 1][p][s],
    lost: (place) => difference(k, place, model),
    won: (place) => -difference(k, place, model),
    low: ([p, s]) => DATA.scores[model][k][p][s],
    high: ([p, s]) => -DATA.scores[model][k][p][s],
  };
  if (keys[kind]) {
    const key = new Map(found.map((place) => [place, keys[kind](place)]));
    found = found.slice().sort((a, b) => key.get(a) - key.get(b));
  }
  page = 0;
  show();
}

function picture(model, [p, s]) {
  const none = () => make("div", "no image file", "none");
  if (!DATA.images) return none();
  const name = String(p).padStart(5, "0") + "_" + DATA.seeds[s] + ".png";
  const link = make("a"), image = make("img");
  link.href = image.src = "images/" + encodeURIComponent(DATA.models[model]) + "/" + name;
  image.loading = "lazy";
  image.alt = DATA.models[model] + ": " + DATA.prompts[p];
  image.onload = () => { if (image.naturalWidth < 150) image.className = "small"; };
  image.onerror = () => link.replaceWith(none());
  link.append(image);
  return link;
}

function card(place) {
  const [p, s] = place, element = make("div", undefined, "case"), table = make("table");
  const model = compared(), note = ["prompt " + p + ", seed " + DATA.seeds[s]];
  if (many && DATA.metrics.length > 1) note.push("disagreement " + DATA.disagreement[model - 1][p][s].toFixed(1));
  element.append(make("span", note.join("; "), "hint"), make("p", DATA.prompts[p]));
  const names = table.createTHead().insertRow(), pictures = table.createTBody().insertRow();
  names.append(make("th"));
  pictures.insertCell();
  DATA.models.forEach((name, m) => {
    names.append(make("th", name));
    names.lastChild.title = name;
    pictures.insertCell().append(picture(m, place));
  });
  DATA.metrics.forEach((metric, k) => {
    const row = table.tBodies[0].insertRow();
    row.insertCell().textContent = metric.title;
    DATA.models.forEach((_, m) => {
      const cell = row.insertCell(), d = difference(k, place, m);
      cell.textContent = DATA.scores[m][k][p][s].toFixed(metric.digits);
      if (m > 0 && d !== 0) {
        cell.className = d > 0 ? "win" : "lose";
        cell.textContent += (d > 0 ? " \\u25b2" : " \\u25bc") + Math.abs(d).toFixed(metric.digits);
      } else if (m > 0) cell.textContent += " =";
    });
  });
  element.append(table);
  return element;
}

function show() {
  const pages = Math.max(1, Math.ceil(found.length / PAGE));
  page = Math.min(Math.max(page, 0), pages - 1);
  at("cases").replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map(card));
  document.querySelectorAll(".pager").forEach((bar) => {
    const move = (text, by) => {
      const button = make("button", text);
      button.disabled = page + by < 0 || page + by >= pages;
      button.onclick = () => { page += by; show(); at("pictures").scrollIntoView(); };
      return button;
    };
    const counted = found.length + " of " + cases.length + (many ? " comparisons" : " images");
    const said = counted + "; page " + (page + 1) + " of " + pages;
    bar.replaceChildren(move("\\u2190 Back", -1), make("span", said), move("Next \\u2192", 1));
  });
}

const side = DATA.models.length > 2 ? 150 : 200, root = document.documentElement.style;
root.setProperty("--picture", side + "px");
root.setProperty("--card", 120 + (side + 10) * DATA.models.length + "px");
document.querySelectorAll(".bar select").forEach((element) => (element.onchange = choose));
let timer;
at("search").oninput = () => { clearTimeout(timer); timer = setTimeout(choose, 150); };
choose();
"""
