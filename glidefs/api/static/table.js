// The table of exports. Only the rows that can be seen exist, and they are used again: thousands of exports
// cost as much as thirty.

import { age, byId, element, latency, mibs, percent, say, short, size } from "/ui/format.js";

const ROW = 31;
const SPARE = 6;
const worst = (e) => Math.max(e.read_p99_seconds ?? 0, e.write_p99_seconds ?? 0);
const mean = (e) => {
  const ops = e.read_iops + e.write_iops;
  if (!ops) return null;
  return ((e.read_mean_seconds ?? 0) * e.read_iops + (e.write_mean_seconds ?? 0) * e.write_iops) / ops;
};

// Key, title, explanation, the value to sort by, the text to show. Text columns have no third.
export const COLUMNS = [
  ["name", "Export", "", (e) => e.name, (e) => e.name],
  ["state", "State", "", (e) => e.state, (e) => e.state],
  ["transport", "Transport", "", (e) => e.transport, (e) => e.transport],
  ["iops", "IOPS", "Reads and writes per second", (e) => e.read_iops + e.write_iops, (e) => short(e.read_iops + e.write_iops)],
  ["mibs", "MiB/s", "Read and written", (e) => e.read_bytes_per_second + e.write_bytes_per_second,
    (e) => mibs(e.read_bytes_per_second + e.write_bytes_per_second)],
  ["mean", "Mean", "Mean latency of reads and writes", (e) => mean(e) ?? 0, (e) => latency(mean(e))],
  ["p99", "p99", "The 99th percentile of latency, of reads or writes, whichever is worse", worst,
    (e) => latency(worst(e) || null)],
  ["log", "Log", "Part of block reads that the write log answered", (e) => e.log_hit_ratio ?? -1, (e) => percent(e.log_hit_ratio)],
  ["cache", "Cache", "Part of block reads that the block cache answered", (e) => e.cache_hit_ratio ?? -1,
    (e) => percent(e.cache_hit_ratio)],
  ["dirty", "Dirty", "Bytes that are not in the store yet", (e) => e.dirty_bytes, (e) => (e.dirty_bytes ? size(e.dirty_bytes) : "–")],
  ["age", "Age", "Of the oldest write that is not in the store", (e) => e.oldest_dirty_seconds, (e) => age(e.oldest_dirty_seconds)],
  ["upload", "Upload", "MiB per second that the store gets", (e) => e.upload_bytes_per_second, (e) => mibs(e.upload_bytes_per_second)],
  ["waits", "Waiting", "Requests that wait for space, blocks or the store", (e) => e.waiting_requests, (e) => short(e.waiting_requests)],
  ["trouble", "Trouble", "", (e) => (e.trouble ? 1 : 0), (e) => e.trouble],
];
const TEXT = new Set(["name", "state", "transport", "trouble"]);

export class Table {
  constructor(choose) {
    this.choose = choose;
    this.exports = [];
    this.shown = [];
    this.rows = [];
    this.chosen = "";
    this.sort = "iops";
    this.up = false;
    this.words = "";
    this.first = -1;
    this.scroll = byId("scroll");
    this.above = this.space();
    this.below = this.space();
    byId("rows").append(this.above, this.below);
    this.head();
    this.scroll.addEventListener("scroll", () => this.soon(), { passive: true });
    new ResizeObserver(() => this.soon()).observe(this.scroll);
    byId("filter").addEventListener("input", (event) => {
      this.words = event.target.value.trim().toLowerCase();
      this.scroll.scrollTop = 0;
      this.arrange();
    });
  }

  space() {
    const row = element("tr", "space");
    const cell = element("td");
    cell.colSpan = COLUMNS.length;
    row.setAttribute("aria-hidden", "true");
    row.append(cell);
    return row;
  }

  head() {
    for (const [key, title, about] of COLUMNS) {
      const cell = element("th", `${key}${TEXT.has(key) ? " text" : ""}`);
      const button = element("button", "", title);
      cell.scope = "col";
      button.type = "button";
      if (about) button.title = about;
      button.addEventListener("click", () => {
        this.up = this.sort === key ? !this.up : TEXT.has(key) && key !== "trouble";
        this.sort = key;
        this.arrange();
      });
      cell.append(button);
      byId("columns").append(cell);
    }
  }

  show(exports) {
    this.exports = exports;
    this.arrange();
  }

  arrange() {
    const value = COLUMNS.find((column) => column[0] === this.sort)[3];
    const words = this.words;
    const has = (e) => !words || `${e.name}\n${e.state}\n${e.transport}\n${e.trouble}`.toLowerCase().includes(words);
    const keyed = this.exports.filter(has).map((e) => [value(e), e]);
    const way = this.up ? 1 : -1;
    keyed.sort(([a, x], [b, y]) => (a < b ? -way : a > b ? way : x.name < y.name ? -1 : 1));
    this.shown = keyed.map((pair) => pair[1]);
    COLUMNS.forEach(([key, title], at) => {
      const cell = byId("columns").children[at];
      const here = key === this.sort;
      if (here) cell.setAttribute("aria-sort", this.up ? "ascending" : "descending");
      else cell.removeAttribute("aria-sort");
      say(cell.firstChild, here ? `${title} ${this.up ? "▲" : "▼"}` : title);
    });
    const all = this.exports.length;
    say(byId("count"), this.shown.length === all ? `${all}` : `${this.shown.length} of ${all}`);
    byId("exports").setAttribute("aria-rowcount", String(this.shown.length + 1));
    this.first = -1;
    this.draw();
  }

  soon() {
    if (this.asked) return;
    this.asked = true;
    requestAnimationFrame(() => { this.asked = false; this.draw(); });
  }

  draw() {
    const height = this.scroll.clientHeight || 430;
    const count = Math.min(this.shown.length, Math.ceil(height / ROW) + 2 * SPARE);
    const last = Math.max(0, this.shown.length - count);
    const first = Math.min(last, Math.max(0, Math.floor(this.scroll.scrollTop / ROW) - SPARE));
    if (first === this.first && count === this.rows.length) return;
    this.first = first;
    while (this.rows.length < count) this.rows.push(this.add());
    while (this.rows.length > count) this.rows.pop().row.remove();
    this.above.firstChild.style.height = `${first * ROW}px`;
    this.below.firstChild.style.height = `${(this.shown.length - first - count) * ROW}px`;
    this.rows.forEach((row, at) => this.fill(row, this.shown[first + at], first + at));
  }

  add() {
    const row = element("tr");
    const made = { row, cells: [], name: "" };
    for (const [key] of COLUMNS) {
      const cell = element("td", TEXT.has(key) ? "text" : "");
      let inner = cell;
      if (key === "name") {
        inner = element("button");
        inner.type = "button";
        inner.addEventListener("click", () => this.choose(made.name));
        cell.append(inner);
      }
      made.cells.push(inner);
      row.append(cell);
    }
    byId("rows").insertBefore(row, this.below);
    return made;
  }

  fill(made, e, index) {
    made.name = e.name;
    made.row.setAttribute("aria-rowindex", String(index + 2));
    made.row.classList.toggle("chosen", e.name === this.chosen);
    COLUMNS.forEach((column, at) => say(made.cells[at], column[4](e)));
    const bad = e.state === "failed" || e.state === "fenced";
    made.cells[1].classList.toggle("bad", bad);
    const trouble = made.cells[COLUMNS.length - 1];
    trouble.classList.toggle("bad", Boolean(e.trouble));
    trouble.title = e.trouble;
  }
}
