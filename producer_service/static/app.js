// The page: asks for a run, shows its events, and says how the broker is.

import { drawLatency, drawThroughput, text } from "./plot.js";

const KEPT = 60; // answers in the list
const ASK_AGAIN = { up: 5000, away: 1500 }; // ms between two looks at the broker
const LIMITS = {
  requests: "Requests is a whole number from 1 to 10,000.",
  concurrency: "At once is a whole number from 1 to 1,000.",
  delay: "Work is a number of seconds from 0 to 60.",
  timeout: "Timeout is a number of seconds from 0.01 to 300.",
  message: "Message is a text of 1 to 200 letters.",
};
const TITLES = { // of codes; what else there is speaks for itself
  ABORTED: "outcome unknown",
  INTERNAL: "invalid reply",
  UNIMPLEMENTED: "not available",
  UNKNOWN: "service failed",
  UNAVAILABLE: "service unavailable",
  RESOURCE_EXHAUSTED: "overloaded",
  DEADLINE_EXCEEDED: "timed out",
};

const $ = (id) => document.getElementById(id);
const form = $("send");
const calm = window.matchMedia("(prefers-reduced-motion: reduce)");
const fields = Object.keys(LIMITS).map((name) => form.elements[name]);

/** The run that is shown; `source` only while it lasts. */
let run = null;
let drawn = 0;
let waiting = false;

const count = (value) => value.toLocaleString("en");
const milliseconds = (value) => (value < 10 ? value.toFixed(2) : value < 100 ? value.toFixed(1) : count(Math.round(value)));
const plural = (value, word) => `${count(value)} ${word}${value === 1 ? "" : "s"}`;
const kindText = (kind) => TITLES[kind] ?? kind.toLowerCase().replaceAll("_", " ");

// What is asked for.

function complain(field) {
  const wrong = !field.validity.valid || !field.value.trim();
  field.setAttribute("aria-invalid", String(wrong));
  $(`${field.name}-error`).textContent = wrong ? LIMITS[field.name] : "";
  return wrong;
}

function start(event) {
  event.preventDefault();
  if (run?.source) return; // sent twice
  const wrong = fields.filter(complain);
  if (wrong.length) {
    wrong[0].focus();
    return;
  }
  const query = new URLSearchParams(new FormData(form));
  run = {
    source: new EventSource(`/stream?${query}`),
    requests: Number(query.get("requests")),
    began: performance.now(),
    seconds: 0,
    sent: 0,
    answers: [],
    counts: new Map(),
    said: 0,
  };
  listen(run);
  $("answers").replaceChildren();
  trouble(null);
  $("run-title").textContent = "This run";
  busy(true);
  say(`Sending ${plural(run.requests, "request")}.`);
  show();
}

function busy(yes) {
  $("start").setAttribute("aria-disabled", String(yes));
  $("start").textContent = yes ? "Sending…" : "Send";
  if (!yes && document.activeElement === $("stop")) $("start").focus();
  $("stop").disabled = !yes;
  for (const field of fields) field.readOnly = yes;
  form.toggleAttribute("data-busy", yes);
}

// What comes back.

function listen(of) {
  const on = (name, react) =>
    of.source.addEventListener(name, (event) => of === run && of.source && react(JSON.parse(event.data)));
  on("begun", () => { of.began = performance.now(); });
  on("answers", (batch) => take(of, batch));
  on("done", (summary) => finish(summary));
  on("failed", (problem) => fail(problem));
  of.source.onerror = () => {
    if (of !== run || !of.source) return;
    end(); // or the browser would ask again, and start another run
    trouble({
      title: of.sent ? "The connection to this app was lost" : "This app did not answer",
      detail: "What was under way is cancelled. Send again when the app is back.",
    });
    say(`Interrupted after ${plural(of.answers.length, "answer")}.`, "bad");
  };
}

function take(of, batch) {
  of.sent = batch.sent;
  for (const [, at, latency, kind] of batch.ended) {
    of.answers.push({ at: at / 1000, latency, kind });
    of.counts.set(kind, (of.counts.get(kind) ?? 0) + 1);
  }
  list(batch.shown);
  const quarter = Math.floor((4 * of.answers.length) / of.requests);
  if (quarter > of.said && quarter < 4) { // not each answer is read out
    of.said = quarter;
    say(`${count(of.answers.length)} of ${count(of.requests)} answered.`);
  }
  show();
}

function end() {
  run.source.close();
  run.source = null;
  run.seconds = (performance.now() - run.began) / 1000;
  busy(false);
}

function settle(summary) {
  run.sent = summary.sent;
  run.seconds = summary.seconds;
  run.rate = summary.per_second;
}

function finish(summary) {
  end();
  settle(summary);
  const failed = Object.values(summary.errors).reduce((sum, it) => sum + it, 0);
  if (!failed && !summary.mismatched) {
    say(`Done: all ${plural(summary.requests, "request")} got their own answer, in ${text(summary.seconds, 0.01)} s.`, "good");
  } else {
    const parts = [`${count(summary.matched)} matched`];
    if (summary.mismatched) parts.push(`${count(summary.mismatched)} mismatched`);
    if (failed) parts.push(plural(failed, "error"));
    say(`Done in ${text(summary.seconds, 0.01)} s: ${parts.join(", ")}.`, "bad");
  }
  show(true);
}

