// Roles over time, a lane for each instance and whoever took its place; and the latest events in words.

import { byId, el, Keyed, setAttribute, setText, showLegend, svg } from "./dom.js";
import { clock, plural } from "./format.js";
import { lanes, seatOf } from "./history.js";
import { drawTimeAxis, TimeAxis } from "./plot.js";

const AXIS = 20;
const MAX_LISTED = 60;
const SIGN_WIDTH = 13;

const SIGNS = { gone: "✕", retired: "✕", restarted: "↻", flip: "⇄", stalled: "!", joined: "", awake: "", draining: "↓" };

const WORDS = {
  started: () => "this frontend was started",
  controller: () => "the controller was started again",
  lost: (event) => `${plural(Number(event.detail), "request")} lost their instance: they go on elsewhere`,
  ready: () => "the cluster takes requests",
  not_ready: () => "the cluster takes no requests",
  regime: (event) => `regime: ${event.detail}`,
  joined: (event) => `is in service as ${event.role}`,
  restarted: (event) => `is in service (${event.detail})`,
  gone: () => "is gone",
  retired: () => "was retired",
  flip: (event) => `flipped from ${event.was} to ${event.role}`,
  stalled: () => "is stalled: nothing is heard of it",
  awake: () => "is heard again",
  draining: () => "is draining",
};

export class Lanes {
  constructor() {
    this.svg = svg("svg", { class: "lanes", role: "img" });
    this.rows = new Keyed(this.svg.appendChild(svg("g")), createLane, (node, lane) => this.drawLane(node, lane));
    this.rules = this.svg.appendChild(svg("g", { class: "rules" }));
    this.times = this.svg.appendChild(svg("g", { class: "grid" }));
    byId("lanes").append(this.svg);
    showLegend(byId("lane-legend"), [
      ["prefill", "prefill"], ["decode", "decode"], ["mixed", "mixed"], ["stalled", "stalled"],
    ]);
    this.list = new Keyed(byId("events"), createEvent, () => {});
  }

  show(feed, windowS) {
    const { instances, events } = feed.latest;
    const width = this.svg.clientWidth;
    const endS = feed.latest.now_s;
    const began = events.find((event) => event.kind === "started")?.time_s ?? 0; // nothing is known of the time before
    const startS = Math.max(endS - windowS, began);
    if (width > 0) this.draw(lanes(instances, events, startS, endS), events, endS, windowS, width);
    this.showList(feed, events);
  }

  draw(all, events, endS, windowS, width) {
    const longest = Math.max(8, ...all.map((lane) => lane.seat.length));
    this.axis = new TimeAxis(endS, windowS, width, Math.min(width * 0.32, longest * 7.2 + 12));
    this.laneHeight = all.length > 24 ? 13 : all.length > 8 ? 16 : 22;
    const height = all.length * this.laneHeight + AXIS;
    setAttribute(this.svg, "height", height);
    setAttribute(this.svg, "viewBox", `0 0 ${width} ${height}`);
    all.forEach((lane, place) => (lane.y = place * this.laneHeight));
    this.rows.show(all, (lane) => lane.seat);
    const restarts = events.filter((event) => event.kind === "controller" && event.time_s >= this.axis.startS);
    this.rules.replaceChildren(...restarts.map((event) => this.rule(event.time_s, height - AXIS)));
    const state = `${width} ${windowS} ${height} ${this.axis.left}`;
    if (state !== this.state) drawTimeAxis(this.times, this.axis, height - 5);
    this.state = state;
    const marks = all.reduce((sum, lane) => sum + lane.marks.length, 0);
    setAttribute(this.svg, "aria-label", `Roles of ${all.length} instances over time, with ${marks} events; they are listed below`);
  }

  rule(timeS, height) {
    const x = this.axis.x(timeS).toFixed(1);
    return svg("line", { x1: x, x2: x, y1: 0, y2: height }, svg("title", {}, WORDS.controller()));
  }

  drawLane(node, lane) {
    const thickness = this.laneHeight - 6;
    const middle = lane.y + this.laneHeight / 2;
    const [track, label, bars, signs] = node.children;
    for (const [name, value] of [["x", this.axis.left], ["y", lane.y + 3], ["width", this.axis.x(this.axis.endS) - this.axis.left], ["height", thickness]]) {
      setAttribute(track, name, value);
    }
    setText(label, lane.seat);
    setAttribute(label, "x", this.axis.left - 8);
    setAttribute(label, "y", middle + 4);
    bars.replaceChildren(
      ...lane.spans.map((span) =>
        svg(
          "rect",
          {
            class: span.isStalled ? "stalled" : span.role,
            x: this.axis.x(span.fromS).toFixed(1),
            width: Math.max(1, this.axis.x(span.toS) - this.axis.x(span.fromS)).toFixed(1),
            y: lane.y + 3,
            height: thickness,
            rx: 2,
          },
          svg("title", {}, `${span.name}, ${span.role}${span.isStalled ? ", stalled" : ""}`),
        ),
      ),
    );
    signs.replaceChildren(...this.signs(lane.marks.filter((event) => SIGNS[event.kind]), middle + 4.5));
  }

  /** Side by side where they would hide each other. */
  signs(marks, y) {
    let last = -Infinity;
    return marks.map((event) => {
      const x = (last = Math.max(this.axis.x(event.time_s), last + SIGN_WIDTH));
      return svg("text", { class: `sign ${event.kind}`, x: x.toFixed(1), y }, SIGNS[event.kind]);
    });
  }

  showList(feed, events) {
    const latest = events
      .map((event) => ({ ...event, date: feed.date(event.time_s) }))
      .reverse()
      .slice(0, MAX_LISTED);
    this.list.show(latest, (event) => `${event.time_s} ${event.kind} ${event.instance}`);
    byId("events").hidden = latest.length === 0;
  }
}

const createLane = () => svg("g", { class: "lane" }, svg("rect", { class: "track", rx: 2 }), svg("text", { "text-anchor": "end" }), svg("g"), svg("g"));

function createEvent(event) {
  const words = (WORDS[event.kind] ?? (() => event.kind))(event);
  return el(
    "li",
    { class: event.kind, "data-seat": seatOf(event.instance ?? "") },
    el("time", { class: "num", datetime: event.date.toISOString() }, clock(event.date)),
    el("span", { class: "name" }, event.instance ?? "cluster"),
    el("span", {}, words),
  );
}
