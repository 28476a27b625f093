// A model of tensors: what it takes and gives, a request to edit and run, and the same as a command.

import { element, find, fromTemplate, number, onSubmit, showError } from "./dom.js";
import { get, post } from "./service.js";
import { showCommand } from "./shell.js";

const SHOWN = 8; // values of an output

export async function tensorsPanel(base, model, asksForKey) {
  const panel = fromTemplate("tensors");
  const field = panel.elements.request;
  const { inputs, outputs } = await get(`v2/models/${encodeURIComponent(base)}`);
  find(".tables", panel).append(table("Inputs", inputs), table("Outputs", outputs));
  await fill(panel, field, base);

  function path() {
    return `v2/models/${encodeURIComponent(model())}/infer`;
  }

  showCommand(panel, asksForKey, () => ({ path: path(), body: field.value.replaceAll("\n", " ") }));
  onSubmit(panel, async () => {
    const started = performance.now();
    const answer = await post(path(), field.value);
    const took = element("p", { class: "quiet" }, `${number(performance.now() - started)} ms`);
    find(".result", panel).replaceChildren(...answer.outputs.map(output), took);
  });
  return panel;
}

function table(title, tensors) {
  const head = element("tr", {}, ...["Name", "Type", "Shape"].map((name) => element("th", { scope: "col" }, name)));
  const rows = tensors.map(({ name, datatype, shape }) =>
    element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, datatype), element("td", {}, written(shape))),
  );
  return element("table", {}, element("caption", {}, title), element("thead", {}, head), element("tbody", {}, ...rows));
}

function written(shape) {
  return `[${shape.map((size) => (size < 0 ? "any" : size)).join(", ")}]`;
}

// A request that the model takes as it is, which the service knows.
async function fill(panel, field, base) {
  try {
    const { inputs } = await get(`v2/models/${encodeURIComponent(base)}/example`);
    field.value = `{"inputs": [\n${inputs.map((tensor) => JSON.stringify(tensor)).join(",\n")}\n]}`;
    field.setSelectionRange(0, 0); // its beginning is shown
  } catch (error) {
    if (error.status === 401 || error.status === 0) throw error;
    showError(panel, error); // no example is known: the tables say what to give
  }
}

function output({ name, datatype, shape, data }) {
  const more = data.length > SHOWN ? ` … ${number(data.length - SHOWN, 0)} more` : "";
  const values = data.slice(0, SHOWN).map((value) => (typeof value === "number" ? number(value, 4) : value));
  const title = element("p", { class: "quiet" }, `${name} · ${datatype} ${written(shape)}`);
  return element("div", { class: "output" }, title, element("code", {}, values.join("  ") + more));
}
