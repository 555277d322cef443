// The page of the uploads.

import { $, poll, post, put, trouble } from "/stage/stage.js";

const STEPS = ["resize", "watermark", "optimise", "thumbnail", "720p", "480p", "240p"];
const PREVIEW = { picture: "preview.jpg", video: "thumbnail.jpg" };
const KINDS = { done: "good", dead: "bad", failed: "bad", lost: "bad", begun: "busy", waiting: "quiet", unsent: "quiet" };

const rows = new Map(); // the row of each service, and what is on the page of each upload
const told = new Map(); // what a step last said, by upload and step
let dead = ""; // the letters that are shown

const count = (value) => (value === null ? "?" : value.toLocaleString("en"));
const plural = (value, word) => `${count(value)} ${word}${value === 1 ? "" : "s"}`;
const bytes = (value) => (value < 1e6 ? `${Math.max(1, Math.round(value / 1e3))} kB` : `${(value / 1e6).toFixed(1)} MB`);

function make(parent, tag, text = "", kind = "") {
  const made = parent.appendChild(document.createElement(tag));
  if (text) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function draw(state) {
  for (const button of document.querySelectorAll("[data-sample=video]")) button.disabled = !state.videos;
  $("no-videos").hidden = state.videos;
  put($("said"), state.count === 0 ? "None yet."
    : `${plural(state.count, "upload")}, ${count(state.complete)} of them complete.`);
  $("unsent").hidden = state.trouble === null;
  put($("unsent"), state.trouble === null ? "" : `Not sent, and tried again: ${state.trouble}`);
  for (const service of state.services) drawService(service);
  $("elsewhere").hidden = state.services.some((it) => it.workers !== null);
  drawUploads(state.uploads);
  drawFaults(state.faults);
  drawLetters(state.letters, state.services);
}

function drawService({ name, waiting, workers, most }) {
  if (!rows.has(name)) {
    const row = $("services").insertRow();
    row.id = `service-${name}`;
    make(row, "th", name).scope = "row";
    for (let at = 0; at < 3; at++) row.insertCell();
    for (const does of ["kill", "start"]) {
      const button = make(row.cells[3], "button", does === "kill" ? "Kill" : "Start");
      button.setAttribute("aria-label", `${button.textContent} a worker of ${name}`);
      button.addEventListener("click", () => post(`/services/${name}/${does}`));
    }
    rows.set(name, row);
  }
  const { cells } = rows.get(name);
  put(cells[1], count(waiting), waiting > 0 ? "busy" : "");
  put(cells[2], workers === null ? "?" : count(workers.length), workers?.length === 0 ? "bad" : "");
  const [kill, start] = cells[3].children;
  kill.disabled = !workers?.length;
  start.disabled = workers === null || workers.length >= most;
}

/** An upload on the page, which is made if it is not there. */
function item(upload) {
  if (!rows.has(upload.id)) {
    const made = document.createElement("li");
    const title = make(made, "h3", `${upload.name} `);
    const about = make(title, "span", "", "quiet");
    const blank = make(made, "div", "", "blank");
    const list = make(made, "ul", "", "steps");
    const steps = upload.steps.map(({ name }) => {
      const row = make(list, "li");
      row.dataset.step = name;
      const parts = [make(row, "span", name), make(row, "progress"), make(row, "span")];
      parts[1].setAttribute("aria-label", `${name} of ${upload.name}`);
      return parts;
    });
    rows.set(upload.id, { made, about, blank, steps, upload });
  }
  const found = rows.get(upload.id);
  found.upload = upload;
  return found;
}

function drawUploads(uploads) {
  const shown = new Set(uploads.map((it) => it.id));
  uploads.forEach((upload, at) => {
    const { made, about } = item(upload);
    if ($("uploads").children[at] !== made) $("uploads").insertBefore(made, $("uploads").children[at] ?? null);
    put(about, `${bytes(upload.size)} · ${upload.notified ? "all there, and its user knows"
      : upload.left ? `${upload.steps.length - upload.left} of ${upload.steps.length} files are there` : "all there"}`);
    drawPreview(upload);
    for (const step of upload.steps) drawStep(upload.id, step);
  });
  for (const [id, { made }] of rows) {
    if (made && !shown.has(id)) {
      made.remove();
      rows.delete(id);
    }
  }
  for (const key of told.keys()) if (!shown.has(key.split(" ")[0])) told.delete(key);
}

function drawPreview(upload) {
  const found = rows.get(upload.id);
  const ready = upload.steps.find((it) => it.state === "done" && it.file.endsWith(PREVIEW[upload.kind]));
  if (!found.blank || !ready) return;
  const image = document.createElement("img");
  image.alt = `Preview of ${upload.name}`;
  image.src = ready.file;
  found.blank.replaceWith(image);
  found.blank = null;
}

function drawStep(id, step) {
  const { upload, steps } = rows.get(id);
  const [, bar, text] = steps[upload.steps.findIndex((it) => it.name === step.name)];
  const heard = told.get(`${id} ${step.name}`);
  const mine = heard?.state === "running" && heard.attempt === step.attempt && step.state === "begun" ? heard : null;
  if (step.state === "done") {
    bar.value = 1;
    if (!text.querySelector("a")) {
      text.replaceChildren();
      const link = make(text, "a", bytes(step.size));
      link.href = step.file;
      link.setAttribute("aria-label", `${step.name} of ${upload.name}, ${bytes(step.size)}`);
      make(text, "span", step.runs > 1 ? `, after ${step.runs} runs` : "", "quiet");
      text.className = KINDS.done;
    }
    return;
  }
  if (step.state === "begun") {
    if (mine?.total) bar.value = mine.done / mine.total;
    else bar.removeAttribute("value");
  } else bar.value = 0;
  const again = heard?.state === "waiting" && heard.due ? `, again ${later(heard.due)}` : "";
  put(text, {
    unsent: "not sent yet",
    waiting: "waits for a worker",
    begun: `${step.attempt > 1 ? `attempt ${step.attempt}, ` : ""}worker ${step.worker}`
      + (mine?.total ? `: ${Math.round((100 * mine.done) / mine.total)} %` : ""),
    lost: `its worker, ${step.worker}, is dead: another one does it`,
    failed: `attempt ${step.attempt} failed: ${step.error}${again}`,
    dead: `given up: ${step.error}`,
  }[step.state], KINDS[step.state]);
}

function later(due) {
  const seconds = Math.ceil((new Date(due) - Date.now()) / 1000);
  return seconds > 0 ? `in ${seconds} s` : "now";
}

function drawFaults(faults) {
  for (const step of STEPS) {
    if (!rows.has(`fault ${step}`)) {
      const button = make($("faults"), "button", step);
      button.id = `fault-${step}`;
      button.addEventListener("click", () =>
        post(`/faults/${step}?fails=${button.getAttribute("aria-pressed") !== "true"}`));
      rows.set(`fault ${step}`, button);
    }
    const fails = faults.includes(step);
    const button = rows.get(`fault ${step}`);
    button.setAttribute("aria-pressed", String(fails));
    put(button, `${step}: ${fails ? "fails" : "works"}`);
  }
}

function drawLetters(letters, services) {
  const known = services.map((it) => it.dead).filter((it) => it !== null);
  const all = known.reduce((sum, it) => sum + it, 0);
  put($("dead"), known.length === 0 ? "The broker has not said yet how many there are."
    : all === 0 ? "0 dead letters." : `${plural(all, "dead letter")}. Correct the cause, then replay.`, all ? "bad" : "quiet");
  const key = JSON.stringify(letters);
  if (key === dead) return; // a button that has the focus stays where it is
  dead = key;
  $("letters").replaceChildren();
  for (const letter of letters) {
    const line = make($("letters"), "li", `${letter.job}: ${letter.error || letter.reason} `);
    const button = make(line, "button", "Replay");
    button.setAttribute("aria-label", `Replay ${letter.job}`);
    button.addEventListener("click", () => post(`/letters/${letter.service}/replay?letter=${encodeURIComponent(letter.id)}`));
  }
}

// Uploads.

async function upload(file) {
  put($("uploaded"), `${file.name} is being uploaded.`);
  try {
    const response = await fetch(`/uploads?name=${encodeURIComponent(file.name)}`, { method: "POST", body: file });
    const said = await response.json();
    if (!response.ok) throw new Error(typeof said.detail === "string" ? said.detail : `it has status ${response.status}`);
    trouble(null);
    put($("uploaded"), `${file.name} is uploaded.`);
  } catch (error) {
    $("trouble").dataset.of = "upload";
    trouble(`${file.name} was not uploaded. ${error instanceof TypeError ? "The app does not answer." : error.message}`);
    put($("uploaded"), "");
  }
}

async function all(files) {
  for (const file of files) await upload(file);
}

async function sample(kind) {
  put($("uploaded"), `A ${kind} is being made.`);
  const made = await post(`/samples/${kind}`);
  put($("uploaded"), made === null ? "" : `A ${kind} is made and uploaded.`);
}

$("file").addEventListener("change", async () => {
  await all([...$("file").files]);
  $("file").value = "";
});
for (const button of document.querySelectorAll("[data-sample]")) {
  button.addEventListener("click", () => sample(button.dataset.sample));
}
$("ten").addEventListener("click", async () => {
  for (let number = 0; number < 10; number++) await sample("picture");
});
for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  $("drop").addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", over);
    if (name === "drop") all([...event.dataTransfer.files]);
  });
}

// Progress: what the web app hears of the jobs that it has sent.

new EventSource("/progress").addEventListener("progress", ({ data }) => {
  const step = JSON.parse(data);
  told.set(`${step.upload} ${step.step}`, step);
  const found = rows.get(step.upload)?.upload.steps.find((it) => it.name === step.step);
  if (found) drawStep(step.upload, found);
});
poll("/state", draw);
