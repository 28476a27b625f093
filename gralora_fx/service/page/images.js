// The images of a message: chosen, dropped or pasted, shown, and given as data: URLs, the form in which a chat takes them.

import { element, find, showError } from "./dom.js";

export const KIND = "image_url"; // the type of a part of a chat that holds one

function opened(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}

export function pictures(urls) {
  return urls.map((url, index) => element("img", { src: url, alt: `Image ${index + 1}` }));
}

// The field of a panel; `changed()` is called when its images are others.
export function imageField(panel, changed) {
  const field = find("input[name=images]", panel);
  const list = find(".attached", panel);
  let urls = [];

  function set(now) {
    urls = now;
    list.replaceChildren(
      ...pictures(urls).map((picture, index) => {
        const remove = element("button", { type: "button", "aria-label": `Remove image ${index + 1}` }, "×");
        remove.addEventListener("click", () => set(urls.filter((_, other) => other !== index)));
        return element("li", {}, picture, remove);
      }),
    );
    changed();
  }

  async function add(files) {
    showError(panel, null);
    try {
      const other = files.find((file) => !file.type.startsWith("image/"));
      if (other) throw new Error(`${other.name} is not an image.`);
      const more = await Promise.all(files.map(opened));
      set([...urls, ...more]);
    } catch (error) {
      showError(panel, error);
    }
  }

  // Takes the files of a paste or a drop, and leaves all else to the browser.
  function take(event, data) {
    const files = [...(data?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    panel.classList.remove("is-over");
    add(files);
  }

  field.addEventListener("change", () => {
    add([...field.files]);
    field.value = ""; // the same file may be chosen again
  });
  panel.addEventListener("paste", (event) => take(event, event.clipboardData));
  panel.addEventListener("drop", (event) => take(event, event.dataTransfer));
  panel.addEventListener("dragover", (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    panel.classList.add("is-over");
  });
  panel.addEventListener("dragleave", (event) => {
    if (!panel.contains(event.relatedTarget)) panel.classList.remove("is-over");
  });
  find(".images", panel).hidden = false;
  return { set, urls: () => urls };
}
