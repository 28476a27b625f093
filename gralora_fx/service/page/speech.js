// A recording: what was said in it.

import { element, find, fromTemplate, onSubmit } from "./dom.js";
import { post } from "./service.js";

export function speechPanel(model) {
  const panel = fromTemplate("speech");
  onSubmit(panel, async () => {
    const form = new FormData();
    form.append("file", panel.elements.file.files[0]);
    form.append("model", model());
    const language = panel.elements.language.value.trim();
    if (language) form.append("language", language);
    const { text } = await post("v1/audio/transcriptions", form);
    find(".result", panel).replaceChildren(element("p", {}, text || "Nothing was said."));
  });
  return panel;
}
