// Asks the daemon what it does, again and again, and shows it. Reads only: no request of this page changes anything.

import { draw } from "/ui/detail.js";
import { age, byId, clock, day, element, latency, mibs, percent, say, short, size } from "/ui/format.js";
import { Table } from "/ui/table.js";

const LIVE = "/v1/live";
const EVERY = 2000, HISTORY_EVERY = 10000, PATIENCE = 15000;
const KEPT = "glidefs-token";

let chosen = "", drawnAt = 0, latest = null, timer = 0;
const table = new Table(choose);

function takeToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!given) return;
  sessionStorage.setItem(KEPT, given);
  history.replaceState(null, "", location.pathname);
}

class Refused extends Error {}

async function ask(path) {
  const token = sessionStorage.getItem(KEPT);
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const answer = await fetch(path, { headers, cache: "no-store", signal: AbortSignal.timeout(PATIENCE) });
  if (answer.status === 401 || answer.status === 403) throw new Refused();
  if (!answer.ok) {
    const why = await answer.json().catch(() => ({}));
    throw new Error(why.error || why.detail || why.title || `status ${answer.status}`);
  }
  return answer.json();
}

async function round() {
  clearTimeout(timer);
  const began = performance.now();
  let pause = EVERY;
  try {
    show(await ask(LIVE));
    if (chosen && Date.now() - drawnAt >= HISTORY_EVERY) await drawChosen();
    // Thousands of exports take the daemon a while: it is asked for a tenth of the time at most.
    pause = Math.max(EVERY, 9 * (performance.now() - began));
  } catch (error) {
    if (error instanceof Refused) { askForToken(); return; }
    lost(error);
  }
  if (!document.hidden) timer = setTimeout(round, pause);
}

function askForToken() {
  const form = byId("token-form");
  const again = sessionStorage.getItem(KEPT);
  form.hidden = false;
  byId("main").classList.add("locked");
  if (again) say(byId("token-note"), "The daemon does not know this token. Take that of its token file.");
  sessionStorage.removeItem(KEPT);
  pill("lost", "needs a token");
  byId("token").focus();
}

function lost(error) {
  pill("lost", "no answer");
  const since = latest ? `; what is shown is of ${clock(latest.host.time)}` : "";
  say(byId("updated"), `${error.message || error}${since}`);
}

function pill(kind, text) {
  const status = byId("status");
  status.className = `pill ${kind}`;
  say(status, text);
}

function show(live) {
  latest = live;
  const host = live.host;
  byId("token-form").hidden = true;
  byId("main").classList.remove("locked");
  document.title = live.wrong.length ? `(${live.wrong.length}) ${host.node} – GlideFS` : `${host.node} – GlideFS`;
  say(byId("node"), host.node);
  pill(host.status, host.status);
  say(byId("updated"), `${clock(host.time)}, version ${host.version}, up ${age(host.uptime_seconds)}`);
  showWrong(live.wrong);
  showCards(live);
  table.show(live.exports);
  showHandoffs(live.handoffs);
  showEvents(live.events);
}

function showWrong(wrong) {
  byId("all-well").hidden = wrong.length > 0;
  const key = JSON.stringify(wrong);
  const list = byId("wrong");
  if (list.dataset.key === key) return;
  list.dataset.key = key;
  list.replaceChildren(...wrong.map((one) => {
    const item = element("li", one.severity === "error" ? "error" : "warning");
    item.append(element("p", "what", one.export ? `${one.export}: ${one.what}` : one.what));
    item.append(element("p", "todo", `→ ${one.todo}`));
    return item;
  }));
}

function showCards({ totals, store, log, cache, states }) {
  const served = states.serving ?? 0;
  const all = Object.values(states).reduce((sum, count) => sum + count, 0);
  say(byId("traffic"), `${short(totals.read_iops + totals.write_iops)} IOPS`);
  say(byId("traffic-more"),
    `read ${mibs(totals.read_bytes_per_second)}, write ${mibs(totals.write_bytes_per_second)} MiB/s; ${served} of ${all} served, ` +
    `${short(totals.waiting_requests)} requests wait`);
  const away = store.state !== "up";
  byId("store").classList.toggle("bad", away);
  say(byId("store"), away ? `away for ${age(store.down_seconds)}`
    : store.latency_seconds === null ? "up" : `up, ${latency(store.latency_seconds)}`);
  const failed = store.last_error ? `; last error ${day(store.last_error_at)}: ${store.last_error}` : "";
  byId("store-more").title = store.url + failed;
  say(byId("store-more"),
    `${short(store.requests_per_second)} requests/s, in ${mibs(store.received_bytes_per_second)}, out ` +
    `${mibs(store.sent_bytes_per_second)} MiB/s` + (store.last_error ? `; last error ${clock(store.last_error_at)}` : ""));
  const part = log.limit_bytes ? log.dirty_bytes / log.limit_bytes : 0;
  say(byId("log"), size(log.dirty_bytes));
  byId("log-bar").value = part;
  say(byId("log-more"), `${percent(part)} of ${size(log.limit_bytes)}; oldest ${age(totals.oldest_dirty_seconds)}; ` +
    `upload ${mibs(totals.upload_bytes_per_second)} MiB/s`);
  const used = cache.limit_blocks ? cache.blocks / cache.limit_blocks : 0;
  say(byId("cache"), percent(used));
  byId("cache-bar").value = used;
  say(byId("cache-more"), cache.errno ? `its disk fails (errno ${cache.errno})`
    : `${short(totals.store_reads_per_second)} reads/s go to the store`);
}

function lines(id, key, items, none) {
  const list = byId(id);
  if (list.dataset.key === key) return;
  list.dataset.key = key;
  const made = items.map(([at, text, bad]) => {
    const item = element("li");
    const when = element("time", "", clock(at));
    when.dateTime = when.title = day(at);
    item.append(when, element("span", bad ? "failed" : "", text));
    return item;
  });
  list.replaceChildren(...(made.length ? made : [element("li", "muted", none)]));
}

function showHandoffs(handoffs) {
  const items = handoffs.map((one) => {
    const stall = one.stall_seconds === null ? "" : `, guests waited ${latency(one.stall_seconds)}`;
    return [one.at, one.outcome + stall, one.outcome !== "succeeded"];
  });
  lines("handoffs", handoffs.map((one) => one.at).join(), items, "None.");
}

function showEvents(events) {
  const items = events.map((one) => [one.at, `${one.text}; by ${one.by}`, one.outcome === "failed"]);
  lines("events", `${events.length} ${events[0]?.at}`, items, "None.");
}

async function choose(name) {
  chosen = table.chosen = name;
  table.first = -1;
  table.draw();
  try {
    await drawChosen();
    byId("detail").scrollIntoView({ block: "nearest" });
  } catch (error) {
    lost(error);
  }
}

async function drawChosen() {
  const name = chosen;
  const history = await ask(`${LIVE}/${encodeURIComponent(name)}`);
  if (name !== chosen) return;
  drawnAt = Date.now();
  draw(name, history, latest?.exports.find((one) => one.name === name)?.trouble ?? "");
}

byId("close").addEventListener("click", () => {
  chosen = table.chosen = "";
  byId("detail").hidden = true;
  table.first = -1;
  table.draw();
});
byId("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEPT, byId("token").value.trim());
  byId("token").value = "";
  round();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) round(); });
takeToken();
round();
