// The second that is looked at, in all plots at once: by pointer, or with the arrow keys on a plot that has the focus.

export class Cursor {
  /** `range()` gives [first, last] tick that can be looked at; `onMove` is called when another one is. */
  constructor(range, onMove) {
    this.range = range;
    this.onMove = onMove;
    this.tick = null;
  }

  follow(plot) {
    plot.svg.addEventListener("pointermove", (event) => {
      const bounds = plot.svg.getBoundingClientRect();
      if (plot.axis) this.move(Math.floor(plot.axis.timeAt(event.clientX - bounds.left)));
    });
    plot.svg.addEventListener("pointerleave", () => this.move(null));
    plot.svg.addEventListener("blur", () => this.move(null));
    plot.svg.addEventListener("keydown", (event) => this.onKey(event));
  }

  onKey(event) {
    const [first, last] = this.range();
    const at = this.tick ?? last;
    const step = event.shiftKey ? 10 : 1;
    const target = { ArrowLeft: at - step, ArrowRight: at + step, Home: first, End: last, Escape: null }[event.key];
    if (target === undefined) return;
    event.preventDefault();
    this.move(target);
  }

  move(tick) {
    const [first, last] = this.range();
    const bounded = tick === null ? null : Math.min(last, Math.max(first, tick));
    if (bounded === this.tick) return;
    this.tick = bounded;
    this.onMove();
  }
}
