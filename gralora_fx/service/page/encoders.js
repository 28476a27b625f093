// Texts through an encoder: labels, similarities, relevance.

import { bars, element, find, fromTemplate, number, onSubmit } from "./dom.js";
import { post } from "./service.js";

const MOST_LABELS = 12;

export function classifyPanel(model) {
  const panel = fromTemplate("classify");
  onSubmit(panel, async () => {
    const answer = await post("classify", { model: model(), input: [panel.elements.text.value] });
    const { labels, probs } = answer.data[0];
    const order = probs.map((_, index) => index).sort((left, right) => probs[right] - probs[left]);
    const entries = order
      .slice(0, MOST_LABELS)
      .map((index) => ({ label: labels[index], value: probs[index], text: number(probs[index], 3) }));
    const left = order.length - entries.length;
    const more = left > 0 ? [element("p", { class: "quiet" }, `and ${left} more labels`)] : [];
    find(".result", panel).replaceChildren(bars(entries), ...more);
  });
  return panel;
}

export function comparePanel(model) {
  const panel = fromTemplate("compare");
  const others = find(".others", panel);

  function add() {
    const field = element("textarea", { name: "other", rows: "2", required: "" });
    const remove = element("button", { type: "button" }, "Remove");
    const count = others.querySelectorAll("textarea").length + 1;
    field.setAttribute("aria-label", `Text ${count} to compare with`);
    const row = element("div", { class: "other" }, field, remove);
    remove.addEventListener("click", () => {
      row.remove();
      panel.elements.add.focus();
      update();
    });
    others.append(row);
    update();
    return field;
  }

  function update() {
    const removers = others.querySelectorAll("button");
    for (const button of removers) button.hidden = removers.length === 1;
  }

  add();
  add();
  panel.elements.add.addEventListener("click", () => add().focus());
  onSubmit(panel, async () => {
    const texts = [...others.querySelectorAll("textarea")].map((field) => field.value);
    const answer = await post("v1/embeddings", { model: model(), input: [panel.elements.first.value, ...texts] });
    const [first, ...rest] = answer.data.map((entry) => entry.embedding);
    const entries = rest.map((vector, index) => ({ label: texts[index], value: cosine(first, vector) }));
    entries.sort((left, right) => right.value - left.value);
    for (const entry of entries) entry.text = number(entry.value, 3);
    find(".result", panel).replaceChildren(bars(entries));
  });
  return panel;
}

function cosine(left, right) {
  const dot = (a, b) => a.reduce((sum, value, index) => sum + value * b[index], 0);
  return dot(left, right) / Math.sqrt(dot(left, left) * dot(right, right));
}

export function rankPanel(model) {
  const panel = fromTemplate("rank");
  onSubmit(panel, async () => {
    const documents = panel.elements.documents.value.split("\n").filter((line) => line.trim());
    const answer = await post("v1/rerank", { model: model(), query: panel.elements.query.value, documents });
    const scores = answer.results.map((result) => result.relevance_score);
    const [least, most] = [Math.min(0, ...scores), Math.max(1, ...scores)];
    const entries = answer.results.map((result) => ({
      label: documents[result.index],
      value: (result.relevance_score - least) / (most - least),
      text: number(result.relevance_score, 3),
    }));
    find(".result", panel).replaceChildren(bars(entries));
  });
  return panel;
}
