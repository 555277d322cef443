// The page of the shop.

import { $, poll, post, put } from "/stage/stage.js";

const EVERY = 300; // ms between two orders of customers
const SHORT = 6; // characters of an order's ID that are shown
const KINDS = { placed: "busy", paid: "busy", reserved: "busy", shipped: "busy", done: "good", cancelled: "quiet" };
const NEW = {
  plain: { article: "tea", count: 2 },
  card: { article: "tea", card: "4000 0000 0000 0002" },
  stock: { article: "truffles", count: 10 },
  country: { article: "honey", country: "Atlantis" },
};

const rows = new Map(); // the row of each service
let ordered = null; // the order that the user has made
let customers = null;
let mail = true;

const count = (value) => (value === null ? "?" : value.toLocaleString("en"));
const plural = (value, word) => `${count(value)} ${word}${value === 1 ? "" : "s"}`;
const shown = (order) => `${order.state}${order.why ? `: ${order.why}` : ""}${order.told ? "" : ", not told yet"}`;

function element(tag, text, kind = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = kind;
  return made;
}

function draw(state) {
  drawBooks(state);
  for (const service of state.services) drawService(service);
  put($("between"), `${plural(state.outbox, "event")} in the orders' outbox, not sent yet; ${count(state.delayed)} delayed until `
    + "the next attempt.");
  mail = state.mail;
  $("mail").setAttribute("aria-pressed", String(!mail));
  put($("mail"), `The mail provider refuses our key: ${mail ? "no" : "yes"}`);
  drawLetters(state.services);
  drawOrders(state.orders);
  const mine = ordered === null ? undefined : state.orders.find((it) => it.id === ordered);
  if (mine) put($("ordered"), `Order ${mine.id.slice(0, SHORT)}: ${shown(mine)}.`);
}

function drawBooks({ books }) {
  const of = (...names) => names.reduce((sum, name) => sum + (books.orders[name] ?? 0), 0);
  const [done, cancelled, busy] = [of("done"), of("cancelled"), of("placed", "paid", "reserved", "shipped")];
  const all = done + cancelled + busy;
  put($("totals"), `${plural(all, "order")}: ${count(done)} done, ${count(cancelled)} cancelled, ${count(busy)} under way.`);
  $("bar-done").style.width = `${all ? (100 * done) / all : 0}%`;
  $("bar-busy").style.width = `${all ? (100 * busy) / all : 0}%`;
  put($("money"), `${plural(books.charged, "card")} charged, ${count(books.refunded)} refunded; `
    + `${plural(books.reserved, "reservation")}, ${count(books.released)} released; ${plural(books.parcels, "parcel")}, `
    + `${plural(books.mails, "e-mail")}.`);
  const settled = all > 0 && busy === 0 && books.mails === all;
  const adds = books.charged - books.refunded === done && books.reserved - books.released === done;
  put($("verdict"), all === 0 ? "" : !settled ? "Not settled: something is under way." : adds
    ? "Settled: done = charged - refunded = reserved - released." : "The books do not add up.",
    settled && !adds ? "said bad" : settled ? "said good" : "said");
  const facts = Object.values(books.facts).reduce((sum, it) => sum + it, 0);
  put($("facts"), `Analytics has noted ${plural(facts, "event")}.`);
}

function drawService(service) {
  if (!rows.has(service.name)) {
    const row = $("services").insertRow();
    const head = row.appendChild(element("th", service.name));
    head.scope = "row";
    for (let at = 0; at < 4; at++) row.insertCell();
    const button = row.cells[4].appendChild(element("button", ""));
    button.id = `switch-${service.name}`;
    button.addEventListener("click", () => post(`/services/${service.name}/${button.dataset.does}`));
    row.id = `service-${service.name}`;
    rows.set(service.name, row);
  }
  const { cells } = rows.get(service.name);
  const up = service.running === null ? null : service.running.length > 0;
  put(cells[1], up === null ? "elsewhere" : up ? service.running.join(", ") : "none", up === false ? "bad" : "");
  put(cells[2], count(service.waiting), service.waiting > 0 ? "busy" : "");
  put(cells[3], count(service.dead), service.dead > 0 ? "bad" : "");
  const button = cells[4].firstChild;
  button.hidden = up === null;
  button.dataset.does = up ? "kill" : "start";
  put(button, up ? "Kill" : "Start");
  button.setAttribute("aria-label", `${up ? "Kill" : "Start"} ${service.name}`);
}

function drawLetters(services) {
  const dead = services.reduce((sum, it) => sum + (it.dead ?? 0), 0);
  put($("dead"), dead === 0 ? "None: nothing needs a person." : `${plural(dead, "dead letter")}. Correct the cause, then replay.`,
    dead > 0 ? "bad" : "quiet");
  const found = services.flatMap((service) => service.dead > 0 ? [
    ["service", service.name, `Replay ${plural(service.dead, "dead letter")} of ${service.name}`],
    ...service.letters.map((it) => ["letter", it.id, `${it.job}: ${it.reason}, ${it.error}`]),
  ] : []);
  const key = JSON.stringify(found);
  if ($("letters").dataset.key === key) return; // a button that has the focus stays where it is
  $("letters").dataset.key = key;
  $("letters").replaceChildren(...found.map(([kind, name, text]) => {
    const item = element("li", kind === "letter" ? text : "");
    if (kind === "service") {
      item.appendChild(element("button", text)).addEventListener("click", () => post(`/services/${name}/replay`));
    }
    return item;
  }));
}

function drawOrders(orders) {
  while ($("orders").rows.length < orders.length) {
    const row = $("orders").insertRow();
    const head = row.appendChild(element("th", ""));
    head.scope = "row";
    for (let at = 0; at < 3; at++) row.insertCell();
  }
  orders.forEach((order, at) => {
    const { cells } = $("orders").rows[at];
    put(cells[0], order.id.slice(0, SHORT));
    put(cells[1], order.what);
    put(cells[2], order.country);
    put(cells[3], shown(order), KINDS[order.state]);
  });
}

async function order(kind, customer) {
  return post("/orders", { customer, ...NEW[kind] });
}

/** A customer orders something: mostly what can be had. */
function visit() {
  const kinds = Object.keys(NEW);
  order(Math.random() < 0.7 ? "plain" : kinds[Math.floor(Math.random() * kinds.length)], "somebody@example.org");
}

$("order").addEventListener("submit", async (event) => {
  event.preventDefault();
  const taken = await order($("kind").value, "you@example.org");
  if (taken === null) return;
  ordered = taken.id;
  put($("ordered"), `Order ${ordered.slice(0, SHORT)}: taken.`);
});
$("customers").addEventListener("click", () => {
  if (customers === null) customers = setInterval(visit, EVERY);
  else customers = clearInterval(customers) ?? null;
  $("customers").setAttribute("aria-pressed", String(customers !== null));
  put($("customers"), `Customers: ${customers === null ? "off" : "on"}`);
});
$("mail").addEventListener("click", () => post(`/mail/${mail ? "refuse" : "accept"}`));
poll("/state", draw);
