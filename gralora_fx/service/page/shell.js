// The same request from a shell: a curl command that is shown, and copied.

import { find } from "./dom.js";

const MOST = 100_000; // bytes of a body in a command; systems take few more

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function command({ path, streams }, body, asksForKey) {
  const lines = [`curl ${streams ? "-N " : ""}${quoted(new URL(path, document.baseURI).href)}`]; // -N: shown as it comes
  if (asksForKey) lines.push('-H "Authorization: Bearer $GRALORA_FX_API_KEY"');
  lines.push("-H 'Content-Type: application/json'", `-d ${quoted(body)}`);
  return lines.join(" \\\n  ");
}

// Fills the place that a panel has for its command; what is returned writes it anew.
// `request()` gives the request: its path, its body, and whether the answer is a stream.
export function showCommand(panel, asksForKey, request) {
  const place = find("pre", panel);
  const note = find(".copied", panel);

  function write() {
    const asked = request();
    const isLong = asked.body.length > MOST;
    find(".long", panel).hidden = !isLong;
    place.textContent = command(asked, isLong ? "@request.json" : asked.body, asksForKey);
    note.textContent = "";
  }

  find("button[name=copy]", panel).addEventListener("click", async () => {
    write();
    try {
      await navigator.clipboard.writeText(place.textContent);
      note.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(place); // browsers give the clipboard to secure pages alone
      note.textContent = "Selected: press Ctrl+C";
    }
  });
  find("#adapter select").addEventListener("change", write);
  panel.addEventListener("input", write);
  write();
  return write;
}
