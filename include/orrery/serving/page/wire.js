// What the service says over HTTP. Addresses are relative, so that the page also works below a proxy's path.

/** A request that was not answered as wished. `status` 0: nothing came at all. */
export class Refused extends Error {
  constructor(status, detail, after, id) {
    super(detail);
    this.status = status;
    this.after = after;
    this.id = id;
  }
}

/** What went wrong on the way: no connection, or one that broke. */
const away = () => new Refused(0, "", null, "");

async function call(path, token, options = {}) {
  const headers = { ...options.headers };
  if (token) headers.Authorization = `Bearer ${token}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "same-origin", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw away();
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let body = {};
  try { body = await response.json(); } catch { /* a proxy's page: the status has to do */ }
  const after = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  return new Refused(response.status, told(body.detail), Number.isNaN(after) ? null : after, String(body.request_id ?? ""));
}

/** Return the service's `detail` as text: it is one, or a list of fields and their problems. */
function told(detail) {
  if (Array.isArray(detail)) return detail.map((one) => `${one.field}: ${one.problem}`).join("; ");
  return typeof detail === "string" ? detail : "";
}

const asJson = (body, signal) => ({
  method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal,
});

export const info = async (token) => (await call("info", token)).json();
export const passage = async (id, token) => (await call(`sources/${encodeURIComponent(id)}`, token)).json();
export const feedback = async (body, token) => (await call("feedback", token, asJson(body))).json();

/** Ask, and give each event of the answer as [name, data]. */
export async function* ask(question, token, signal) {
  const response = await call("query", token, asJson({ question, stream: true }, signal));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw away();
    }
    if (piece.done) return;
    text += piece.value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const event = read(part);
      if (event) yield event;
    }
  }
}

/** Return [name, data] of one event; nothing for a comment. */
function read(part) {
  let name = "message";
  const data = [];
  for (const line of part.split("\n")) {
    if (line.startsWith("event:")) name = line.slice(6).trim();
    if (line.startsWith("data:")) data.push(line.slice(5));
  }
  return data.length ? [name, JSON.parse(data.join("\n"))] : null;
}
