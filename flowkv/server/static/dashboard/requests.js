// The slowest requests of the last ten minutes: where their time went, phase by phase, on one scale.

import { byId, el, Keyed, setAttribute, setText, showLegend } from "./dom.js";
import { count, duration, plural } from "./format.js";

// What follows one another, and what runs beside it: on the decode instance, and in the frontend all along.
const PHASES = [
  ["tokenize", "tokenize", 0],
  ["place", "place", 0],
  ["queued", "queued", 0],
  ["prefill", "prefill", 0],
  ["decode", "decode", 0],
  ["reserved", "blocks reserved", 1],
  ["transfer", "KV transfer", 1],
  ["waiting", "waits for a step", 1],
  ["detokenize", "detokenize", 1],
];
const FRONTEND = ["tokenize", "place", "detokenize"];
const LANE_OF = new Map(PHASES.map(([name, , lane]) => [name, lane]));
const WORDS_OF = new Map(PHASES.map(([name, words]) => [name, words]));
const LEAST_PERCENT = 0.25; // what is shorter is still seen

export class Requests {
  constructor() {
    const measured = PHASES.filter(([name]) => !FRONTEND.includes(name)).map(([name, words]) => [`phase-${name}`, words]);
    showLegend(byId("phase-legend"), [["phase-tokenize", `frontend (${FRONTEND.join(", ")})`], ...measured]);
    this.list = el("ol", { class: "requests" });
    this.example = el("pre", { tabindex: "0" }, el("code"));
    this.empty = el("div", { class: "empty" }, el("p", {}, "No request has ended in the last ten minutes. Try one:"), this.example);
    byId("requests").append(this.list, this.empty);
    this.rows = new Keyed(this.list, createRow, (node, request) => updateRow(node, request, this.longestS));
  }

  show(data) {
    this.longestS = Math.max(...data.slowest.map((request) => request.elapsed_s));
    this.rows.show(data.slowest, (request) => request.request_id);
    this.list.hidden = data.slowest.length === 0;
    this.empty.hidden = data.slowest.length > 0;
    const body = JSON.stringify({ model: data.model_name, prompt: "Hello", max_tokens: 32 });
    const quoted = `'${body.replaceAll("'", "'\\''")}'`;
    setText(this.example.firstChild, `curl ${location.origin}/v1/completions -H 'Content-Type: application/json' -d ${quoted}`);
  }
}

/** Made once: an ended request does not change, only the scale does. */
function createRow(request) {
  const facts = [
    `${count(request.prompt_tokens)} → ${plural(request.output_tokens, "token")}`,
    request.ttft_s === null ? "" : `TTFT ${duration(request.ttft_s)}`,
    request.tpot_s === null ? "" : `TPOT ${duration(request.tpot_s)}`,
    path(request),
  ];
  const outcome = request.error ?? request.finish_reason ?? request.state;
  const name = request.state === "finished" ? "" : "bad";
  const heading = el(
    "summary",
    {},
    el("b", { class: "num" }, duration(request.elapsed_s)),
    el("span", { class: "id" }, request.request_id),
    el("span", { class: `outcome ${name}` }, request.num_attempts > 1 ? `${outcome}, ${plural(request.num_attempts, "attempt")}` : outcome),
    el("span", { class: "facts num" }, facts.filter(Boolean).join(" · ")),
    el("span", { class: "phases", "aria-hidden": "true" }, ...request.phases.map(createBar)),
  );
  return el("li", {}, el("details", {}, heading, createTable(request)));
}

function path({ prefill_instance: from, decode_instance: to }) {
  return from === null || to === null || from === to ? (from ?? to ?? "") : `${from} → ${to}`;
}

const createBar = (phase) => el("i", { class: `phase-${phase.name} lane-${LANE_OF.get(phase.name) ?? 0}` });

function updateRow(node, request, longestS) {
  const bars = node.querySelectorAll(".phases i");
  request.phases.forEach((phase, place) => {
    const width = (100 * phase.seconds) / longestS;
    bars[place].style.left = `${Math.min(100 - LEAST_PERCENT, (100 * phase.start_s) / longestS)}%`;
    bars[place].style.width = `${Math.max(LEAST_PERCENT, width)}%`;
  });
}

function createTable(request) {
  const rows = request.phases.map((phase) =>
    row("td", [WORDS_OF.get(phase.name) ?? phase.name, phase.where, duration(phase.start_s), duration(phase.seconds)], `phase-${phase.name}`),
  );
  rows.push(row("td", ["in no phase", "", "", duration(request.unaccounted_s)], "phase-none"));
  return el("table", {}, el("thead", {}, row("th", ["Phase", "Where", "From", "Took"])), el("tbody", {}, ...rows));
}

function row(tag, words, name) {
  const cells = words.map((text, place) => el(tag, place > 1 ? { class: "num" } : {}, text));
  if (name !== undefined) cells[0].prepend(el("i", { class: `swatch ${name}`, "aria-hidden": "true" }));
  return el("tr", {}, ...cells);
}
