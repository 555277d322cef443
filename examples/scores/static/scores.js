// The page of the scores.

import { $, poll, post, put } from "/stage/stage.js";

const VISIT_EVERY = 400; // ms between two products that visitors look at
const KINDS = { none: "quiet", queued: "busy", computing: "busy", old: "quiet", fresh: "good" };
const WORDS = { none: "no score", queued: "queued", computing: "being computed", old: "old", fresh: "done" };

const rows = new Map();
let looked = null; // the product that the user looks at, and since when until it is done
let products = [];
let visiting = null;

const seconds = (value) =>
  value === null ? "–" : value < 10 ? `${value.toFixed(1)} s` : value < 120 ? `${Math.round(value)} s`
    : value < 7200 ? `${Math.round(value / 60)} min` : `${Math.round(value / 3600)} h`;
const count = (value) => (value === null ? "?" : value.toLocaleString("en"));
const plural = (value, word) => `${count(value)} ${word}${value === 1 ? "" : "s"}`;
const shown = (product) => `grade ${product.grade}, ${product.kg} kg CO₂e (${product.low} to ${product.high})`;

function draw(state) {
  products = state.products;
  for (const product of products) drawRow(product);
  drawLanes(state);
  drawAll(state);
  if (looked !== null) drawLooked(products.find((it) => it.id === looked.id));
}

function drawRow(product) {
  if (!rows.has(product.id)) {
    const row = $("products").insertRow();
    const cells = ["th", "td", "td", "td"].map((tag) => row.appendChild(document.createElement(tag)));
    cells[0].scope = "row";
    cells[0].textContent = product.name;
    rows.set(product.id, cells);
    $("product").add(new Option(product.name, product.id));
  }
  const [, state, kg, age] = rows.get(product.id);
  put(state, WORDS[product.state], KINDS[product.state]);
  put(kg, product.kg === null ? "–" : `${product.kg} (${product.grade})`);
  put(age, seconds(product.age));
}

function drawLanes(state) {
  const [high, low] = state.lanes;
  for (const lane of state.lanes) {
    const cells = $(`lane-${lane.lane}`).cells;
    [count(lane.waiting), count(lane.done), seconds(lane.median), seconds(lane.longest)].forEach((text, at) =>
      put(cells[at + 1], text));
  }
  const flood = low.waiting > 0 ? `A flood of ${plural(low.waiting, "job")} waits in low.` : "No flood: low is empty.";
  put($("flood"), high.done === 0 ? `${flood} Nobody looked at a product lately.`
    : `${flood} Who looked at a product in the last minute waited ${seconds(high.longest)} at most.`);
  put($("dead"), state.dead === null ? "The broker has not said yet how many dead letters there are."
    : `${plural(state.dead, "dead letter")}.`, state.dead > 0 ? "bad" : "quiet");
}

function drawAll(state) {
  const of = (...names) => products.filter((it) => names.includes(it.state)).length;
  const fresh = of("fresh");
  const queued = of("queued", "computing");
  const oldest = Math.max(0, ...products.map((it) => it.age ?? 0));
  put($("edition"), `Edition ${state.edition} of the emission factors.`);
  put($("progress"), `Of ${plural(products.length, "product")}, ${fresh} done, ${queued} queued or being computed. `
    + `The oldest score is of ${seconds(oldest)} ago.`);
  $("bar-fresh").style.width = `${(100 * fresh) / products.length}%`;
  $("bar-queued").style.width = `${(100 * queued) / products.length}%`;
  $("worker-buttons").hidden = state.workers === null;
  put($("workers"), state.workers === null ? "The workers run elsewhere."
    : `${plural(state.workers.length, "worker")}: ${state.workers.join(", ") || "none, so that jobs wait"}.`);
}

function drawLooked(product) {
  if (product.state === "fresh" && looked.since !== null) {
    looked.took = (performance.now() - looked.since) / 1000;
    looked.since = null;
  }
  put($("looked"), product.state === "fresh"
    ? `${product.name}: ${shown(product)}. ${looked.cached ? "It was there." : `It took ${looked.took.toFixed(1)} s.`}`
    : `${product.name}: ${WORDS[product.state]}${product.grade === null ? "" : `; the last score: ${shown(product)}`}.`);
}

async function look(id) {
  const since = performance.now();
  const answer = await post(`/products/${id}/look`);
  if (answer === null) return;
  looked = { id, since, cached: answer.state === "fresh", took: 0 };
  drawLooked({ ...products.find((it) => it.id === id), ...answer });
}

/** Somebody looks at a product that has no score of today. */
function visit() {
  const wanted = products.filter((it) => it.state !== "fresh");
  if (wanted.length) post(`/products/${wanted[Math.floor(Math.random() * wanted.length)].id}/look`);
}

$("look").addEventListener("submit", (event) => {
  event.preventDefault();
  look($("product").value);
});
$("visitors").addEventListener("click", () => {
  if (visiting === null) visiting = setInterval(visit, VISIT_EVERY);
  else visiting = clearInterval(visiting) ?? null;
  $("visitors").setAttribute("aria-pressed", String(visiting !== null));
  put($("visitors"), `Visitors: ${visiting === null ? "off" : "on"}`);
});
$("renew").addEventListener("click", () => post("/renew"));
$("kill").addEventListener("click", () => post("/workers/kill"));
$("start").addEventListener("click", () => post("/workers"));
poll("/state", draw);
