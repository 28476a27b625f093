// Requests to the service. The key is kept here, in memory alone.

let key = null;
let refused = () => {};

export class ServiceError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function useKey(given) {
  key = given;
}

export function onRefusedKey(listener) {
  refused = listener;
}

async function send(path, body, signal) {
  const headers = {};
  if (key !== null) headers.Authorization = `Bearer ${key}`;
  const isWhole = typeof body === "string" || body === undefined || body instanceof FormData; // a form says what it is
  if (body !== undefined && !(body instanceof FormData)) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: isWhole ? body : JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError(0, "The service cannot be reached. Is it running?");
  }
  if (!response.ok) {
    const error = new ServiceError(response.status, `${response.status}: ${await reason(response)}`);
    if (response.status === 401) refused(error);
    throw error;
  }
  return response;
}

// What a response says is wrong: OpenAI's object, or the Open Inference Protocol's text.
async function reason(response) {
  const text = await response.text();
  try {
    const { error } = JSON.parse(text);
    return error.message ?? error;
  } catch {
    return text || response.statusText;
  }
}

export async function get(path) {
  return (await send(path)).json();
}

export async function getText(path) {
  return (await send(path)).text();
}

export async function post(path, body, signal) {
  return (await send(path, body, signal)).json();
}

function brokenOff(error) {
  if (error?.name === "AbortError") throw error;
  throw new ServiceError(0, "The answer broke off: the service has stopped, or cannot be reached.");
}

// The objects of a stream of server-sent events, up to [DONE].
export async function* events(path, body, signal) {
  const response = await send(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read().catch(brokenOff);
    if (done) brokenOff();
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ServiceError(500, event.error.message);
      yield event;
    }
  }
}
