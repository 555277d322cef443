// The page of the e-mails.

import { $, poll, post, put } from "/stage/stage.js";

const rows = new Map();
let dead = 0; // letters that are listed

const count = (value) => (value === null ? "?" : value.toLocaleString("en"));
const plural = (value, word) => `${count(value)} ${word}${value === 1 ? "" : "s"}`;
const arrived = (times) => (times === 0 ? "–" : times === 1 ? "arrived" : `arrived ${times} times`);

/** The cells of a row of a table, which is made if there is none. */
function cells(table, key, first = null) {
  const id = `${table} ${key}`;
  if (!rows.has(id)) {
    const row = document.createElement("tr");
    row.id = id.replaceAll(" ", "-");
    const made = ["th", "td", "td"].map((tag) => row.appendChild(document.createElement(tag)));
    made[0].scope = "row";
    $(table).insertBefore(row, first);
    rows.set(id, made);
  }
  return rows.get(id);
}

function draw(state) {
  for (const [name, runs] of Object.entries(state.programs)) drawProgram(name, runs);
  $("elsewhere").hidden = Object.keys(state.programs).length > 0;
  for (const queue of state.queues) {
    const [title, waiting, done] = cells("queues", queue.queue);
    put(title, queue.queue);
    put(waiting, count(queue.waiting), queue.waiting ? "busy" : "");
    put(done, count(queue.done));
  }
  const open = state.queues.filter((it) => it.queue !== "welcome mails" && it.done < state.signed_up).map((it) => it.queue);
  put($("said"), state.signed_up === 0 ? "Nobody has signed up yet."
    : `${plural(state.signed_up, "user")} signed up. `
      + (open.length ? `Not all done: ${open.join(", ")}.` : "All of it is done, for each of them."));
  put($("delayed"), `${plural(state.delayed, "message")} put off until later. `
    + `${plural(state.doubles, "e-mail")} came twice, with the same Message-ID.`);
  drawUsers(state.users);
  drawDead(state.dead);
}

function drawProgram(name, runs) {
  const [title, state, action] = cells("programs", name);
  put(title, name);
  put(state, runs ? "runs" : "dead", runs ? "good" : "bad");
  if (!action.firstChild) {
    const button = action.appendChild(document.createElement("button"));
    button.addEventListener("click", () => post(`/programs/${name}/${button.dataset.does}`));
  }
  action.firstChild.dataset.does = runs ? "kill" : "start";
  put(action.firstChild, runs ? "Kill" : "Start");
  action.firstChild.setAttribute("aria-label", `${runs ? "Kill" : "Start"} ${name}`);
}

function drawUsers(users) {
  for (const user of [...users].reverse()) {
    const [address, confirm, welcome] = cells("users", user.id, $("users").firstChild);
    put(address, user.address);
    put(confirm, arrived(user.confirm), user.confirm ? "good" : "busy");
    if (user.welcome || user.confirmed || !user.confirm) {
      put(welcome, user.confirmed ? (user.welcome ? arrived(user.welcome) : "on its way") : "not confirmed yet",
        user.welcome ? "good" : "quiet");
    } else if (!welcome.querySelector("button")) {
      const button = document.createElement("button");
      button.textContent = "Confirm";
      button.setAttribute("aria-label", `Confirm ${user.address}`);
      button.addEventListener("click", () => post(`/users/${user.id}/confirm`));
      welcome.replaceChildren(button);
    }
  }
  const shown = new Set(users.map((it) => `users ${it.id}`));
  for (const [id, made] of rows) {
    if (id.startsWith("users ") && !shown.has(id)) {
      made[0].parentElement.remove();
      rows.delete(id);
    }
  }
}

async function drawDead(found) {
  put($("dead"), found === null ? "The broker has not said yet how many there are." : `${plural(found, "dead letter")}.`,
    found > 0 ? "bad" : "quiet");
  if (found === null || found === dead) return;
  dead = found;
  const response = found === 0 ? null : await fetch("/letters");
  if (response !== null && !response.ok) {
    dead = null; // asked again with the next state
    return;
  }
  $("letters").replaceChildren(...(response === null ? [] : await response.json()).map((letter) => {
    const item = document.createElement("li");
    item.textContent = `${letter.job}, ${letter.reason}: ${letter.error}`;
    return item;
  }));
}

$("up").addEventListener("submit", (event) => {
  event.preventDefault();
  post(`/users?${new URLSearchParams({ name: $("name").value, address: $("address").value })}`);
});
$("many").addEventListener("click", () => post("/users/many"));
$("account").addEventListener("click", () => post("/accounts?address=nobody@example.org"));
$("replay").addEventListener("click", () => post("/letters/replay"));
poll("/state", draw);
