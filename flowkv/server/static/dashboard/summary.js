// The line at the top, the banner where something is wrong, and the figures of this moment.

import { byId, el, setAttribute, setText } from "./dom.js";
import { count, duration, number, percent, plural } from "./format.js";

const MEAN_S = 10; // rates of this moment are means over so long
const STALE_S = 3; // the controller speaks four times a second

const TILES = [
  ["requests", "Requests/s", (now) => number(now.mean("requests")), (now) => `${count(now.data.num_live)} in flight`],
  ["prompt", "Prompt tokens/s", (now) => number(now.mean("prompt_tokens")), (now) => `${count(now.last.waiting)} waiting`],
  ["output", "Output tokens/s", (now) => number(now.mean("output_tokens")), (now) => `${count(now.last.running)} running`],
  ["ttft", "TTFT, median", (now) => duration(now.data.recent.ttft_s?.[0]), (now) => `p95 ${duration(now.data.recent.ttft_s?.[1])} · 1 min`],
  ["itl", "ITL, median", (now) => duration(now.data.recent.itl_s?.[0]), (now) => `p95 ${duration(now.data.recent.itl_s?.[1])} · 1 min`],
  ["errors", "Errors", (now) => count(now.sum("failed") + now.sum("refused")), (now) => `${count(now.sum("failed"))} failed, ${count(now.sum("refused"))} refused`],
  ["kv", "KV in use", (now) => percent(now.last.used_fraction), (now) => plural(now.data.instances.length, "instance")],
];

export class Summary {
  constructor() {
    this.tiles = TILES.map(([name, words]) => {
      const [value, note] = [el("dd", { class: "num" }), el("dd", { class: "note num" })];
      byId("tiles").append(el("div", { class: "panel", id: `tile-${name}` }, el("dt", {}, words), value, note));
      return [value, note];
    });
  }

  show(feed, windowS) {
    const { latest: data, seconds } = feed;
    const visible = seconds.filter((second) => second.tick >= feed.endS - windowS);
    const recent = seconds.slice(-MEAN_S);
    const now = {
      data,
      last: { waiting: 0, running: 0, used_fraction: 0, ...seconds[seconds.length - 1] },
      mean: (field) => (recent.length === 0 ? null : recent.reduce((sum, second) => sum + (second[field] ?? 0), 0) / recent.length),
      sum: (field) => visible.reduce((sum, second) => sum + (second[field] ?? 0), 0),
    };
    TILES.forEach(([, , value, note], place) => {
      setText(this.tiles[place][0], value(now));
      setText(this.tiles[place][1], note(now));
    });
    byId("tile-errors").classList.toggle("bad", now.sum("failed") > 0);
    this.showHead(data);
    this.showTrouble(troubles(data));
  }

  showHead(data) {
    setText(byId("model"), data.model_name);
    setText(byId("version"), `FlowKV ${data.version}`);
    setText(byId("regime"), `regime ${data.regime}`);
    setAttribute(byId("regime"), "data-regime", data.regime);
    this.showState(data.is_ready ? "serving" : "not ready", data.is_ready ? "good" : "bad");
    const title = `${data.is_ready ? "" : "! "}${data.model_name} · FlowKV`;
    if (document.title !== title) document.title = title;
  }

  showState(words, state) {
    setText(byId("state").querySelector("b"), words);
    setAttribute(byId("state"), "data-state", state);
  }

  showAge(seconds) {
    setText(byId("age"), seconds < 2 ? "live" : `${duration(Math.round(seconds))} old`);
  }

  /** The same words as long as it lasts: they are read out whenever they change. */
  showSilence(reason) {
    this.showState("no answer", "bad");
    this.showTrouble([`The server does not answer (${reason}). Trying again every second; what is shown is the last that was heard.`]);
    if (!document.title.startsWith("! ")) document.title = `! ${document.title}`;
  }

  showTrouble(lines) {
    byId("trouble").hidden = lines.length === 0;
    setText(byId("trouble"), lines.join(" "));
  }
}

function troubles(data) {
  const lines = [];
  const names = (rows) => rows.map((row) => row.name).join(", ");
  const stalled = data.instances.filter((row) => row.is_stalled);
  if (data.status_age_s === null) lines.push("The controller has not been heard of yet.");
  else if (data.status_age_s > STALE_S) lines.push("Nothing is heard of the controller.");
  else if (!data.is_ready) lines.push("The cluster takes no requests yet.");
  if (stalled.length > 0) lines.push(`Stalled: ${names(stalled)}.`);
  if (data.regime === "overloaded") lines.push("There is more work than all instances can do.");
  return lines;
}
