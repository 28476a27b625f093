// The page: asks the service what it is, and shows what can be done with it.

import { element, find, number, showError } from "./dom.js";
import { classifyPanel, comparePanel, rankPanel } from "./encoders.js";
import { watchMetrics } from "./metrics.js";
import { get, onRefusedKey, useKey } from "./service.js";
import { speechPanel } from "./speech.js";
import { tensorsPanel } from "./tensors.js";
import { textPanel } from "./text.js";

const MODELS_PERIOD = 10_000;
const SPEECH = "/v1/audio/transcriptions";
const select = find("#adapter select");
const keyPanel = find("#key");
let asksForKey = false;
let started = false;

const model = () => select.value;

async function start() {
  const info = await get("info");
  const { paths } = await get("openapi.json");
  document.title = `${info.model} · gralora-fx`;
  find("#model").textContent = info.model;
  showFacts(info);
  await showModels(info);
  await showPanels(info, paths);
  find("#service").hidden = false;
  if (started) return;
  started = true;
  const generates = "/v1/completions" in paths || SPEECH in paths;
  watchMetrics(find("#metrics"), info, generates, (error) => setStatus(error ? "lost" : "ready"));
  setInterval(() => document.hidden || showModels(info).catch(() => setStatus("lost")), MODELS_PERIOD);
}

function setStatus(state) {
  const place = find("#status");
  const text = { ready: "Ready", lost: "Not reachable, trying again", waiting: "Connecting", key: "Key needed" }[state];
  if (place.dataset.state === state) return;
  place.dataset.state = state;
  place.textContent = text;
}

function showFacts(info) {
  const facts = {
    Task: info.task ?? "tensors",
    Adapters: element("span", { id: "count" }),
    Precision: info.quantization ? `${info.quantization}, else ${info.precision}` : info.precision,
    ...(info.context_length ? { Context: `${number(info.context_length, 0)} tokens` } : {}),
    Version: `gralora-fx ${info.version}`,
  };
  const rows = Object.entries(facts).map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
  find("#facts").replaceChildren(...rows);
}

// The choice of adapters, which changes only where the models do.
async function showModels(info) {
  const { data } = await get("v1/models");
  const names = data.map((entry) => entry.id);
  const shown = [...select.options].map((option) => option.value);
  if (JSON.stringify(names) === JSON.stringify(shown)) return;
  const chosen = select.value;
  const options = names.map((name) => element("option", { value: name }, name === info.model ? `${name} (no adapter)` : name));
  select.replaceChildren(...options);
  if (names.includes(chosen)) select.value = chosen;
  const none = names.length < 2;
  find("#count").textContent = none ? info.adapters_mode : `${names.length - 1}, ${info.adapters_mode}`;
  find("#adapter").hidden = none;
  find("#no-adapters").hidden = !none;
  find("#no-adapters").textContent =
    info.adapters_mode === "merged" ? "This export has no choice of adapters." : "No adapter is loaded.";
}

async function showPanels(info, paths) {
  const made = [];
  if ((info.chat_template || info.attachments.length) && "/v1/chat/completions" in paths) made.push(["Chat", textPanel("chat", info, model, asksForKey)]);
  if ("/v1/completions" in paths) made.push(["Complete", textPanel("complete", info, model, asksForKey)]);
  if (SPEECH in paths) made.push(["Transcribe", speechPanel(model)]);
  if ("/v1/rerank" in paths) made.push(["Rank", rankPanel(model)]);
  if ("/classify" in paths) made.push(["Classify", classifyPanel(model)]);
  if ("/v1/embeddings" in paths) made.push(["Compare", comparePanel(model)]);
  if ("/v2/models/{name}/infer" in paths) made.push(["Tensors", await tensorsPanel(info.model, model, asksForKey)]);
  find("#panels").replaceChildren(...made.map(([, panel]) => panel));
  const choices = made.map(([name], index) => {
    const choice = element("input", { type: "radio", name: "mode", value: index });
    choice.addEventListener("change", () => show(index));
    return element("label", {}, choice, element("span", {}, name));
  });
  find("#modes").replaceChildren(find("#modes legend"), ...choices);
  find("#modes").hidden = made.length < 2;

  function show(shown) {
    for (const [index, [, panel]] of made.entries()) panel.hidden = index !== shown;
  }
  choices[0].firstChild.checked = true;
  show(0);
}

onRefusedKey(() => {
  asksForKey = true;
  keyPanel.hidden = false;
  setStatus("key");
});

async function tryToStart() {
  try {
    await start();
    keyPanel.hidden = true;
    find("#panels textarea")?.focus();
  } catch (error) {
    if (error.status !== 401) {
      setStatus("lost");
      setTimeout(tryToStart, 2000);
    }
    return error;
  }
}

find("form", keyPanel).addEventListener("submit", async (event) => {
  event.preventDefault();
  useKey(event.target.elements.key.value);
  const error = await tryToStart();
  showError(keyPanel, error?.status === 401 ? new Error("401: the service does not take this key.") : error);
  if (!error) setStatus("ready");
});

if (await tryToStart()) find("input", keyPanel).focus();
