// Elements. Text is always a text node, so that no name or answer can be markup.

const SVG = "http://www.w3.org/2000/svg";

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export function drawing(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export function find(selector, root = document) {
  return root.querySelector(selector);
}

export function fromTemplate(name) {
  return find(`#${name}-panel`).content.cloneNode(true).firstElementChild;
}

export function number(value, digits = 1) {
  return value.toLocaleString("en", { maximumFractionDigits: digits });
}

// Shows an error in the place that a panel has for it, or takes the last one away.
export function showError(panel, error) {
  const place = find(".error", panel);
  place.textContent = error ? error.message : "";
  place.hidden = !error;
  if (error) place.scrollIntoView({ block: "nearest" });
}

// Bars for entries {label, value, text}, each drawn from 0 to 1.
export function bars(entries) {
  const rows = entries.map(({ label, value, text }) => {
    const fill = element("span", { class: "fill" });
    fill.style.width = `${100 * Math.min(Math.max(value, 0), 1)}%`;
    const name = element("span", { class: "name" }, label);
    const track = element("span", { class: "track", "aria-hidden": "true" }, fill);
    return element("li", {}, name, element("span", { class: "value" }, text), track);
  });
  return element("ol", { class: "bars" }, ...rows);
}

// Runs a form's work when it is sent: one at a time, its error shown.
export function onSubmit(form, work) {
  let running = false;
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (running) return;
    running = true;
    form.setAttribute("aria-busy", "true");
    showError(form, null);
    try {
      await work();
    } catch (error) {
      showError(form, error);
    } finally {
      running = false;
      form.removeAttribute("aria-busy");
    }
  });
}
