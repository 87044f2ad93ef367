// The page: asks, shows what comes, and says what to do when nothing comes. See draw.js and wire.js for its parts.
import { answerNodes, citedNumbers, sourceItem } from "./draw.js";
import * as wire from "./wire.js";

const $ = (id) => document.getElementById(id);
const TOKEN = "orrery-token";
// Tries in a row that the page makes by itself while the service says 503; then it is for the reader to ask again.
const TRIES = 5;
const LONGEST_WAIT = 120;

let token = sessionStorage.getItem(TOKEN) ?? "";
let running = null; // the AbortController of the question being asked
let waiting = null; // the timer of a countdown
let answer = null; // the last whole answer
let cameFrom = null; // the citation that was followed last

// -- what is served, and to whom -------------------------------------------------------------------

async function introduce() {
  let told;
  try {
    told = await wire.info(token);
  } catch (error) {
    if (error.status === 401) askForToken();
    return; // what else is wrong is told when a question is asked
  }
  document.title = `Ask ${told.project}`;
  $("project").textContent = told.project;
  $("about").textContent = told.description;
  $("logged").hidden = !told.logs_questions;
  $("feedback-notice").textContent = told.feedback;
  const passages = told.counts.passages;
  const proven = told.proven ? "" : ", not yet proven by labelled questions";
  $("facts").textContent = told.generation === null ? "No generation is open yet."
    : `${(passages ?? 0).toLocaleString("en")} passages, version ${told.version}${proven}`;
  $("who").hidden = !token;
  $("who-text").textContent = `You read as ${told.name} (${told.groups.join(", ")}).`;
  $("token-form").hidden = true;
}

function askForToken() {
  $("token-why").textContent = token ? "The service does not accept this token: it may have ended, or a part of it is missing. Paste one that is valid."
    : "The service answers to those who have a token. Paste yours.";
  setToken("");
  $("token-form").hidden = false;
  $("token").value = "";
  $("token").focus();
}

function setToken(value) {
  token = value;
  $("who").hidden = true;
  if (value) sessionStorage.setItem(TOKEN, value);
  else sessionStorage.removeItem(TOKEN);
}

// -- asking ------------------------------------------------------------------------------------------

function stopAll() {
  running?.abort();
  running = null;
  clearInterval(waiting);
  waiting = null;
  removeEventListener("online", again);
  busy(false);
}

function busy(now) {
  $("go").hidden = now;
  $("stop").hidden = !now;
  $("answer").setAttribute("aria-busy", String(now));
}

function say(text) { $("state").textContent = text; }

function clear() {
  answer = null;
  cameFrom = null;
  $("problem").hidden = true;
  $("notice").hidden = true;
  $("feedback").classList.remove("ready");
  $("found").hidden = true;
  for (const id of ["answer", "print", "sources"]) $(id).replaceChildren();
}

async function ask(question, tried = 0) {
  stopAll();
  clear();
  $("result").hidden = false;
  busy(true);
  say(tried ? "Asking again …" : "Searching …");
  const mine = new AbortController();
  running = mine;
  try {
    for await (const [name, data] of wire.ask(question, token, mine.signal)) {
      if (running !== mine) return;
      show(name, data);
    }
    if (answer === null) throw new wire.Refused(0, "", null, "");
  } catch (error) {
    if (running !== mine) return; // another question, or a stop
    running = null;
    busy(false);
    failed(error, question, tried);
    return;
  }
  running = null;
  busy(false);
}

function show(name, data) {
  if (name === "sources") {
    showSources(data.sources);
    say("Reading the passages …");
  } else if (name === "token") {
    say("Writing; what is cited is checked at the end …");
    $("answer").append(data.text);
  } else if (name === "done") {
    showAnswer(data);
  } else if (name === "error") {
    throw new wire.Refused(500, data.detail, null, data.request_id);
  }
}

