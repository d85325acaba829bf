// One export's last hour: a chart each for requests, bytes, latency and what is not uploaded yet.

import { byId, clock, element, latency, mibs, say, short, size } from "/ui/format.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 360, HEIGHT = 80;
const CHARTS = [
  ["IOPS", "read_iops", "write_iops", short],
  ["MiB/s", "read_bytes_per_second", "write_bytes_per_second", mibs],
  ["p99 latency", "read_p99_seconds", "write_p99_seconds", (v) => (v ? latency(v) : "–")],
  ["Not uploaded", "dirty_bytes", null, (v) => (v ? size(v) : "0")],
];

function line(values, top, kind) {
  const path = document.createElementNS(SVG, "path");
  const start = WIDTH - values.length;
  let drawn = "", on = false;
  values.forEach((value, at) => {
    if (value === null) { on = false; return; }
    const y = HEIGHT - 2 - (value / top) * (HEIGHT - 6);
    drawn += `${on ? "L" : "M"}${start + at} ${y.toFixed(1)}h1`;  // a sample is of some time, also alone
    on = true;
  });
  path.setAttribute("d", drawn);
  path.setAttribute("class", kind);
  return path;
}

function chart([title, first, second, text], document_) {
  const figure = element("figure");
  const caption = element("figcaption");
  const series = [first, second].filter(Boolean).map((key) => document_.series[key]);
  const top = Math.max(...series.map((values) => values.reduce((most, v) => Math.max(most, v ?? 0), 0))) || 1;
  const peak = series.some((values) => values.some(Boolean)) ? text(top) : "0";
  const now = element("span", "now");
  const svg = document.createElementNS(SVG, "svg");
  const axis = element("div", "axis");
  caption.append(element("strong", "", title));
  if (second) caption.append(element("span", "first", "— read"), element("span", "second", "╌ write"));
  caption.append(now);
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${title} of the last hour, at most ${peak}`);
  series.forEach((values, at) => svg.append(line(values, top, at ? "second" : "first")));
  axis.append(element("span", "", "60 min ago"), element("span", "", `top: ${peak}`), element("span", "", "now"));
  const count = series[0].length;
  const tell = (at) => {
    const when = document_.until - (count - 1 - at) * document_.step_seconds;
    const told = series.map((values) => (values[at] === null || values[at] === undefined ? "?" : text(values[at])));
    say(now, count ? `${clock(when)}: ${told.join(" / ")}` : "no sample yet");
  };
  tell(count - 1);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = Math.round(((event.clientX - box.left) / box.width) * WIDTH - 0.5) - (WIDTH - count);
    tell(Math.max(0, Math.min(count - 1, at)));
  });
  svg.addEventListener("pointerleave", () => tell(count - 1));
  figure.append(caption, svg, axis);
  return figure;
}

export function draw(name, history, trouble) {
  byId("detail").hidden = false;
  say(byId("detail-title"), name);
  say(byId("detail-trouble"), trouble);
  byId("charts").replaceChildren(...CHARTS.map((one) => chart(one, history)));
}
