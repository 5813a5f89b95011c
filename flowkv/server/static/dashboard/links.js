// Who can write into whose pool, and how much goes over: a square for each direction, from the row to the column.

import { byId, el, Keyed, setAttribute, setText, svg } from "./dom.js";
import { bytesPerSecond, plural } from "./format.js";

const LEVELS = 5;

export class Links {
  constructor() {
    this.svg = svg("svg", { class: "matrix", role: "img" });
    this.cells = new Keyed(this.svg.appendChild(svg("g")), createCell, (node, cell) => this.drawCell(node, cell));
    this.labels = new Keyed(this.svg.appendChild(svg("g")), createLabel, (node, label) => this.drawLabel(node, label));
    this.words = el("p", { class: "note" });
    byId("links").append(this.svg, this.words);
  }

  show(instances) {
    const number = instances.length;
    this.svg.toggleAttribute("hidden", number < 2);
    const cells = instances.flatMap((from, row) => this.row(instances, from, row));
    const summary = summarise(instances, cells);
    setText(this.words, summary);
    if (number < 2) return;
    this.side = number > 40 ? 8 : number > 20 ? 13 : number > 8 ? 22 : 34;
    this.hasLabels = this.side > 12;
    const longest = Math.max(...instances.map((instance) => instance.name.length));
    this.margin = this.hasLabels ? longest * 6.6 + 10 : 0;
    this.most = Math.max(1, ...cells.map((cell) => cell.bytesPerS ?? 0));
    const size = this.margin + number * this.side;
    setAttribute(this.svg, "viewBox", `0 0 ${size} ${size}`);
    setAttribute(this.svg, "width", size);
    setAttribute(this.svg, "aria-label", summary);
    this.cells.show(cells, (cell) => `${cell.from} ${cell.to}`);
    const labels = this.hasLabels ? instances.flatMap(({ name }, place) => [{ name, place, isRow: true }, { name, place, isRow: false }]) : [];
    this.labels.show(labels, (label) => `${label.name} ${label.isRow}`);
  }

  row(instances, from, row) {
    const up = new Map(from.links.map(([peer, backend, bytesPerS]) => [peer, { backend, bytesPerS }]));
    return instances
      .map((to, column) => ({ from: from.name, to: to.name, row, column, ...up.get(column) }))
      .filter((cell) => cell.row !== cell.column);
  }

  drawCell(node, cell) {
    const [rect, title] = [node, node.firstChild];
    setAttribute(rect, "x", this.margin + cell.column * this.side + 1);
    setAttribute(rect, "y", this.margin + cell.row * this.side + 1);
    setAttribute(rect, "width", this.side - 2);
    setAttribute(rect, "height", this.side - 2);
    setAttribute(rect, "rx", this.side > 20 ? 4 : 1);
    setAttribute(rect, "class", cell.backend === undefined ? "missing" : `level-${this.level(cell.bytesPerS)}`);
    setText(title, `${cell.from} → ${cell.to}: ${cell.backend === undefined ? "no link" : `${cell.backend}, ${bytesPerSecond(cell.bytesPerS)}`}`);
  }

  level(bytesPerS) {
    return bytesPerS === 0 ? 0 : Math.max(1, Math.ceil((LEVELS * bytesPerS) / this.most));
  }

  drawLabel(node, { name, place, isRow }) {
    const middle = this.margin + (place + 0.5) * this.side;
    setText(node, name);
    setAttribute(node, "x", isRow ? this.margin - 6 : 0);
    setAttribute(node, "y", isRow ? middle + 4 : 0);
    setAttribute(node, "text-anchor", isRow ? "end" : "start");
    setAttribute(node, "transform", isRow ? "" : `translate(${middle + 4} ${this.margin - 6}) rotate(-90)`);
  }
}

const createCell = () => svg("rect", {}, svg("title"));
const createLabel = () => svg("text");

function summarise(instances, cells) {
  if (instances.length < 2) return "Links join two instances; there is nothing to join yet.";
  const up = cells.filter((cell) => cell.backend !== undefined);
  const backends = [...new Set(up.map((cell) => cell.backend))].join(" and ") || "none";
  const busiest = up.reduce((best, cell) => (cell.bytesPerS > (best?.bytesPerS ?? 0) ? cell : best), null);
  const parts = [`${up.length} of ${plural(cells.length, "link")} up (${backends}), each from its row to its column.`];
  if (busiest) parts.push(`Busiest: ${busiest.from} → ${busiest.to}, ${bytesPerSecond(busiest.bytesPerS)}.`);
  const missing = cells.filter((cell) => cell.backend === undefined);
  if (missing.length > 0) parts.push(`Missing: ${missing.slice(0, 3).map((cell) => `${cell.from} → ${cell.to}`).join(", ")}${missing.length > 3 ? ", …" : ""}.`);
  return parts.join(" ");
}
