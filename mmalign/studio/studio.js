"use strict";
// The page talks to this machine only; the key in its head is asked for with every call.
const $ = (id) => document.getElementById(id);
const key = document.querySelector("meta[name=studio-key]").content;
const NS = "http://www.w3.org/2000/svg";
let methods = [], run = null, points = [], base = null, began = null;

function make(tag, parent, text, attributes = {}) {
  const node = tag === "line" || tag === "path" || tag === "text"
    ? document.createElementNS(NS, tag) : document.createElement(tag);
  if (text !== undefined && text !== null) node.textContent = text;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  parent.append(node);
  return node;
}

function call(path, body) {
  const options = { headers: { "X-Studio-Key": key } };
  if (body !== undefined) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  return fetch(path, options);
}

const number = (v) => v === null || v === undefined ? "unscored"
  : Math.abs(v) >= 1000 ? Math.round(v).toLocaleString("en") : Number(v.toPrecision(4)).toString();

// --- form ---------------------------------------------------------------------------------

async function fill() {
  const given = await (await call("/api/choices")).json();
  for (const name of given.policies) make("option", $("policies"), null, { value: name });
  for (const r of given.rewards) make("option", $("rewards"), r.summary, { value: r.name });
  methods = given.methods;
  for (const m of methods) make("option", $("method"), m.name, { value: m.name });
  $("method").value = "best_of_n";
  offer();
  document.body.dataset.ready = "yes";
}

function offer() {
  const method = methods.find((m) => m.name === $("method").value);
  $("summary").textContent = method.summary;
  $("options").replaceChildren();
  $("meaning").textContent = "";
  for (const option of method.options) {
    const label = make("label", $("options"), option.name, { class: "field" });
    const input = make("input", label, null, { name: option.name, title: option.help });
    input.dataset.option = option.name;
    input.placeholder = option.default === null ? "default" : String(option.default);
    input.addEventListener("focus", () => { $("meaning").textContent = option.help; });
  }
}

function wish() {
  const options = [...document.querySelectorAll("[data-option]")]
    .filter((i) => i.value.trim() !== "").map((i) => `${i.dataset.option}=${i.value.trim()}`);
  const budget = ["nfe", "seconds"].filter((n) => $(n).value !== "")
    .map((n) => `${n}=${$(n).value}`).join(",");
  const texts = Object.fromEntries(["prompt", "policy", "reward", "method", "held_out", "lora"]
    .map((n) => [n, $(n).value.trim()]));
  return { ...texts, options, budget, seed: Number.parseInt($("seed").value, 10) };
}

// --- one run ------------------------------------------------------------------------------

function clear() {
  points = []; base = null; began = null;
  for (const id of ["plain", "best"]) {
    const figure = $(id);
    figure.classList.remove("better");
    figure.querySelector(".frame").replaceChildren();
    figure.querySelector("output").textContent = "";
    figure.querySelector("small").textContent = "";
  }
  for (const id of ["curve", "cost", "story", "others-title"]) reveal(id, false);
  for (const id of ["curve", "cost", "story", "others"]) $(id).replaceChildren();
  $("progress").value = 0;
}

function reveal(id, yes = true) {
  $(id).toggleAttribute("hidden", !yes);  // SVG elements have no such property
}

function show(parent, address, said) {
  const image = make("img", parent, null, { src: address, alt: said });
  image.addEventListener("load", () => {
    image.classList.toggle("small", Math.max(image.naturalWidth, image.naturalHeight) <= 128);
  });
  return image;
}

