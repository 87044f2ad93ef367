// Turns what the service said into elements. Text from documents and models goes in as text nodes, never as HTML.

/** Make an element; strings become text nodes. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

const CODE = /```[^\n`]*\n?([\s\S]*?)(?:```|$)|`([^`\n]*)`/g;
const CITATION = /\[(\d{1,3})\]/g;

/** Return an answer's nodes: text, code as it stands, and citations of sources as links that `follow` answers. */
export function answerNodes(text, sources, follow) {
  const nodes = [];
  let at = 0;
  for (const code of text.matchAll(CODE)) {
    nodes.push(...cited(text.slice(at, code.index), sources, follow));
    nodes.push(code[2] === undefined ? element("pre", {}, code[1].trimEnd()) : element("code", {}, code[2]));
    at = code.index + code[0].length;
  }
  return [...nodes, ...cited(text.slice(at), sources, follow)];
}

function cited(text, sources, follow) {
  const nodes = [];
  let at = 0;
  for (const found of text.matchAll(CITATION)) {
    const number = Number(found[1]);
    const source = sources[number - 1];
    if (!source) continue;
    nodes.push(text.slice(at, found.index).replace(/[ \t]+$/, "\u00a0"));
    const name = `Source ${number}: ${source.title || source.uri}`;
    const link = element("a", { class: "cite", href: `#source-${number}`, "aria-label": name, title: source.title }, `${number}`);
    link.addEventListener("click", (event) => { event.preventDefault(); follow(number, link); });
    nodes.push(link);
    at = found.index + found[0].length;
  }
  nodes.push(text.slice(at));
  return nodes.filter((node) => node !== "");
}

/** Return the numbers of the sources that an answer cites. */
export function citedNumbers(text) {
  return new Set([...text.replace(CODE, "").matchAll(CITATION)].map((found) => Number(found[1])));
}

/** Return a passage's nodes with its spans marked. Spans count code points, which JavaScript's strings do not. */
export function markedNodes(text, spans) {
  const points = Array.from(text);
  const nodes = [];
  let at = 0;
  for (const [start, end] of spans) {
    if (start < at || end <= start || end > points.length) continue;
    nodes.push(points.slice(at, start).join(""), element("mark", {}, points.slice(start, end).join("")));
    at = end;
  }
  nodes.push(points.slice(at).join(""));
  return nodes.filter((node) => node !== "");
}

/** Return the excerpt's spans as they lie in the whole passage; none when it is not a part of it. */
export function spansWithin(whole, excerpt, spans) {
  const found = whole.indexOf(excerpt);
  if (found < 0) return [];
  const before = Array.from(whole.slice(0, found)).length;
  return spans.map(([start, end]) => [start + before, end + before]);
}

/** Return where a reader finds a document: a link for http and https alone, else the text. */
function titled(source) {
  const title = source.title || source.uri;
  if (!/^https?:\/\/[^/]/i.test(source.uri)) return [title];
  return [element("a", { href: source.uri, target: "_blank", rel: "noopener noreferrer" }, title)];
}

/** Return the headings above a passage, without the first where that is the title again. */
function below(source) {
  const parts = source.heading.split(" › ");
  return (parts[0] === source.title ? parts.slice(1) : parts).join(" › ");
}

/** Return one source's list item. `more` returns the promise of its whole passage. */
export function sourceItem(source, number, best, more) {
  const item = element("li", { id: `source-${number}`, tabindex: "-1" });
  const share = best > 0 ? Math.max(0, Math.min(1, source.score / best)) : 0;
  const filled = element("span");
  filled.style.setProperty("--share", share.toFixed(3));
  const percent = `${Math.round(share * 100)} % of the best passage's score`;
  const score = element("div", { class: "score", role: "img", "aria-label": percent, title: percent }, filled);
  const title = element("h3", { id: `source-title-${number}` }, ...titled(source));
  const page = source.page === null || source.page === undefined ? "" : `page ${source.page}`;
  const shown = source.title ? source.uri : "";
  const where = [below(source), page, shown].filter(Boolean).join(" · ");
  item.setAttribute("aria-labelledby", `source-title-${number}`);
  item.append(element("div", { class: "source-head" },
    element("span", { class: "number", "aria-label": `Source ${number}` }, `${number}`), title, score,
    element("p", { class: "where small" }, where)));
  const text = element("p", { class: "excerpt" }, ...markedNodes(source.excerpt, source.highlights));
  item.append(text, element("div", { class: "row" }, ...wholeButton(source, number, text, more)));
  return item;
}

/** Return the button that puts the whole passage in the excerpt's place and back, and what it says of failures. */
function wholeButton(source, number, text, more) {
  const button = element("button", { type: "button", class: "link", "aria-expanded": "false" }, "Show the whole passage");
  button.setAttribute("aria-describedby", `source-title-${number}`);
  const state = element("span", { class: "small", role: "status" });
  let whole = null;
  button.addEventListener("click", async () => {
    const open = button.getAttribute("aria-expanded") !== "true";
    if (open && whole === null) {
      try {
        whole = (await more()).text;
      } catch (error) {
        state.textContent = error.message;
        return;
      }
    }
    state.textContent = open && whole === source.excerpt ? "This is all of it." : "";
    const [said, spans] = open
      ? [whole, spansWithin(whole, source.excerpt, source.highlights)] : [source.excerpt, source.highlights];
    text.replaceChildren(...markedNodes(said, spans));
    button.setAttribute("aria-expanded", String(open));
    button.textContent = open ? "Show the excerpt" : "Show the whole passage";
  });
  return [button, state];
}
