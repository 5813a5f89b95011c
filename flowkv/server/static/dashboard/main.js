// The page: asks once a second, shows what it hears.

import { Cursor } from "./cursor.js";
import { byId, setText } from "./dom.js";
import { Feed } from "./feed.js";
import { clock, duration, number, percent } from "./format.js";
import { Instances } from "./instances.js";
import { Lanes } from "./lanes.js";
import { Links } from "./links.js";
import { Plot } from "./plot.js";
import { Requests } from "./requests.js";
import { Summary } from "./summary.js";

const quantile = (field, place) => (second) => second[field]?.[place] ?? null;
const value = (field) => (second) => second[field] ?? 0;
const NO_REQUEST = "no request in this time";

const PLOTS = [
  new Plot({
    title: "Requests", unit: "per second", format: number, least: 1, empty: NO_REQUEST,
    series: [
      { name: "submitted", class: "c1", of: value("requests") },
      { name: "finished", class: "c2", of: value("finished") },
      { name: "errors", class: "c3", of: (second) => (second.failed ?? 0) + (second.refused ?? 0) },
    ],
  }),
  new Plot({
    title: "Tokens", unit: "per second", format: number, least: 10, empty: NO_REQUEST,
    series: [
      { name: "prompt", class: "prefill", of: value("prompt_tokens") },
      { name: "output", class: "decode", of: value("output_tokens") },
    ],
  }),
  new Plot({
    title: "TTFT", unit: "arrival to first token", format: duration, empty: "no first token in this time",
    series: ["p50", "p95", "p99"].map((name, place) => ({ name, class: `q${place}`, of: quantile("ttft_s", place) })),
  }),
  new Plot({
    title: "ITL", unit: "between two tokens", format: duration, empty: "no two tokens in this time",
    series: ["p50", "p95", "p99"].map((name, place) => ({ name, class: `q${place}`, of: quantile("itl_s", place) })),
  }),
  new Plot({
    title: "Load", unit: "over all instances", format: number, least: 1, empty: "nothing to do",
    series: [
      { name: "waiting", class: "c4", of: value("waiting") },
      { name: "running", class: "c1", of: value("running") },
    ],
  }),
  new Plot({
    title: "KV blocks", unit: "in use", format: percent, top: 1, empty: "all blocks are free",
    series: [{ name: "used", class: "c2", of: value("used_fraction") }],
  }),
];

const summary = new Summary();
const lanes = new Lanes();
const instances = new Instances();
const requests = new Requests();
const links = new Links();

const feed = new Feed({
  onData: showAll,
  onSilence(error) {
    summary.showSilence(error.name === "TimeoutError" ? "it is silent" : error.message);
  },
});

const cursor = new Cursor(
  () => [feed.endS - windowS(), feed.endS - 1],
  () => feed.latest && showPlots(),
);

const windowS = () => Number(document.querySelector("input[name=window]:checked").value);
const ageS = () => (Date.now() - feed.heardMs) / 1000;

function showPlots() {
  for (const plot of PLOTS) plot.show(feed.seconds, feed.endS, windowS(), cursor.tick);
  setText(byId("cursor"), cursor.tick === null ? "" : clock(feed.date(cursor.tick)));
}

function showAll() {
  summary.show(feed, windowS());
  showPlots();
  lanes.show(feed, windowS());
  instances.show(feed.latest);
  requests.show(feed.latest);
  links.show(feed.latest.instances);
}

for (const plot of PLOTS) {
  byId("plots").append(plot.node);
  cursor.follow(plot);
}
byId("window").addEventListener("change", () => feed.latest && showAll());
new ResizeObserver(() => feed.latest && showAll()).observe(byId("plots"));
setInterval(() => feed.latest && summary.showAge(ageS()), 1000);
feed.start();
