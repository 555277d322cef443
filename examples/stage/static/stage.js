// What the examples' pages share: they ask the app for its state again and again, and their buttons post.

const EVERY = 500; // ms between two questions

export const $ = (id) => document.getElementById(id);

/** Put a text into an element, if it is another one: who reads the page aloud hears changes alone. */
export function put(element, text, kind = null) {
  if (element.textContent !== text) element.textContent = text;
  if (kind !== null && element.className !== kind) element.className = kind;
}

/** Say that something went wrong; null that all is well. */
export function trouble(text) {
  $("trouble").hidden = text === null;
  put($("trouble"), text ?? "");
}

/** Ask for the state, hand it to `draw`, and do so again, while the page is seen. */
export function poll(url, draw) {
  const ask = async () => {
    if (!document.hidden) {
      try {
        const response = await fetch(url);
        if (!response.ok) throw new Error(String(response.status));
        draw(await response.json());
        if ($("trouble").dataset.of === "poll") trouble(null);
      } catch (error) {
        $("trouble").dataset.of = "poll";
        trouble(error instanceof TypeError ? "The app does not answer." : `The app failed: ${error.message}.`);
      }
    }
    setTimeout(ask, EVERY);
  };
  ask();
}

/** What an answer says went wrong: a problem document, or FastAPI's list of what it could not read. */
function said({ detail, title }) {
  if (Array.isArray(detail)) return detail.map((it) => `${it.loc.at(-1)}: ${it.msg}`).join("; ");
  return detail ?? title;
}

/** Post, with a body or without: what the app answers, or null after it was said that it failed. */
export async function post(url, body = null) {
  const json = body === null ? {} : { body: JSON.stringify(body), headers: { "content-type": "application/json" } };
  try {
    const response = await fetch(url, { method: "POST", ...json });
    const found = await response.json();
    if (!response.ok) throw new Error(said(found));
    trouble(null);
    return found;
  } catch (error) {
    $("trouble").dataset.of = "post";
    trouble(error instanceof TypeError ? "The app does not answer." : error.message);
    return null;
  }
}
