// Swagger UI of the service's own description. A key, if the service has one, is that of the description and of what is tried.

import { find, showError } from "./dom.js";
import { get, useKey } from "./service.js";

const panel = find("#key");
const status = find("#status");
const isDark = matchMedia("(prefers-color-scheme: dark)");

function showScheme() {
  document.documentElement.classList.toggle("dark-mode", isDark.matches);
}

async function start(key) {
  const spec = await get("openapi.json");
  spec.servers = [{ url: new URL(".", document.baseURI).pathname.replace(/\/$/, "") || "/" }];
  panel.hidden = status.hidden = true;
  const ui = window.SwaggerUIBundle({
    spec,
    dom_id: "#api",
    validatorUrl: null, // nothing is asked of other hosts
    onComplete() {
      for (const scheme of Object.keys(spec.components?.securitySchemes ?? {})) ui.preauthorizeApiKey(scheme, key);
    },
  });
}

async function tryToStart(key = null) {
  try {
    await start(key);
  } catch (error) {
    status.hidden = error.status === 401;
    status.textContent = "Not reachable, trying again";
    panel.hidden = error.status !== 401;
    if (error.status !== 401) setTimeout(tryToStart, 2000, key);
    return error;
  }
}

isDark.addEventListener("change", showScheme);
showScheme();
find("form", panel).addEventListener("submit", async (event) => {
  event.preventDefault();
  const key = event.target.elements.key.value;
  useKey(key);
  const error = await tryToStart(key);
  showError(panel, error?.status === 401 ? new Error("401: the service does not take this key.") : error);
});

if ((await tryToStart())?.status === 401) find("input", panel).focus();
