// Prompts and chats of a decoder, answered as they come.

import { element, find, fromTemplate, number, showError } from "./dom.js";
import { events } from "./service.js";

const USUAL_TOKENS = 256;
const FORMS = {
  chat: {
    path: "v1/chat/completions",
    caption: "Message",
    keys: "Enter sends, Shift+Enter begins a new line",
    empty: "Say something. The model answers here, word by word.",
    body: (entries) => ({ messages: entries.flatMap(messages) }),
    text: (choice) => choice.delta.content,
  },
  complete: {
    path: "v1/completions",
    caption: "Prompt",
    keys: "Ctrl+Enter sends",
    empty: "Give the model the beginning of a text. It goes on here, word by word.",
    body: (entries) => ({ prompt: entries.at(-1).prompt }),
    text: (choice) => choice.text,
  },
};

function messages(entry) {
  const asked = { role: "user", content: entry.prompt };
  return entry.answer === null ? [asked] : [asked, { role: "assistant", content: entry.answer }];
}

export function textPanel(kind, info, model) {
  const form = FORMS[kind];
  const panel = fromTemplate("text");
  const fields = find("form", panel).elements;
  const log = find(".log", panel);
  const empty = find(".empty", panel);
  let entries = [];
  let abort = null;

  panel.classList.add(kind);
  find(".caption", panel).append(form.caption, element("span", { class: "quiet" }, form.keys));
  empty.textContent = form.empty;
  const most = info.context_length ?? 2 * USUAL_TOKENS;
  fields.max_tokens.value = Math.max(1, Math.min(USUAL_TOKENS, Math.floor(most / 2)));
  if (info.context_length) fields.max_tokens.max = Math.max(1, info.context_length - 1); // a prompt has one, too

  function clear() {
    abort?.abort();
    entries = [];
    log.replaceChildren(empty);
    showError(panel, null);
    fields.prompt.focus();
  }

  function setRunning(controller) {
    abort = controller;
    fields.send.textContent = controller ? "Stop" : "Send";
    fields.send.classList.toggle("stop", controller !== null);
    log.setAttribute("aria-busy", String(controller !== null));
  }

  async function answer() {
    const controller = new AbortController();
    const entry = { prompt: fields.prompt.value, answer: null };
    const asked = [...entries, entry];
    const shown = newEntry(entry.prompt);
    empty.remove();
    log.append(shown.item);
    log.scrollTop = log.scrollHeight;
    if (kind === "chat") fields.prompt.value = "";
    showError(panel, null);
    setRunning(controller);
    const started = performance.now();
    const seen = { tokens: 0, first: null, last: started, stopped: false };
    const body = {
      model: model(),
      ...form.body(asked),
      stream: true,
      stream_options: { include_usage: true },
      temperature: Number(fields.temperature.value),
      max_tokens: Number(fields.max_tokens.value),
      ...(fields.seed.value === "" ? {} : { seed: Number(fields.seed.value) }),
    };
    try {
      for await (const event of events(form.path, body, controller.signal)) {
        const text = event.choices.length ? form.text(event.choices[0]) : null;
        if (event.usage) seen.tokens = event.usage.completion_tokens;
        if (!text) continue;
        shown.answer.append(text);
        seen.last = performance.now();
        seen.first ??= seen.last - started;
        seen.tokens += 1;
        shown.note.textContent = described(body.model, seen, started);
        log.scrollTop = log.scrollHeight;
      }
    } catch (error) {
      seen.stopped = error.name === "AbortError";
      if (!seen.stopped) showError(panel, error);
      if (!seen.stopped && seen.first === null) {
        shown.item.remove(); // nothing came: the prompt is in its field again
        fields.prompt.value ||= entry.prompt;
        if (!log.childElementCount) log.append(empty);
        return;
      }
    } finally {
      setRunning(null);
    }
    shown.note.textContent = described(body.model, seen, started);
    entry.answer = shown.answer.textContent;
    if (log.contains(shown.item)) entries = asked;
  }

  find("form", panel).addEventListener("submit", (event) => {
    event.preventDefault();
    if (!abort) answer();
  });
  fields.send.addEventListener("click", (event) => {
    if (!abort) return;
    event.preventDefault(); // stops whatever is in the fields
    abort.abort();
  });
  fields.clear.addEventListener("click", clear);
  fields.prompt.addEventListener("keydown", (event) => {
    const sends = event.key === "Enter" && !event.isComposing && (kind === "chat" ? !event.shiftKey : event.ctrlKey || event.metaKey);
    if (!sends) return;
    event.preventDefault();
    if (!abort) event.target.form.requestSubmit();
  });
  return panel;
}

function newEntry(prompt) {
  const answer = element("span", { class: "answer" });
  const note = element("p", { class: "note quiet" }, "Waiting for the first token");
  const text = element("div", { class: "exchange" }, element("span", { class: "prompt" }, prompt), answer);
  return { item: element("article", {}, text, note), answer, note };
}

// The model, how many tokens it made, and how fast.
function described(model, seen, started) {
  const parts = [model];
  if (seen.stopped) parts.push("stopped");
  if (seen.first !== null) {
    const seconds = (seen.last - started - seen.first) / 1000;
    const speed = seen.tokens > 1 && seconds > 0 ? `${number((seen.tokens - 1) / seconds)} tokens/s` : null;
    parts.push(`${seen.tokens} ${seen.tokens === 1 ? "token" : "tokens"}`);
    if (speed) parts.push(speed);
    parts.push(`first after ${number(seen.first, 0)} ms`);
  } else if (!seen.stopped) parts.push("no text");
  return parts.join(" · ");
}
