// Elements. Whatever comes from the server goes through `textContent` or an attribute, never through markup.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Writes only what has changed, so that nothing flickers and a selection stays. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function setAttribute(node, name, value) {
  const text = String(value);
  if (node.getAttribute(name) !== text) node.setAttribute(name, text);
}

/** The children of `parent` follow `items`: each is made once for its key, and kept as long as the key is there. */
export class Keyed {
  constructor(parent, create, update) {
    this.parent = parent;
    this.create = create;
    this.update = update;
    this.nodes = new Map();
  }

  show(items, keyOf) {
    const old = this.nodes;
    this.nodes = new Map();
    let place = 0;
    for (const item of items) {
      const key = keyOf(item);
      const node = old.get(key) ?? this.create(item);
      old.delete(key);
      this.nodes.set(key, node);
      if (this.parent.children[place] !== node) this.parent.insertBefore(node, this.parent.children[place] ?? null);
      this.update(node, item);
      place += 1;
    }
    for (const node of old.values()) node.remove();
  }
}

/** A legend of coloured squares; `entries` are [css class, words]. */
export function showLegend(list, entries) {
  list.replaceChildren(...entries.map(([name, words]) => el("li", {}, el("i", { class: `swatch ${name}`, "aria-hidden": "true" }), words)));
}
