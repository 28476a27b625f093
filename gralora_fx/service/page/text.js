// Prompts and chats of a decoder, answered as they come.

import { element, find, fromTemplate, number, showError } from "./dom.js";
import { KIND, imageField, pictures } from "./images.js";
import { events } from "./service.js";
import { showCommand } from "./shell.js";

const USUAL_TOKENS = 256;
const FORMS = {
  chat: {
    path: "v1/chat/completions",
    caption: "Message",
    keys: "Enter sends, Shift+Enter begins a new line",
    empty: "Say something. The model answers here, word by word.",
    body: (entries, system) => ({ messages: [...(system ? [{ role: "system", content: system }] : []), ...entries.flatMap(messages)] }),
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
  const images = entry.images.map((url) => ({ type: KIND, [KIND]: { url } }));
  const asked = { role: "user", content: images.length ? [...images, { type: "text", text: entry.prompt }] : entry.prompt };
  return entry.answer === null ? [asked] : [asked, { role: "assistant", content: entry.answer }];
}

export function textPanel(kind, info, model, asksForKey) {
  const form = FORMS[kind];
  const panel = fromTemplate("text");
  const fields = find("form", panel).elements;
  const log = find(".log", panel);
  const empty = find(".empty", panel);
  const attached = kind === "chat" && info.attachments.includes(KIND) ? imageField(panel, () => writeCommand()) : null;
  let entries = [];
  let abort = null;

  panel.classList.add(kind);
  find(".caption", panel).append(form.caption, element("span", { class: "quiet" }, form.keys));
  empty.textContent = form.empty;
  if (kind !== "chat" || !info.chat_template) find(".for-chat", panel).remove(); // a prompt is all that is answered
  const most = info.context_length ?? 2 * USUAL_TOKENS;
  fields.max_tokens.value = Math.max(1, Math.min(USUAL_TOKENS, Math.floor(most / 2)));
  if (info.context_length) fields.max_tokens.max = Math.max(1, info.context_length - 1); // a prompt has one, too

  function clear() {
    abort?.abort();
    entries = [];
    log.replaceChildren(empty);
    showError(panel, null);
    attached?.set([]);
    writeCommand();
    fields.prompt.focus();
  }

  function newEntry() {
    return { prompt: fields.prompt.value, images: attached?.urls() ?? [], answer: null };
  }

  // The entries that a request holds: without a template, a message is answered by itself.
  function withEarlier(entry) {
    return info.chat_template ? [...entries, entry] : [entry];
  }

  function setRunning(controller) {
    abort = controller;
    fields.send.textContent = controller ? "Stop" : "Send";
    fields.send.classList.toggle("stop", controller !== null);
    log.setAttribute("aria-busy", String(controller !== null));
  }

  // What a request asks for; the form of the answer as it is written, if it cannot be read.
  function request(asked, { strict }) {
    const schema = fields.schema.value.trim();
    return {
      model: model(),
      ...form.body(asked, fields.system?.value.trim()),
      stream: true,
      stream_options: { include_usage: true },
      temperature: Number(fields.temperature.value),
      max_tokens: Number(fields.max_tokens.value),
      ...(fields.seed.value === "" ? {} : { seed: Number(fields.seed.value) }),
      ...(schema ? { response_format: { type: "json_schema", json_schema: { name: "answer", schema: parsed(schema, strict) } } } : {}),
    };
  }

  // The boxes that have an effect, also while they are closed.
  function markUsed() {
    for (const field of [fields.system, fields.schema]) field?.closest("details").classList.toggle("is-set", field.value.trim() !== "");
    if (fields.schema.ariaInvalid) showSchemaError(null);
  }

  function showSchemaError(error) {
    const box = fields.schema.closest("details");
    fields.schema.ariaInvalid = error ? "true" : null;
    box.open ||= error !== null;
    showError(box, error && new Error(`This is not JSON: ${error.message}`));
    if (error) fields.schema.focus();
  }

  async function answer() {
    const controller = new AbortController();
    const entry = newEntry();
    const asked = withEarlier(entry);
    let body; // as it is now, also where fields change while it is answered
    try {
      body = request(asked, { strict: true });
    } catch (error) {
      showSchemaError(error);
      return;
    }
    const shown = exchange(entry);
    empty.remove();
    log.append(shown.item);
    log.scrollTop = log.scrollHeight;
    if (kind === "chat") fields.prompt.value = "";
    attached?.set([]);
    showError(panel, null);
    setRunning(controller);
    const started = performance.now();
    const seen = { tokens: 0, first: null, last: started, stopped: false, ending: null, usage: null };
    const pieces = []; // of the answer, written once a frame: each writing lays out the page, and tokens come faster
    let frame = null;
    const write = () => {
      frame = null;
      shown.answer.append(pieces.splice(0).join(""));
      shown.answer.normalize();
      shown.note.textContent = described(body.model, seen, started);
      log.scrollTop = log.scrollHeight;
    };
    try {
      for await (const event of events(form.path, body, controller.signal)) {
        const text = event.choices.length ? form.text(event.choices[0]) : null;
        if (event.usage) [seen.tokens, seen.usage] = [event.usage.completion_tokens, event.usage];
        seen.ending = event.choices[0]?.finish_reason ?? seen.ending;
        if (!text) continue;
        pieces.push(text);
        seen.last = performance.now();
        seen.first ??= seen.last - started;
        seen.tokens += 1;
        frame ??= requestAnimationFrame(write);
      }
    } catch (error) {
      seen.stopped = error.name === "AbortError";
      if (!seen.stopped) showError(panel, error);
      if (!seen.stopped && seen.first === null) {
        shown.item.remove(); // nothing came: the prompt is in its field again
        fields.prompt.value ||= entry.prompt;
        if (!attached?.urls().length) attached?.set(entry.images);
        if (!log.childElementCount) log.append(empty);
        return;
      }
    } finally {
      cancelAnimationFrame(frame);
      setRunning(null);
    }
    write();
    entry.answer = shown.answer.textContent;
    if (log.contains(shown.item)) entries = asked;
    writeCommand(); // of the chat as it is now
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
  panel.addEventListener("input", markUsed);
  const writeCommand = showCommand(panel, asksForKey, () => {
    const asked = withEarlier(newEntry());
    return { path: form.path, body: JSON.stringify(request(asked, { strict: false })), streams: true };
  });
  fields.prompt.addEventListener("keydown", (event) => {
    const sends = event.key === "Enter" && !event.isComposing && (kind === "chat" ? !event.shiftKey : event.ctrlKey || event.metaKey);
    if (!sends) return;
    event.preventDefault();
    if (!abort) event.target.form.requestSubmit();
  });
  return panel;
}

function parsed(schema, strict) {
  try {
    return JSON.parse(schema);
  } catch (error) {
    if (strict) throw error;
    return schema;
  }
}

function exchange({ prompt, images }) {
  const answer = element("span", { class: "answer" });
  const note = element("p", { class: "note quiet" }, "Waiting for the first token");
  const text = element("div", { class: "exchange" }, element("span", { class: "prompt" }, ...pictures(images), prompt), answer);
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
    if (seen.ending === "length") parts.push("cut at max tokens");
  } else if (!seen.stopped) parts.push("no text");
  const cached = seen.usage?.prompt_tokens_details?.cached_tokens;
  if (cached !== undefined) parts.push(`${number(cached, 0)} of ${number(seen.usage.prompt_tokens, 0)} prompt tokens cached`);
  return parts.join(" · ");
}
