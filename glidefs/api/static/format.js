// Numbers as people read them, and the one way in which text gets into the page: as text.

const SIZES = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

export function size(bytes) {
  let value = bytes, unit = 0;
  while (value >= 1024 && unit < SIZES.length - 1) { value /= 1024; unit += 1; }
  return `${short(value)} ${SIZES[unit]}`;
}

export function mibs(bytes) { return bytes ? short(bytes / 1048576) : "0"; }

export function short(value) {
  if (!value) return "0";
  if (value >= 1000) return Math.round(value).toLocaleString("en-US");
  if (value >= 100) return value.toFixed(0);
  return value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

export function latency(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds >= 1) return `${short(seconds)} s`;
  return seconds >= 1e-3 ? `${short(seconds * 1e3)} ms` : `${short(seconds * 1e6)} µs`;
}

export function age(seconds) {
  const s = Math.round(seconds);
  if (s < 1) return "–";
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
}

export function percent(ratio) {
  return ratio === null || ratio === undefined ? "–" : `${(ratio * 100).toFixed(ratio < 0.995 ? 1 : 0)} %`;
}

export function clock(unix) {
  const when = new Date(unix * 1000);
  return when.toLocaleTimeString("en-GB");
}

export function day(unix) { return new Date(unix * 1000).toISOString().slice(0, 19) + "Z"; }

export const byId = (id) => document.getElementById(id);

export function say(node, text) {
  if (node.firstChild && node.firstChild.nodeType === 3 && node.childNodes.length === 1) {
    if (node.firstChild.data !== text) node.firstChild.data = text;
  } else {
    node.textContent = text;
  }
}

export function element(tag, kind, text) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  return made;
}