function put(id, picture, score, note) {
  const figure = $(id);
  if (picture) {
    figure.querySelector(".frame").replaceChildren();
    show(figure.querySelector(".frame"), picture, id === "best" ? "steered" : "unsteered");
  }
  if (score !== undefined) figure.querySelector("output").textContent = number(score);
  if (note !== undefined) figure.querySelector("small").textContent = note;
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

const judged = (value) => value === null || value === undefined ? "" : `judged ${number(value)}`;

const heard = {
  loading: (e) => say(`Loading ${e.what} ...`),
  unsteered: (e) => {
    base = e.score;
    put("plain", e.picture, e.score, judged(e.held_out));
    say("Steering ...");
  },
  progress: (e) => {
    $("progress").value = e.total ? e.done / e.total : 0;
    if (e.best !== null) points.push([e.seconds, e.best]);
    if (e.picture) put("best", e.picture, e.best, "best so far");
    $("best").classList.toggle("better", base !== null && e.best !== null && e.best > base);
    say(`${e.done} of ${e.total}, best ${number(e.best)}, ${e.seconds.toFixed(1)} s`);
    curve();
  },
  done: (e) => {
    $("progress").value = 1;
    put("best", e.picture, e.score, judged(e.held_out));
    $("best").classList.toggle("better", base !== null && e.score !== null && e.score > base);
    say(base === null || e.score === null ? "Done."
      : `Done: ${number(base)} unsteered, ${number(e.score)} steered.`);
    cost(e);
    if (e.story) { $("story").innerHTML = e.story; reveal("story"); }
    tried(e);
    remember(e);
  },
  stopped: () => say("Stopped; the best picture so far is shown."),
  failed: (e) => say(e.message, true),
};

function curve() {
  const svg = $("curve");
  if (points.length < 2) return;
  reveal("curve");
  svg.replaceChildren();
  const values = points.map((p) => p[1]).concat(base === null ? [] : [base]);
  const low = Math.min(...values), span = (Math.max(...values) - low) || 1;
  const last = points[points.length - 1][0] || 1;
  const x = (t) => 8 + t / last * 560, y = (v) => 108 - (v - low) / span * 92;
  if (base !== null) {
    make("line", svg, null, { class: "base", x1: 8, x2: 568, y1: y(base), y2: y(base) });
    make("text", svg, "unsteered", { x: 574, y: y(base) + 4 });
  }
  let path = `M8 ${y(points[0][1])}`;
  for (const [t, v] of points) path += `H${x(t).toFixed(1)}V${y(v).toFixed(1)}`;
  make("path", svg, null, { class: "line", d: path });
}

function cost(e) {
  const facts = [
    [number(e.spent.nfe), `network evaluations (${number(e.spent.nfe / e.unsteered.nfe)} × plain)`],
    [number(e.spent.reward_calls), "pictures scored"],
    [number(e.spent.decodes), "pictures decoded"],
    [`${e.spent.seconds.toFixed(1)} s`, "steering"],
  ];
  for (const [value, what] of facts) {
    const cell = make("div", $("cost"));
    make("dt", cell, what);
    make("dd", cell, value);
  }
  reveal("cost");
}

function tried(e) {
  if (e.candidates.length < 2) return;
  reveal("others-title");
  e.candidates.forEach((c, i) => {
    const figure = make("figure", $("others"), null, i === e.chosen ? { class: "chosen" } : {});
    show(figure, c.picture, `candidate ${i + 1}`);
    make("figcaption", figure, c.text ? `${number(c.score)} ${c.text}` : number(c.score));
  });
  if (e.left_out) make("p", $("others"), `and ${e.left_out} more`, { class: "hint" });
}

function remember(e) {
  reveal("history-title");
  const figure = document.createElement("figure");
  const asked = run.wish;
  show(figure, e.picture, asked.prompt);
  make("figcaption", figure, `${number(e.score)} · ${asked.method} · ${asked.prompt}`);
  figure.addEventListener("click", () => {
    for (const name of ["prompt", "policy", "reward", "method", "held_out", "lora", "seed"]) {
      $(name).value = asked[name];
    }
    offer();
  });
  $("history").prepend(figure);
}

async function follow(number) {
  const answer = await call(`/api/runs/${number}`);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (text + value).split("\n");
    text = lines.pop();
    for (const line of lines.filter((l) => l)) {
      const event = JSON.parse(line);
      heard[event.event](event);
      document.body.dataset.event = event.event;
    }
  }
}

async function steer(event) {
  event.preventDefault();
  if (run) return;
  run = { wish: wish() };
  clear();
  $("go").disabled = true;
  $("stop").disabled = false;
  delete document.body.dataset.event;
  try {
    const answer = await call("/api/runs", run.wish);
    const said = await answer.json();
    if (!answer.ok) throw new Error(said.message);
    run.number = said.number;
    await follow(said.number);
  } catch (error) {
    say(error.message, true);
    document.body.dataset.event = "failed";
  }
  run = null;
  $("go").disabled = false;
  $("stop").disabled = true;
}

$("form").addEventListener("submit", steer);
$("method").addEventListener("change", offer);
$("stop").addEventListener("click", () => {
  if (run && run.number) call(`/api/runs/${run.number}/stop`, {});
});
document.addEventListener("keydown", (e) => {
  if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) $("form").requestSubmit();
});
fill();
