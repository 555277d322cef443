// Both plots: dots of latency, and bars of answers a second, on a canvas each. Nothing here knows of runs.

const ROOM = { top: 22, right: 12, bottom: 40, left: 52 }; // pixels around the axes, for their labels
const FONT = '12.5px system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif';

/** A round number of which a few make `most`: 1, 2 or 5, and zeros. */
function step(most, about) {
  const rough = most / about;
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map((it) => it * power).find((it) => it >= rough);
}

/** A value on an axis, without the digits that no step has. */
export function text(value, between = 1) {
  const digits = Math.max(0, -Math.floor(Math.log10(between) + 1e-9));
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function colours() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(
    ["grid", "line", "quiet", "mark", "odd", "bad"].map((name) => [name, style.getPropertyValue(`--${name}`).trim()]),
  );
}

/** The canvas in the pixels of the screen, empty. */
function fresh(canvas) {
  const { width, height } = canvas.getBoundingClientRect();
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = FONT;
  return { pen, width, height };
}

/** Axes from 0 to `most.x` and at least `most.y`; gives where a value is. */
function axes({ pen, width, height }, most, names, colour) {
  const inner = { width: width - ROOM.left - ROOM.right, height: height - ROOM.top - ROOM.bottom };
  const stepY = step(most.y, 4);
  const stepX = step(most.x, Math.max(2, Math.floor(inner.width / 90)));
  const topY = Math.ceil((most.y / stepY) * 1.02) * stepY;
  const x = (value) => ROOM.left + (value / most.x) * inner.width;
  const y = (value) => ROOM.top + inner.height - (value / topY) * inner.height;
  pen.fillStyle = colour.quiet;
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  for (let i = 0; i * stepY <= topY * 1.001; i += 1) {
    const at = Math.round(y(i * stepY)) + 0.5;
    pen.strokeStyle = i ? colour.grid : colour.line;
    pen.beginPath();
    pen.moveTo(ROOM.left, at);
    pen.lineTo(width - ROOM.right, at);
    pen.stroke();
    pen.fillText(text(i * stepY, stepY), ROOM.left - 8, at);
  }
  pen.textBaseline = "top";
  pen.textAlign = "center";
  for (let i = 0; i * stepX <= most.x * 1.001; i += 1) {
    const label = text(i * stepX, stepX);
    const half = pen.measureText(label).width / 2;
    pen.fillText(label, Math.min(x(i * stepX), width - half), height - ROOM.bottom + 7);
  }
  pen.textAlign = "left";
  pen.fillText(names.y, 0, 0);
  pen.textAlign = "right";
  pen.fillText(names.x, width - ROOM.right, height - 14);
  return { x, y };
}

/** Each answer at its time, in seconds, and its latency, in ms; the three kinds in shape as well as in colour. */
export function drawLatency(canvas, answers, seconds) {
  const drawing = fresh(canvas);
  const colour = colours();
  const slowest = answers.reduce((most, it) => Math.max(most, it.latency), 0);
  const most = { x: Math.max(seconds, 0.1), y: Math.max(slowest, 1) };
  const { x, y } = axes(drawing, most, { y: "Latency, ms", x: "Since the start, s" }, colour);
  const { pen } = drawing;
  const many = answers.length > 2000;
  const radius = many ? 1.5 : 2.25;
  pen.fillStyle = colour.mark;
  pen.globalAlpha = many ? 0.5 : 1;
  for (const { at, latency } of answers.filter((it) => it.kind === "matched")) {
    pen.beginPath();
    pen.arc(x(at), y(latency), radius, 0, 2 * Math.PI);
    pen.fill();
  }
  pen.globalAlpha = 1;
  pen.fillStyle = colour.odd;
  for (const { kind, at, latency } of answers) { // above the others, since they are few and matter
    if (kind === "mismatched") pen.fillRect(x(at) - 3, y(latency) - 3, 6, 6);
    else if (kind !== "matched") diamond(pen, x(at), y(latency), colour.bad);
  }
}

function diamond(pen, left, top, colour) {
  pen.strokeStyle = colour;
  pen.lineWidth = 1.5;
  pen.beginPath();
  pen.moveTo(left, top - 4);
  pen.lineTo(left + 4, top);
  pen.lineTo(left, top + 4);
  pen.lineTo(left - 4, top);
  pen.closePath();
  pen.stroke();
  pen.lineWidth = 1;
}

/** Bars of how many answers came in each span of time, as a rate. */
export function drawThroughput(canvas, answers, seconds) {
  const drawing = fresh(canvas);
  const colour = colours();
  const whole = Math.max(seconds, 0.1);
  const span = Math.max(step(whole, 40), 0.05); // seconds; shorter ones would be as the events come
  const counts = new Array(Math.max(1, Math.floor(whole / span))).fill(0); // what is left goes to the last one
  for (const { at } of answers) counts[Math.min(counts.length - 1, Math.floor(at / span))] += 1;
  const ends = counts.map((_, i) => (i === counts.length - 1 ? whole : (i + 1) * span));
  const rates = counts.map((count, i) => count / (ends[i] - i * span));
  const most = { x: whole, y: Math.max(...rates, 1) };
  const { x, y } = axes(drawing, most, { y: "Answers/s", x: "Since the start, s" }, colour);
  const { pen } = drawing;
  pen.fillStyle = colour.mark;
  rates.forEach((rate, i) => {
    const left = x(i * span);
    const right = x(ends[i]);
    pen.fillRect(left, y(rate), Math.max(1, right - left - 1), y(0) - y(rate));
  });
}
