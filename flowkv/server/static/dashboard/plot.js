// A line plot over time: small, crisp, redrawn in place. All plots share a time axis and a cursor.

import { el, setAttribute, setText, svg } from "./dom.js";

const HEIGHT = 132;
const LEFT = 52;
const RIGHT = 8;
const TOP = 8;
const BOTTOM = 20;
const NARROW = 60;
const BRIDGE = 1 / 60; // of the time shown: what is no further apart is joined by a line

/** A round number not below `value`. */
export function niceCeiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 3, 4, 6, 8, 10].map((factor) => factor * power).find((top) => top >= value * 0.9999);
}

/** Where on the time axis a moment lies, and what the axis says. */
export class TimeAxis {
  constructor(endS, windowS, width, left = LEFT) {
    this.left = left;
    this.endS = endS;
    this.startS = endS - windowS;
    this.windowS = windowS;
    this.width = width;
  }

  x(timeS) {
    return this.left + ((timeS - this.startS) / this.windowS) * (this.width - this.left - RIGHT);
  }

  timeAt(x) {
    const fraction = (x - this.left) / (this.width - this.left - RIGHT);
    return this.startS + Math.min(1, Math.max(0, fraction)) * this.windowS;
  }

  labels() {
    const wide = { 60: 4, 300: 5, 600: 5 }[this.windowS] ?? 4;
    const parts = this.width - this.left > 300 ? wide : 2;
    return Array.from({ length: parts + 1 }, (_, part) => {
      const agoS = (this.windowS * (parts - part)) / parts;
      const words = agoS === 0 ? "now" : agoS < 60 ? `−${agoS} s` : `−${agoS / 60} min`;
      return { x: this.x(this.endS - agoS), words, anchor: part === 0 ? "start" : part === parts ? "end" : "middle" };
    });
  }
}

/** The labels of a time axis at height `y`, into a group. */
export function drawTimeAxis(group, axis, y) {
  group.replaceChildren(
    ...axis.labels().map(({ x, words, anchor }) => svg("text", { x, y, "text-anchor": anchor }, words)),
  );
}

export class Plot {
  /** `series` are {name, class, of(second) -> number or null}; `format` writes a value; `least` is the lowest top. */
  constructor({ title, unit, series, format, least = 0, top = null, empty }) {
    Object.assign(this, { title, series, format, least, top, empty });
    this.width = 0;
    this.cursor = null;
    this.values = series.map(() => el("b", { class: "num" }));
    this.svg = svg("svg", { class: "plot", tabindex: "0", role: "img", height: HEIGHT });
    this.grid = svg("g", { class: "grid" });
    this.times = svg("g", { class: "grid" });
    this.areas = series.map((line) => svg("path", { class: `area ${line.class}` }));
    this.lines = series.map((line) => svg("path", { class: `line ${line.class}` }));
    this.hair = svg("line", { class: "hair", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
    this.nothing = svg("text", { class: "nothing", y: (HEIGHT - BOTTOM + TOP) / 2, "text-anchor": "middle" });
    this.svg.append(this.grid, this.times, ...this.areas, ...this.lines, this.hair, this.nothing);
    const legend = el("ul", { class: "legend" });
    series.forEach((line, place) =>
      legend.append(el("li", {}, el("i", { class: `stroke ${line.class}`, "aria-hidden": "true" }), `${line.name} `, this.values[place])),
    );
    const heading = el("figcaption", {}, el("h3", {}, title, el("small", {}, ` ${unit}`)), legend);
    this.node = el("figure", { class: "panel" }, heading, this.svg);
  }

  /** `cursorTick` is the second looked at, or null: then the values are those of the last one. */
  show(seconds, endS, windowS, cursorTick) {
    this.width = this.svg.clientWidth || this.width;
    if (this.width < NARROW) return;
    const axis = (this.axis = new TimeAxis(endS, windowS, this.width));
    const visible = seconds.filter((second) => second.tick >= axis.startS);
    const columns = this.series.map((line) => visible.map((second) => line.of(second)));
    const highest = Math.max(this.least, ...columns.flat().filter((value) => value !== null));
    const top = this.top ?? niceCeiling(highest);
    const y = (value) => HEIGHT - BOTTOM - (Math.min(value, top) / top) * (HEIGHT - BOTTOM - TOP);
    setAttribute(this.svg, "viewBox", `0 0 ${this.width} ${HEIGHT}`);
    this.drawGrid(axis, top, y);
    columns.forEach((values, place) => this.drawLine(place, visible, values, axis, y));
    this.showCursor(axis, cursorTick);
    this.showValues(visible, columns, cursorTick);
    const isEmpty = columns.flat().every((value) => value === null || value === 0);
    setText(this.nothing, isEmpty ? this.empty : "");
    setAttribute(this.nothing, "x", (this.width + LEFT) / 2);
  }

  drawGrid(axis, top, y) {
    const state = `${top} ${axis.width} ${axis.windowS}`;
    if (state === this.gridState) return;
    this.gridState = state;
    this.grid.replaceChildren(
      ...[0, 0.5, 1].flatMap((part) => [
        svg("line", { x1: LEFT, x2: axis.width - RIGHT, y1: y(part * top), y2: y(part * top) }),
        svg("text", { x: LEFT - 6, y: y(part * top) + 4, "text-anchor": "end" }, this.format(part * top)),
      ]),
    );
    drawTimeAxis(this.times, axis, HEIGHT - 4);
  }

  /** Values not far apart are joined; one alone is a dot; a series that is zero throughout is left out. */
  drawLine(place, seconds, values, axis, y) {
    const known = values.map((value, index) => ({ value, tick: seconds[index].tick })).filter(({ value }) => value !== null);
    const points = known.some(({ value }) => value > 0) ? known : [];
    const ground = y(0).toFixed(1);
    let line = "";
    let area = "";
    points.forEach(({ value, tick }, index) => {
      const x = axis.x(tick + 0.5).toFixed(1);
      const point = `${x} ${y(value).toFixed(1)}`;
      const isFirst = index === 0 || tick - points[index - 1].tick > axis.windowS * BRIDGE;
      const isLast = index === points.length - 1 || points[index + 1].tick - tick > axis.windowS * BRIDGE;
      line += isFirst ? `M${point}${isLast ? "h.01" : ""}` : `L${point}`;
      area += `${isFirst ? `M${x} ${ground}` : ""}L${point}${isLast ? `L${x} ${ground}` : ""}`;
    });
    setAttribute(this.lines[place], "d", line);
    setAttribute(this.areas[place], "d", area);
  }

  showCursor(axis, tick) {
    const isShown = tick !== null && tick >= axis.startS;
    setAttribute(this.hair, "visibility", isShown ? "visible" : "hidden");
    if (!isShown) return;
    setAttribute(this.hair, "x1", axis.x(tick + 0.5));
    setAttribute(this.hair, "x2", axis.x(tick + 0.5));
  }

  showValues(seconds, columns, tick) {
    const index = tick === null ? seconds.length - 1 : seconds.findIndex((second) => second.tick === tick);
    const words = columns.map((values) => this.format(index < 0 ? null : values[index]));
    words.forEach((text, place) => setText(this.values[place], text));
    const parts = this.series.map((line, place) => `${line.name} ${words[place]}`);
    setAttribute(this.svg, "aria-label", `${this.title}: ${parts.join(", ")}`);
  }
}
