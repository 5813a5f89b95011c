// Numbers and times as an operator reads them. Each returns "–" where nothing is known.

const NONE = "–";

const isKnown = (value) => value !== null && value !== undefined && Number.isFinite(value);

/** Three digits and a power of a thousand: 0.42, 12.4, 128, 1.30k, 45.1M. */
export function number(value) {
  if (!isKnown(value)) return NONE;
  for (const [factor, unit] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= factor * 0.9995) return digits(value / factor) + unit;
  }
  return digits(value);
}

function digits(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 99.95 || Number.isInteger(value)) return value.toFixed(0);
  return value.toFixed(size >= 9.995 ? 1 : 2);
}

export const count = (value) => (isKnown(value) ? Math.round(value).toLocaleString("en") : NONE);

export const bytesPerSecond = (value) => (isKnown(value) ? `${number(value).replace(/(?=[kMG]?$)/, " ")}B/s` : NONE);

export function duration(seconds) {
  if (!isKnown(seconds)) return NONE;
  if (seconds === 0) return "0 s";
  if (seconds < 0.9995e-3) return `${digits(seconds * 1e6)} µs`;
  if (seconds < 0.9995) return `${digits(seconds * 1e3)} ms`;
  if (seconds < 120) return `${digits(seconds)} s`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

export const percent = (fraction) => (isKnown(fraction) ? `${(100 * fraction).toFixed(fraction >= 0.0005 && fraction < 0.0995 ? 1 : 0)}%` : NONE);

export const clock = (date) => date.toLocaleTimeString("en-GB");

export const plural = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;