function fail(problem) {
  end();
  if (problem.summary) settle(problem.summary);
  trouble(problem);
  say("The run failed.", "bad");
  show(true);
}

function stop() {
  if (!run?.source) return;
  end();
  say(`Stopped after ${plural(run.answers.length, "answer")}; ${count(run.sent - run.answers.length)} under way were cancelled.`);
  show(true);
}

// What is shown.

function say(words, how = "") {
  $("state").textContent = words;
  $("state").className = `state ${how}`;
}

function trouble(problem) {
  $("trouble").hidden = !problem;
  $("trouble-title").textContent = problem ? `${problem.title}.` : "";
  $("trouble-text").textContent = problem?.detail ?? "";
}

function list(answers) {
  const made = answers.map((answer) => {
    const item = document.createElement("li");
    item.className = answer.error ? "failed" : answer.kind;
    const what = document.createElement("span");
    what.className = "what";
    what.textContent = answer.error ? `${answer.error.title} (did it run: ${answer.error.executed})` : answer.answer;
    const asked = document.createElement("small");
    asked.textContent = answer.message;
    what.append(asked);
    const took = document.createElement("span");
    took.className = "ms";
    took.textContent = `${milliseconds(answer.latency_ms)} ms`;
    item.append(what, took);
    return item;
  });
  $("answers").prepend(...made.reverse());
  while ($("answers").childElementCount > KEPT) $("answers").lastElementChild.remove();
}

/** Draw at the next frame; each second only, for those who want little motion. */
function show(now = false) {
  if (waiting && !now) return;
  waiting = true;
  const pause = calm.matches && !now ? Math.max(0, drawn + 1000 - performance.now()) : 0;
  setTimeout(() => requestAnimationFrame(draw), pause);
}

function draw() {
  waiting = false;
  drawn = performance.now();
  const answers = run?.answers ?? [];
  const seconds = run ? (run.source ? (performance.now() - run.began) / 1000 : run.seconds) : 0;
  if (run) figures(answers, seconds);
  drawLatency($("latency"), answers, run ? seconds : 1);
  drawThroughput($("throughput"), answers, run ? seconds : 1);
}

function figures(answers, seconds) {
  const of = (kind) => run.counts.get(kind) ?? 0;
  const failed = answers.length - of("matched") - of("mismatched");
  const rate = run.source || run.rate === undefined ? answers.length / Math.max(seconds, 0.001) : run.rate;
  const values = { sent: run.sent, matched: of("matched"), mismatched: of("mismatched"), errors: failed };
  for (const [id, value] of Object.entries(values)) $(id).textContent = count(value);
  $("mismatched").classList.toggle("bad", values.mismatched > 0);
  $("errors").classList.toggle("bad", failed > 0);
  $("rate").textContent = answers.length ? count(Math.round(rate)) : "–";
  $("time").textContent = `${text(seconds, 0.1)} s`;
  $("progress").value = answers.length / run.requests;
  kinds();
  percentiles(answers);
  $("latency").setAttribute("aria-label", `Latency over time: ${plural(answers.length, "answer")} in ${text(seconds, 0.1)} seconds`);
  $("throughput").setAttribute("aria-label", `Answers a second over time: ${count(Math.round(rate))} on average`);
}

function kinds() {
  const made = [...run.counts].filter(([kind]) => kind !== "matched" && kind !== "mismatched").map(([kind, of]) => {
    const item = document.createElement("li");
    item.textContent = `${count(of)} ${kindText(kind)}`;
    return item;
  });
  $("kinds").hidden = !made.length;
  $("kinds").replaceChildren(...made);
}

function percentiles(answers) {
  const ordered = Float64Array.from(answers, (it) => it.latency).sort();
  const most = ordered.at(-1) ?? 0;
  [50, 90, 99, 100].forEach((percent, i) => {
    const row = $("percentiles").rows[i];
    const value = ordered[Math.max(0, Math.ceil((ordered.length * percent) / 100) - 1)];
    row.cells[1].textContent = value === undefined ? "–" : milliseconds(value);
    row.querySelector("rect:last-child").setAttribute("width", most ? (100 * value) / most : 0);
  });
}

// How the broker is.

async function look() {
  let found = { ready: false, text: "This app does not answer." };
  try {
    found = await (await fetch("/status", { cache: "no-store" })).json();
  } catch { /* the app is away: asked again below */ }
  $("broker").className = `broker ${found.ready ? "up" : "away"}`;
  if ($("broker-text").textContent !== found.text) $("broker-text").textContent = found.text; // read out once
  if (found.worker) $("worker").textContent = found.worker;
  setTimeout(look, found.ready && !run?.source ? ASK_AGAIN.up : ASK_AGAIN.away); // a run that waits has to say why
}

form.addEventListener("submit", start);
for (const field of fields) {
  field.addEventListener("input", () => field.getAttribute("aria-invalid") === "true" && complain(field));
}
$("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => event.key === "Escape" && stop());
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => show(true));
const sizes = new ResizeObserver(() => show(true));
sizes.observe($("latency"));
setInterval(() => run?.source && show(), 250); // time passes also where no answer comes
look();