function showSources(sources) {
  const best = Math.max(0, ...sources.map((source) => source.score));
  const items = sources.map((source, i) => sourceItem(source, i + 1, best, () => whole(source.id)));
  $("sources").replaceChildren(...items);
  $("found").hidden = items.length === 0;
  $("result").classList.toggle("wide", items.length > 0);
  $("sources-title").textContent = "Sources";
}

function showAnswer(data) {
  answer = data;
  showSources(data.sources);
  $("answer").replaceChildren(...answerNodes(data.answer, data.sources, follow));
  const numbers = citedNumbers(data.answer);
  for (const number of numbers) $(`source-${number}`)?.classList.add("cited");
  $("notice").hidden = !data.abstained && !data.degraded;
  $("notice").className = data.degraded ? "notice attention" : "notice";
  const count = data.sources.length;
  if (data.abstained) {
    $("notice").textContent = count ? "No answer is given: nothing that was found seems to answer this question. Other words may find more."
      : "Nothing was found for this question in what you may read. Other words may find more.";
    $("sources-title").textContent = "Nearest passages";
    say(count ? "No answer; the nearest passages are shown." : "No answer, and no passages.");
  } else {
    if (data.degraded) $("notice").textContent = `${data.degraded[0].toUpperCase()}${data.degraded.slice(1)}.`;
    say(`Answered with ${count} ${count === 1 ? "source" : "sources"}.`);
  }
  // What abstaining says is said already.
  $("answer").hidden = data.abstained;
  const time = data.latency_ms < 1000 ? `${Math.round(data.latency_ms)} ms` : `${(data.latency_ms / 1000).toFixed(1)} s`;
  const wrote = data.model.startsWith("none") ? "no language model" : `written by ${data.model}`;
  $("print").textContent = `${time} · generation ${data.generation.slice(0, 12)} · ${wrote}`;
  $("print").title = `generation ${data.generation}, model: ${data.model}`;
  for (const thumb of document.querySelectorAll(".thumb")) thumb.setAttribute("aria-pressed", "false");
  $("thumb-state").textContent = "";
  $("comment-form").hidden = true;
  $("comment").value = "";
  $("feedback").classList.add("ready");
}

async function whole(id) {
  try {
    return await wire.passage(id, token);
  } catch (error) {
    const why = { 0: "The service cannot be reached.", 401: "A valid token is needed: ask again.",
      404: "The index has changed since: ask again.", 503: "The service is busy: try again in a moment." };
    throw new Error(why[error.status] ?? `This did not work (${error.status}).`);
  }
}

/** Go to a source, and show that it is the one that was meant. */
function follow(number, link) {
  const item = $(`source-${number}`);
  for (const other of document.querySelectorAll("#sources > .lit")) other.classList.remove("lit");
  item.classList.add("lit");
  cameFrom = link;
  item.focus({ preventScroll: true });
  const smooth = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  item.scrollIntoView({ block: "nearest", behavior: smooth ? "smooth" : "auto" });
}

// -- when no answer comes ----------------------------------------------------------------------------

function failed(error, question, tried) {
  say("");
  const partly = $("answer").textContent !== "" || !$("found").hidden;
  $("result").hidden = !partly;
  if (error.status === 401) { askForToken(); return; }
  const id = error.id ? ` (request ${error.id.slice(0, 8)})` : "";
  if (error.status === 503 && tried + 1 < TRIES) {
    countdown(`The service cannot answer just now: ${error.message || "it is busy"}. The question is asked again by itself.`,
      Math.min(LONGEST_WAIT, Math.max(1, error.after ?? 5)), question, tried);
    return;
  }
  problem({
    0: navigator.onLine === false ? "You are offline. The question is asked again as soon as there is a connection."
      : partly ? "The connection broke before the answer was whole. What is below has not been checked."
        : "The service cannot be reached. Look at your connection, and whether the service runs; then ask again.",
    413: "The question is too long. Ask in fewer words.",
    422: `The service does not take this question: ${error.message}.`,
    503: `The service still cannot answer: ${error.message || "it is busy"}. Ask again later${id}.`,
    500: `The service has failed${id}. Ask again; if it stays so, tell whoever runs it.`,
  }[error.status] ?? (error.status === undefined ? "This page does not understand what the service said. Reload it; there may be a newer one."
    : `The service refused (${error.status}): ${error.message || "no reason given"}${id}.`));
  if (error.status === 0 && navigator.onLine === false) addEventListener("online", again, { once: true });
}

