// What the server says, asked for once a second and kept for as long as it is shown.

const DATA = new URL("data", import.meta.url);
const INTERVAL_MS = 1000;
const TIMEOUT_MS = 5000;

export class Feed {
  /** `onData()` after every answer, `onSilence(error)` where none came. */
  constructor({ onData, onSilence }) {
    Object.assign(this, { onData, onSilence });
    this.seconds = [];
    this.latest = null;
    this.heardMs = 0;
  }

  start() {
    document.addEventListener("visibilitychange", () => document.hidden || this.ask());
    setInterval(() => document.hidden || this.ask(), INTERVAL_MS);
    this.ask();
  }

  async ask() {
    if (this.isAsking) return;
    this.isAsking = true;
    try {
      await this.fetch();
    } catch (error) {
      this.onSilence(error);
    } finally {
      this.isAsking = false;
    }
  }

  async fetch() {
    const url = new URL(DATA);
    url.searchParams.set("since", this.nextTick);
    const answer = await fetch(url, { signal: AbortSignal.timeout(TIMEOUT_MS) });
    if (!answer.ok) throw new Error(`the server answers with ${answer.status}`);
    this.take(await answer.json());
  }

  take(data) {
    if (this.latest !== null && this.latest.frontend !== data.frontend) {
      // Another process, with another clock: what we asked for is not what it has.
      this.seconds = [];
      this.latest = null;
      this.isAsking = false;
      this.ask();
      return;
    }
    this.seconds.push(...data.seconds);
    this.seconds.splice(0, this.seconds.length - data.window_s);
    this.latest = data;
    this.heardMs = Date.now();
    this.onData();
  }

  get nextTick() {
    return this.seconds.length === 0 ? 0 : this.seconds[this.seconds.length - 1].tick + 1;
  }

  /** The end of the time shown: all seconds before it are over. */
  get endS() {
    return Math.floor(this.latest.now_s);
  }

  /** The wall clock at a moment of the server's clock. */
  date(serverS) {
    return new Date(this.heardMs - (this.latest.now_s - serverS) * 1000);
  }
}
