// What the server says, asked for once a second and kept for as long as it is shown.

const DATA = new URL("data", import.meta.url);
const INTERVAL_MS = 1000;
const TIMEOUT_MS = 5000;
const KEY = "flowkv-key";

export class Feed {
  /** `onData(feed)` after every answer, `onSilence(feed, error)` where none came, `onLocked()` where a key is asked for. */
  constructor({ onData, onSilence, onLocked }) {
    Object.assign(this, { onData, onSilence, onLocked });
    this.seconds = [];
    this.latest = null;
    this.heardMs = 0;
    this.isLocked = false;
  }

  start() {
    document.addEventListener("visibilitychange", () => document.hidden || this.ask());
    setInterval(() => document.hidden || this.isLocked || this.ask(), INTERVAL_MS);
    this.ask();
  }

  unlock(key) {
    sessionStorage.setItem(KEY, key);
    this.isLocked = false;
    this.ask();
  }

  async ask() {
    if (this.isAsking) return;
    this.isAsking = true;
    try {
      await this.fetch();
    } catch (error) {
      this.onSilence(this, error);
    } finally {
      this.isAsking = false;
    }
  }

  async fetch() {
    const key = sessionStorage.getItem(KEY);
    const url = new URL(DATA);
    url.searchParams.set("since", this.nextTick);
    const answer = await fetch(url, {
      headers: key === null ? {} : { authorization: `Bearer ${key}` },
      signal: AbortSignal.timeout(TIMEOUT_MS),
    });
    if (answer.status === 401 || answer.status === 403) {
      this.isLocked = true;
      this.onLocked();
      return;
    }
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
    this.onData(this);
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