function problem(text) {
  $("problem-text").textContent = text;
  $("countdown").textContent = "";
  $("again").textContent = "Ask again";
  $("problem").hidden = false;
}

function countdown(text, seconds, question, tried) {
  problem(text);
  $("again").textContent = "Ask now";
  $("stop").hidden = false;
  $("go").hidden = true;
  const end = Date.now() + seconds * 1000;
  const tick = () => {
    const left = Math.ceil((end - Date.now()) / 1000);
    $("countdown").textContent = left > 0 ? `in ${left} s` : "";
    if (left <= 0) ask(question, tried + 1);
  };
  waiting = setInterval(tick, 250);
  tick();
}

function again() {
  const question = $("question").value.trim();
  if (question) ask(question);
}

// -- the question's box, and its place in the address ---------------------------------------------

const asked = () => new URLSearchParams(location.hash.slice(1)).get("q")?.trim() ?? "";

function grow() {
  const box = $("question");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

/** Ask what the address says, if it says a question: a link that was shared, or a step back. */
function fromAddress() {
  const question = asked().slice(0, $("question").maxLength);
  if (!question) return;
  $("question").value = question;
  grow();
  ask(question);
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const question = $("question").value.trim();
  if (!question) return;
  // A fragment stays in the browser: no log of a server or a proxy sees the question.
  if (asked() !== question) history.pushState(null, "", `#q=${encodeURIComponent(question)}`);
  ask(question);
});
$("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
$("question").addEventListener("input", grow);
addEventListener("resize", grow);
$("stop").addEventListener("click", () => {
  stopAll();
  $("problem").hidden = true;
  say("Stopped.");
  $("question").focus();
});
$("again").addEventListener("click", again);
addEventListener("popstate", fromAddress);
addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || !cameFrom || !document.activeElement?.closest("#sources")) return;
  cameFrom.focus();
});

$("token-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  // Bytes that a header cannot carry come from a careless paste.
  const given = $("token").value.replace(/[^\x21-\x7e]/g, "");
  if (!given) return;
  setToken(given);
  await introduce();
  if (!token) return;
  $("question").focus();
  again();
});
$("forget").addEventListener("click", () => {
  stopAll();
  clear();
  $("result").hidden = true;
  say("");
  setToken("");
  introduce();
});

// -- thumbs --------------------------------------------------------------------------------------------

async function thumb(which, comment) {
  const given = answer;
  $("thumb-state").textContent = "Sending …";
  try {
    await wire.feedback({ query_id: given.query_id, thumb: which, comment }, token);
  } catch (error) {
    if (answer !== given) return false;
    const why = { 0: "The service cannot be reached.", 401: "A valid token is needed: ask again.",
      404: "This answer is too old to be judged: ask again.", 429: "That is enough for now, thank you.",
      503: "The store does not answer: try again in a moment." };
    $("thumb-state").textContent = `Not noted. ${why[error.status] ?? `(${error.status})`}`;
    return false;
  }
  if (answer === given) $("thumb-state").textContent = comment ? "Noted with your comment, thank you." : "Noted, thank you.";
  return answer === given;
}

for (const button of document.querySelectorAll(".thumb")) {
  button.addEventListener("click", async () => {
    if (!(await thumb(button.dataset.thumb, ""))) return;
    for (const other of document.querySelectorAll(".thumb")) other.setAttribute("aria-pressed", String(other === button));
    $("comment-form").hidden = false;
  });
}
$("comment-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const comment = $("comment").value.trim();
  const pressed = document.querySelector(".thumb[aria-pressed=true]");
  if (comment && pressed && await thumb(pressed.dataset.thumb, comment)) $("comment-form").hidden = true;
});

introduce();
fromAddress();
