// Live metrics: what /metrics says, every two seconds, with the last two minutes as a line.

import { drawing, element, number } from "./dom.js";
import { getText } from "./service.js";

const PERIOD = 2000;
const KEPT = 60;
const REJECTED = "gralora_fx_rejections_total:post"; // of the requests that are counted
const CACHE = "gralora_fx_prefix_cache";
const MEMORY = "process_resident_memory_bytes";
const [WIDTH, HEIGHT] = [120, 28];

// Sums of each metric's samples, by name; `<name>:post` of those for POST, which are the model's work.
function parse(text) {
  const sums = new Map();
  const add = (name, value) => sums.set(name, (sums.get(name) ?? 0) + value);
  for (const line of text.split("\n")) {
    const [, name, labels, value] = /^(\w+)(\{.*\})? (\S+)/.exec(line) ?? [];
    if (!name) continue;
    add(name, Number(value));
    if (labels?.includes('method="POST"')) add(`${name}:post`, Number(value));
    const [, kind] = /[{,](?:kind|reason)="(\w+)"/.exec(labels ?? "") ?? [];
    if (kind) add(`${name}:${kind}`, Number(value));
  }
  return sums;
}

// A tile's title, the metric that it needs, and how it is read: its number now, its line below, and a remark.
function tiles(info, generates) {
  const kind = generates ? "generated" : "prompt";
  const tokens = `gralora_fx_tokens_total:${kind}`;
  const requests = "gralora_fx_requests_total:post";
  const [flight, queue, wait] = ["gralora_fx_requests_in_flight", "gralora_fx_queue_length", "gralora_fx_queue_seconds"];
  return [
    ["Requests", null, (at) => [at.value(requests), at.rate(requests), `${number(at.rate(requests))} per second`]],
    ["Tokens/s", tokens, (at) => [at.rate(tokens), at.rate(tokens), `${number(at.value(tokens), 0)} in all`]],
    ["In flight", flight, (at) => both(at.value(flight), "being answered")],
    ["Queue", queue, (at) => both(at.value(queue), `of ${info.max_queue} · ${waited(at, wait)}`)],
    ["Prompts cached", `${CACHE}_queries_total`, cached],
    ["Rejected", REJECTED, rejected],
    ["Memory", MEMORY, memory],
  ];
}

function both(value, remark) {
  return [value, value, remark];
}

function waited(at, name) {
  const count = at.change(`${name}_count`);
  return count ? `waited ${number((1000 * at.change(`${name}_sum`)) / count, 0)} ms` : "no wait";
}

function rejected(at) {
  const failed = at.value("gralora_fx_run_failures_total");
  return [at.value(REJECTED), at.rate(REJECTED), failed ? `${number(failed, 0)} runs failed` : "no run failed"];
}

// The share of prompts' tokens that the prefix cache had: of all so far, and of those since the last look.
function cached(at) {
  const [hits, queries] = [`${CACHE}_hits_total`, `${CACHE}_queries_total`];
  const share = (had, asked) => (asked ? (100 * had) / asked : 0);
  const limit = at.now.has(`${CACHE}_bytes`) ? ` · ${number(at.value(`${CACHE}_bytes`) / 2 ** 20)} MiB` : "";
  return [share(at.value(hits), at.value(queries)), share(at.change(hits), at.change(queries)), `% of tokens${limit}`];
}

function memory(at) {
  const bytes = at.value(MEMORY);
  const load = at.rate("process_cpu_seconds_total");
  return [bytes / 2 ** 20, load, `MiB · CPU ${number(100 * load, 0)} %`];
}

class Change {
  constructor(before, now, seconds) {
    Object.assign(this, { before, now, seconds });
  }

  value(name) {
    return this.now.get(name) ?? 0;
  }

  change(name) {
    return Math.max(0, this.value(name) - (this.before?.get(name) ?? this.value(name)));
  }

  rate(name) {
    return this.before ? this.change(name) / this.seconds : 0;
  }
}

class Tile {
  constructor(title, needs, read) {
    Object.assign(this, { needs, read });
    this.past = [];
    this.number = element("strong", {}, "0");
    this.remark = element("span", { class: "quiet" });
    this.line = drawing("polyline", { "vector-effect": "non-scaling-stroke" });
    this.area = drawing("polygon");
    const picture = drawing("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" });
    picture.append(this.area, this.line);
    this.item = element("div", { class: "tile" }, element("h3", {}, title), this.number, this.remark, picture);
  }

  show(at) {
    this.item.hidden = this.needs !== null && !at.now.has(this.needs); // a model has no tokens, a replica no process
    if (this.item.hidden) return;
    const [value, drawn, remark] = this.read(at);
    this.number.textContent = number(value, value < 100 ? 1 : 0);
    this.remark.textContent = remark;
    this.past = [...this.past, drawn].slice(-KEPT);
    const most = Math.max(...this.past) || 1;
    const step = WIDTH / (KEPT - 1);
    const start = WIDTH - step * (this.past.length - 1);
    const points = this.past.map((y, index) => [start + step * index, HEIGHT - 1.5 - (HEIGHT - 3) * (y / most)]);
    const written = points.map((point) => point.map((part) => part.toFixed(1)).join(",")).join(" ");
    this.line.setAttribute("points", written);
    this.area.setAttribute("points", `${start.toFixed(1)},${HEIGHT} ${written} ${WIDTH},${HEIGHT}`);
  }
}

// Shows metrics in a place for as long as the page is looked at; `tell(error)` hears how each look went.
export function watchMetrics(place, info, generates, tell) {
  const shown = tiles(info, generates).map((tile) => new Tile(...tile));
  place.replaceChildren(...shown.map((tile) => tile.item));
  let [before, at] = [null, 0];

  async function look() {
    if (!document.hidden) {
      try {
        const now = parse(await getText("metrics"));
        const time = performance.now();
        const change = new Change(before, now, (time - at) / 1000);
        for (const tile of shown) tile.show(change);
        [before, at] = [now, time];
        tell(null);
      } catch (error) {
        tell(error);
      }
    }
    setTimeout(look, PERIOD);
  }
  look();
}
