// The newsroom.

import { $, poll, post, put } from "/stage/stage.js";

const AGAIN = 1000; // ms after which a stream is opened again that the browser has given up
const WATCHED = { editor: "editor", mobile: "mobile", emails: "emails", "web-1": "web", "web-2": "web" };

const rows = new Map();
let source = null; // the stream
let last = null; // the position of the last story that is shown

const count = (value) => (value === null ? "?" : value.toLocaleString("en"));
const plural = (value, one, many) => `${count(value)} ${value === 1 ? one : many}`;

/** The cells of a row of a table, which is made if there is none. */
function cells(table, key) {
  const id = `${table}-${key}`;
  if (!rows.has(id)) {
    const row = document.createElement("tr");
    row.id = id;
    rows.set(id, ["th", "td", "td", "td"].map((tag) => row.appendChild(document.createElement(tag))));
    rows.get(id)[0].scope = "row";
    $(table).append(row);
  }
  return rows.get(id);
}

function draw(state) {
  $("elsewhere").hidden = Object.keys(state.programs).length > 0;
  for (const [name, runs] of Object.entries(state.programs)) drawProgram(name, runs, state.waiting[WATCHED[name]]);
  const open = state.readers.filter((it) => !it.right).map((it) => it.name);
  const left = state.stories - state.kept;
  put($("said"), state.stories === 0 ? "No story yet."
    : `${plural(state.stories, "story", "stories")}. `
      + (open.length ? `On the way to ${open.join(", ")}.` : "Everybody has what they asked for, once.")
      + (left ? ` ${plural(left, "is", "are")} not on the web yet.` : ""));
  put($("between"), `web-1 and web-2 share one queue. ${plural(state.dead, "dead letter", "dead letters")}.`);
  for (const reader of state.readers) {
    const [name, choices, has, headline] = cells("readers", reader.name);
    put(name, `${reader.name}, ${reader.by}`);
    put(choices, reader.choices.join(", "));
    put(has, `${count(reader.got)} of ${count(reader.wanted)}${reader.mails ? `, in ${plural(reader.mails, "e-mail", "e-mails")}` : ""}`,
      reader.right ? "good" : "busy");
    put(headline, reader.last || "–");
  }
}

function drawProgram(name, runs, waiting) {
  const [title, state, depth, action] = cells("programs", name);
  put(title, name);
  put(state, runs ? "runs" : "dead", runs ? "good" : "bad");
  put(depth, count(waiting), waiting ? "busy" : "");
  if (!action.firstChild) {
    const button = action.appendChild(document.createElement("button"));
    button.addEventListener("click", () => post(`/programs/${name}/${button.dataset.does}`));
  }
  action.firstChild.dataset.does = runs ? "kill" : "start";
  put(action.firstChild, runs ? "Kill" : "Start");
  action.firstChild.setAttribute("aria-label", `${runs ? "Kill" : "Start"} ${name}`);
}

/** Open the stream of the topics that are chosen. A browser opens it again by itself, and says what it has. */
function open() {
  source?.close();
  const choices = [...$("choices").querySelectorAll("input:checked")].map((it) => it.value);
  if (choices.length === 0) {
    put($("connected"), "You chose nothing.", "quiet");
    return;
  }
  const query = new URLSearchParams(choices.map((it) => ["choices", it]));
  if (last !== null) query.set("after", last);
  source = new EventSource(`/live?${query}`);
  let away = false;
  source.addEventListener("hello", (event) => {
    away = false;
    put($("connected"), `Live, from ${JSON.parse(event.data)}.`, "good");
  });
  source.addEventListener("away", () => {
    away = true;
    put($("connected"), "No program of the web is up. This page asks again.", "bad");
  });
  source.addEventListener("message", (event) => {
    last = event.lastEventId;
    const { id, topic, headline } = JSON.parse(event.data);
    const item = document.createElement("li");
    item.dataset.story = id;
    item.append(`${headline} `);
    item.appendChild(document.createElement("span")).textContent = topic;
    item.lastChild.className = "quiet";
    $("pages").prepend(item);
  });
  source.addEventListener("error", ({ target }) => {
    if (!away) put($("connected"), "The connection was lost. This page comes again.", "busy");
    if (target.readyState === EventSource.CLOSED) setTimeout(() => target === source && open(), AGAIN);
  });
}

$("story").addEventListener("submit", (event) => {
  event.preventDefault();
  post(`/stories?${new URLSearchParams({ topic: $("topic").value, headline: $("headline").value })}`);
});
$("many").addEventListener("click", () => post("/stories/many"));
$("choices").addEventListener("change", () => {
  last = null; // other stories: from the beginning
  $("pages").replaceChildren();
  open();
});
open();
poll("/state", draw);
