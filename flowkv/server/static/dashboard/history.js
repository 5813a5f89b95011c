// What became of each instance within the time shown, told from its events and from what it is now.

const ENDS = new Set(["gone", "retired"]);

/** The place of an instance in the cluster: those that took its place after a restart share it. */
export const seatOf = (name) => name.split("~")[0];

/** [{seat, spans: [{fromS, toS, role, isStalled, name}], marks: [event]}], in the order of the instances. */
export function lanes(instances, events, startS, endS) {
  const bySeat = new Map();
  const lane = (name) => {
    const seat = seatOf(name);
    if (!bySeat.has(seat)) bySeat.set(seat, { seat, spans: [], marks: [] });
    return bySeat.get(seat);
  };
  for (const name of names(instances, events)) {
    const own = events.filter((event) => event.instance === name);
    const now = instances.find((instance) => instance.name === name);
    lane(name).spans.push(...spans(name, own, now, startS, endS));
    lane(name).marks.push(...own.filter((event) => event.time_s >= startS));
  }
  for (const one of bySeat.values()) one.marks.sort((a, b) => a.time_s - b.time_s);
  return [...bySeat.values()].filter((one) => one.spans.length > 0 || one.marks.length > 0);
}

const names = (instances, events) =>
  new Set([...instances.map((instance) => instance.name), ...events.map((event) => event.instance).filter(Boolean)]);

/** Every event ends one span and begins the next; what was before the first is told by the first. */
function spans(name, events, now, startS, endS) {
  const result = [];
  let open = before(events[0], now, startS);
  for (const event of events) {
    if (open !== null) result.push({ ...open, toS: event.time_s });
    open = ENDS.has(event.kind) ? null : { fromS: event.time_s, role: event.role, isStalled: event.kind === "stalled" };
  }
  if (open !== null && now !== undefined) result.push({ ...open, toS: endS });
  return result
    .map((span) => ({ ...span, name, fromS: Math.max(span.fromS, startS) }))
    .filter((span) => span.toS > span.fromS);
}

function before(first, now, startS) {
  if (first === undefined) return { fromS: startS, role: now.role, isStalled: now.is_stalled };
  if (first.kind === "joined" || first.kind === "restarted") return null;
  return { fromS: startS, role: first.was ?? first.role, isStalled: first.kind === "awake" };
}
