// The operator's page. Received text is only ever inserted as text: nothing here builds HTML from strings.
"use strict";

const $ = (id) => document.getElementById(id);
const WIDTH = 240, HEIGHT = 140, LEFT = 30, RIGHT = 6, TOP = 24, BOTTOM = 28;
let hello = null, socket = null, wait = 500;

// -- drawing ---------------------------------------------------------------------------------------------------------

function draw(name, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function make(name, text, attributes = {}) {
  const node = document.createElement(name);
  if (text !== null) node.textContent = text;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

const short = (x) => String(Number(Number(x).toPrecision(3)));

// An empty chart with labelled axes; where() turns a point into pixels.
function chart(title, unit, xs, ys, xlabel, words) {
  const where = (x, y) => [
    LEFT + ((x - xs[0]) / (xs[1] - xs[0] || 1)) * (WIDTH - LEFT - RIGHT),
    HEIGHT - BOTTOM - ((y - ys[0]) / (ys[1] - ys[0] || 1)) * (HEIGHT - TOP - BOTTOM),
  ];
  const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": words });
  svg.append(draw("title", {}, unit ? `${title}, ${unit}` : title));
  const name = draw("text", { x: 0, y: 12 }, draw("tspan", { class: "name" }, title));
  if (unit) name.append(draw("tspan", { dx: 6 }, unit.length > 26 ? unit.slice(0, 25) + "…" : unit));
  svg.append(name);
  const levels = ys[0] < 0 && ys[1] > 0 ? [ys[0], 0, ys[1]] : ys;
  for (const level of levels) {
    const [x, y] = where(xs[0], level);
    svg.append(draw("path", { class: "axis", d: `M${x} ${y}H${WIDTH - RIGHT}` }));
    svg.append(draw("text", { x: x - 5, y: y + 4, "text-anchor": "end" }, short(level)));
  }
  for (const at of xs) {
    const [x] = where(at, 0);
    svg.append(draw("text", { x, y: HEIGHT - BOTTOM + 14, "text-anchor": at === xs[0] ? "start" : "end" }, short(at)));
  }
  svg.append(draw("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 3, "text-anchor": "middle" }, xlabel));
  return { svg, where };
}

const path = (points) => "M" + points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L");

function curve(chunk, at) {
  const dimension = hello.dimensions[at], values = chunk.actions.map((row) => row[at]);
  const seconds = (step) => step / hello.rate_hz, last = seconds(values.length - 1);
  const known = values.filter((value) => value !== null);
  const low = dimension.low ?? Math.min(0, ...known), high = dimension.high ?? Math.max(0, ...known);
  const words = `${dimension.name} in ${dimension.unit}, ${values.length} actions over ${short(last)} seconds, ` +
    (known.length < values.length ? "some of them not finite" : `from ${short(values[0])} to ${short(values[values.length - 1])}`);
  const { svg, where } = chart(dimension.name, dimension.unit, [0, last], [low, high], "time, s", words);
  const [x0, top] = where(0, high), [x1, bottom] = where(seconds(hello.n_action_steps - 1), low);
  const line = (column) => path(column.map((value, i) => [seconds(i), value]).filter(([, y]) => y !== null).map(([x, y]) => where(x, y)));
  svg.append(draw("rect", { class: "band", x: x0, y: top, width: Math.max(x1 - x0, 1), height: bottom - top }));
  if (chunk.draft) svg.append(draw("path", { class: "draft", d: line(chunk.draft.map((row) => row[at])) }));
  if (known.length) svg.append(draw("path", { class: "line", d: line(values) }));
  values.forEach((value, i) => {
    if (value === null) return;
    const [cx, cy] = where(seconds(i), value), again = chunk.regenerated && chunk.regenerated[i];
    const sure = chunk.confidence ? 0.25 + 0.75 * chunk.confidence[i] : 1;
    svg.append(draw("circle", { class: again ? "again" : "dot", cx, cy, r: 2.6, opacity: again ? 1 : sure }));
  });
  return svg;
}

function bars(title, unit, values, top, xlabel, words) {
  const { svg, where } = chart(title, unit, [1, Math.max(values.length, 2)], [0, top], xlabel, words);
  const width = (WIDTH - LEFT - RIGHT) / Math.max(values.length, 1);
  values.forEach((value, i) => {
    const [, y] = where(1, value), [, ground] = where(1, 0);
    svg.append(draw("rect", { class: "bar", x: LEFT + (i + 0.075) * width, y, width: 0.85 * width, height: ground - y }));
  });
  return svg;
}

// -- showing ---------------------------------------------------------------------------------------------------------

function showChunk(chunk, images) {
  $("images").replaceChildren(...Object.entries(images).map(([view, data]) => {
    const figure = make("figure", null);
    figure.append(make("img", null, { src: data, alt: `image of view '${view}'` }), make("figcaption", view));
    return figure;
  }));
  $("last-request").textContent = `“${chunk.instruction}” · ${chunk.client}, request ${chunk.request}`;
  const parts = Object.entries(chunk.milliseconds).map(([part, ms]) => `${part} ${short(ms)} ms`).join(", ");
  const notes = [`${chunk.layers} of ${hello.depth} layers`, `${chunk.nfe} nfe`, parts];
  const again = chunk.regenerated ? chunk.regenerated.filter(Boolean).length : 0;
  if (chunk.regenerated) notes.push(`${again} actions regenerated${again ? " (ringed; the draft is dashed)" : ""}`);
  $("about").textContent = notes.join(" · ") + ` · shaded: the ${hello.n_action_steps} actions executed before the next chunk`;
  const drawn = hello.dimensions.map((_, at) => curve(chunk, at));
  if (chunk.confidence) {
    const lowest = Math.min(...chunk.confidence);
    drawn.push(bars("confidence", "0 to 1", chunk.confidence, 1, "action", `confidence of each action, lowest ${short(lowest)}`));
  }
  $("curves").replaceChildren(...drawn);
  const head = make("tr", null), columns = ["action", ...hello.dimensions.map((d) => `${d.name}, ${d.unit}`)];
  if (chunk.confidence) columns.push("confidence");
  head.append(...columns.map((name) => make("th", name, { scope: "col" })));
  $("table").replaceChildren(head, ...chunk.actions.map((row, i) => {
    const line = make("tr", null), cells = chunk.confidence ? [...row, chunk.confidence[i]] : row;
    line.append(make("th", i + 1, { scope: "row" }), ...cells.map((x) => make("td", x === null ? "not finite" : x.toFixed(3))));
    return line;
  }));
}

function showNow(now) {
  const [p50, p99] = now.latency_ms || [null, null], o = now.outcomes;
  const rows = [
    ["requests/s", short(now.per_second)],
    ["p50, last minute", p50 === null ? "–" : `${short(p50)} ms`],
    ["p99, last minute", p99 === null ? "–" : `${short(p99)} ms`],
    ["clients", now.clients.length],
    ["waiting", now.waiting],
    ["answered", o.answered],
    ["refused", o.refused + o.failed],
    ["busy or late", o.busy + o.late],
    ["last reply", now.age_s === null ? "–" : `${now.age_s} s ago`],
  ];
  $("numbers").replaceChildren(...rows.map(([name, value]) => {
    const pair = make("div", null);
    pair.append(make("dt", name), make("dd", value));
    return pair;
  }));
  const on = now.instruction !== null, standing = $("standing");
  const words = on
    ? `In force: “${now.instruction}” · ${now.followed} requests followed it, ${now.ignored} kept their own instruction`
    : "Off: every request keeps its own instruction.";
  if (standing.textContent !== words) standing.textContent = words;
  standing.className = on ? "on" : "";
  $("clear").disabled = !on;
  const layers = now.work.map(([n]) => n), nfe = now.work.map(([, n]) => n), of = `last ${now.work.length} chunks`;
  const mean = (xs) => short(xs.reduce((a, b) => a + b, 0) / (xs.length || 1));
  if (layers.length) $("work").replaceChildren(
    bars("layers run", `of ${hello.depth}`, layers, hello.depth, of, `layers run, ${of}, ${mean(layers)} of ${hello.depth} on average`),
    bars("nfe", "of the decoder", nfe, Math.max(1, ...nfe), of, `nfe, ${of}, ${mean(nfe)} on average`),
  );
  $("clients").textContent = now.clients.length ? `Connected: ${now.clients.join(", ")}` : "No client is connected.";
  $("log").replaceChildren(...now.lines.reverse().map((line) => make("li", line.text, line.wrong ? { class: "wrong" } : {})));
}

// -- the stream ------------------------------------------------------------------------------------------------------

function status(text, lost) {
  $("link").textContent = text;
  $("link").className = lost ? "lost" : "";
}

function take(message) {
  if (message.kind === "hello") {
    hello = message;
    $("what").textContent = `${hello.system} with ${hello.compute} · ${hello.robot}`;
    document.querySelector("main").hidden = false;
    $("ask").hidden = true;
    status("live", false);
  } else if (message.kind === "refused") {
    $("refusal").textContent = message.sentence;
  } else {
    if (message.chunk) showChunk(message.chunk, message.images);
    showNow(message);
  }
}

function connect() {
  const token = sessionStorage.getItem("token"), scheme = location.protocol === "https:" ? "wss" : "ws";
  const bytes = token ? Array.from(new TextEncoder().encode(token), (b) => String.fromCharCode(b)).join("") : "";
  const coded = btoa(bytes).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  const offered = ["vlaflow.dashboard", ...(token ? [`token.${coded}`] : [])];
  socket = new WebSocket(`${scheme}://${location.host}/dashboard/stream`, offered);
  let opened = false;
  socket.onmessage = (event) => { opened = true; wait = 500; take(JSON.parse(event.data)); };
  socket.onclose = () => {
    status(opened ? "connection lost, trying again" : "not connected", true);
    if (hello === null && document.body.dataset.token === "yes") {
      $("ask").hidden = false;
      return;
    }
    setTimeout(connect, wait);
    wait = Math.min(2 * wait, 8000);
  };
}

$("ask").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value);
  $("token").value = "";
  connect();
};
// A closed socket silently drops messages, and the operator must not believe that the instruction was sent.
function instruct(words) {
  const open = socket.readyState === WebSocket.OPEN;
  $("refusal").textContent = open ? "" : "The connection is lost; the instruction was not sent.";
  if (open) socket.send(JSON.stringify({ instruction: words }));
  return open;
}

$("operator").onsubmit = (event) => {
  event.preventDefault();
  const words = $("words").value.trim();
  if (words) instruct(words);
};
$("clear").onclick = () => { if (instruct(null)) $("words").value = ""; };
connect();
