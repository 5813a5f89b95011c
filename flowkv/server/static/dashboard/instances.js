// A row for each instance: its role, what it holds, its blocks by state and what it does in a second.

import { byId, el, Keyed, setAttribute, setText, showLegend } from "./dom.js";
import { bytesPerSecond, count, duration, number, percent } from "./format.js";

const BLOCKS = [
  ["filled", "in use"],
  ["reserved", "being filled by a peer"],
  ["quarantined", "quarantined"],
  ["free", "free"],
];

const NUMBERS = [
  ["waiting", "Waiting", (row) => count(row.waiting)],
  ["prefilling", "Prefill", (row) => count(row.prefilling)],
  ["decoding", "Decode", (row) => count(row.decoding)],
  ["sending", "Sending", (row) => count(row.sending)],
  ["receiving", "Receiving", (row) => count(row.receiving)],
];

const RATES = [
  ["prompt", "Prompt tok/s", (row) => number(row.prefill_tokens_per_s)],
  ["output", "Decode tok/s", (row) => number(row.decode_tokens_per_s)],
  ["step", "Step", (row) => duration(row.step_s)],
  ["links", "Links", (row) => links(row)],
];

const COLUMNS = [...NUMBERS, ["blocks", "KV blocks", null], ...RATES];

export class Instances {
  constructor() {
    this.body = el("tbody", { role: "rowgroup" });
    const heads = [["name", "Instance"], ...COLUMNS].map(([name, words]) =>
      el("th", { scope: "col", role: "columnheader", class: name }, words),
    );
    this.table = el(
      "table",
      { role: "table", "aria-labelledby": "instances-title" },
      el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...heads)),
      this.body,
    );
    this.empty = el("p", { class: "empty" });
    byId("instances").append(this.table, this.empty);
    this.rows = new Keyed(this.body, createRow, updateRow);
    showLegend(byId("block-legend"), BLOCKS);
  }

  show(data) {
    this.rows.show(data.instances, (row) => row.name);
    this.table.hidden = data.instances.length === 0;
    this.empty.hidden = data.instances.length > 0;
    setText(
      this.empty,
      data.status_age_s === null
        ? "The controller has not been heard of yet."
        : "No instance is in service yet. Instances register once their model is loaded and checked.",
    );
  }
}

function links(row) {
  const moved = row.links.reduce((sum, link) => sum + link[2], 0);
  return moved > 0 ? `${row.links.length} · ${bytesPerSecond(moved)}` : String(row.links.length);
}

function createRow(row) {
  const name = el(
    "th",
    { scope: "row", role: "rowheader", class: "name" },
    el("span", { class: "instance" }, row.name),
    " ",
    el("span", { class: "chip" }),
    " ",
    el("span", { class: "chip condition" }),
  );
  const cells = COLUMNS.map(([key, words]) =>
    el("td", { role: "cell", class: key === "blocks" ? "blocks" : `num ${key}`, "data-label": words }),
  );
  cells.find((cell) => cell.className === "blocks").append(
    el("span", { class: "bar", "aria-hidden": "true" }, ...BLOCKS.slice(0, 3).map(([state]) => el("i", { class: state }))),
    el("span", { class: "num" }),
  );
  return el("tr", { role: "row", "data-instance": row.name }, name, ...cells);
}

function updateRow(node, row) {
  const [name, ...cells] = node.children;
  const [, role, condition] = name.children;
  setText(role, row.role);
  setAttribute(role, "class", `chip ${row.role}`);
  const words = row.is_stalled ? "stalled" : row.is_draining ? "draining" : "";
  setText(condition, words);
  setAttribute(condition, "class", `chip condition ${words}`);
  COLUMNS.forEach(([, , value], place) => (value === null ? updateBlocks(cells[place], row.blocks) : setText(cells[place], value(row))));
}

function updateBlocks(cell, blocks) {
  const total = Object.values(blocks).reduce((sum, value) => sum + value, 0);
  const [bar, words] = cell.children;
  BLOCKS.slice(0, 3).forEach(([state], place) => {
    bar.children[place].style.width = `${total === 0 ? 0 : (100 * blocks[state]) / total}%`;
  });
  const used = total - blocks.free;
  setText(words, `${percent(total === 0 ? 0 : used / total)} of ${count(total)}`);
  setAttribute(cell, "title", BLOCKS.map(([state, meaning]) => `${count(blocks[state])} ${meaning}`).join(", "));
}
