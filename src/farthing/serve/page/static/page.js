// Conversations, kept in this browser: one entry of localStorage each, so that a damaged one loses no other.
// Gradio draws what is said; this module keeps it, lists it, searches it and gives it away as a file.

const PREFIX = "farthing:conversation:";
const THEME = "farthing:theme";
const FRAME = `
  <div class="row">
    <button class="new" title="New conversation (Ctrl+Shift+O)">New conversation</button>
    <button class="theme" title="Light or dark" aria-label="Light or dark">◐</button>
  </div>
  <input class="search" type="search" placeholder="Search (Ctrl+K)" aria-label="Search the conversations">
  <nav aria-label="Conversations"><ul></ul></nav>
  <p class="status" role="status"></p>
  <p class="heard sr-only" role="status"></p>
  <div class="row">
    <button class="markdown" title="This conversation as Markdown">Save as text</button>
    <button class="export" title="All conversations as JSON">Export all</button>
    <button class="import" title="Add conversations from an exported file">Import</button>
  </div>
  <input class="file" type="file" accept="application/json" hidden>`;

let current = null; // the id of the conversation on the page; null is a new one
let unkept = null; // what is on the page, where that is more than what is kept
let frame; // the element of the list and its buttons
let open; // has Gradio ask for what `opened` returns

const newId = () => `${Date.now()}-${Math.random().toString(36).slice(2, 10)}`;
const find = (selector) => frame.querySelector(selector);
const say = (words) => (find(".status").textContent = words);

// ---- the store ----

const plain = (part) => part?.type === "text" && typeof part.text === "string";
const spoken = (messages) => Array.isArray(messages) && messages.every((message) => message?.content?.every?.(plain));
const whole = (kept) => spoken(kept?.left) && spoken(kept?.right) && kept.left.length > 0;

function read(id) {
  try {
    const kept = JSON.parse(localStorage.getItem(PREFIX + id));
    return whole(kept) ? kept : null;
  } catch {
    return null;
  }
}

function write(id, kept) {
  try {
    localStorage.setItem(PREFIX + id, JSON.stringify(kept));
  } catch {
    say("This browser's storage is full: export the conversations, then delete some.");
  }
}

function all() {
  return Object.keys(localStorage)
    .filter((key) => key.startsWith(PREFIX))
    .map((key) => key.slice(PREFIX.length))
    .map((id) => ({ id, ...read(id) }))
    .filter(whole)
    .sort((one, other) => (one.when < other.when ? 1 : -1));
}

// The server's `answers.drawn` writes $x$ as \({}x\).
function text({ content }) {
  const said = content.map((part) => part.text).join("");
  return said.replace(/\\\(\{\}(.*?)\\\)/g, "$$$1$$");
}

const kind = ({ role, metadata }) => (role === "user" ? "question" : (metadata?.id ?? "answer"));
const title = (kept) => text(kept.left[0]).replace(/\s+/g, " ").trim().slice(0, 80);

function found(query) {
  const words = query.toLowerCase().split(/\s+/);
  return all().filter((kept) => {
    const said = [...kept.left, ...kept.right].map(text).join("\n").toLowerCase();
    return words.every((word) => said.includes(word));
  });
}

// ---- what Gradio's listeners call; the order of values is that of `Parts.kept` ----

export function save(...values) {
  unkept = null;
  keep(...values);
  find(".heard").textContent = stopButton() ? "" : "The answer is complete.";
}

// While an answer comes: a question is kept at once, what is said of its answer each second, its end by `save`.
export function changed(left, ...values) {
  const kept = read(current);
  const said = (messages) => JSON.stringify(messages.map(text));
  if (!left.length || (kept && said(left) === said(kept.left))) return;
  unkept = [left, ...values];
  const fresh = !kept || answers(left).length !== answers(kept.left).length;
  if (fresh) {
    loose.clear();
    find(".heard").textContent = "";
  }
  if (fresh || Date.now() - new Date(kept.when) > 1000) keep(...unkept);
}

function keep(left, right, leftModel, rightModel, compare, system, temperature, length) {
  if (!left.length) return;
  current ??= newId();
  const models = [leftModel, rightModel];
  write(current, { when: new Date().toISOString(), models, compare, system, temperature, length, left, right });
  show();
}

export function opened(models, ...values) {
  const kept = read(current);
  if (!kept) return [[], [], ...values.slice(2)]; // a new conversation, with the settings that were
  const served = kept.models.map((model, side) => (models.includes(model) ? model : values[2 + side]));
  return [kept.left, kept.right, ...served, kept.compare, kept.system, kept.temperature, kept.length];
}

// ---- the list ----

function show() {
  history.replaceState(null, "", current ? `#${current}` : location.pathname + location.search);
  const query = find(".search").value.trim();
  const kept = found(query);
  find("ul").replaceChildren(...kept.map(item));
  say(kept.length || !query ? "" : `Nothing says “${query}”.`);
}

function item(kept) {
  const line = document.createElement("li");
  const name = button("open", title(kept), () => go(kept.id));
  name.title = `${title(kept)}\n${new Date(kept.when).toLocaleString()}`;
  if (kept.id === current) name.setAttribute("aria-current", "true");
  const remove = button("delete", "×", () => {
    if (!confirm(`Delete “${title(kept)}”?`)) return;
    localStorage.removeItem(PREFIX + kept.id);
    if (kept.id === current) go(null);
    else show();
  });
  remove.setAttribute("aria-label", `Delete “${title(kept)}”`);
  line.append(name, remove);
  return line;
}

function button(name, words, press) {
  const made = document.createElement("button");
  made.className = name;
  made.textContent = words;
  made.addEventListener("click", press);
  return made;
}

// ---- moving about ----

const stopButton = () => document.querySelector("#prompt .stop-button");
const narrow = () => matchMedia("(max-width: 768px)").matches;
const sidebar = () => document.querySelector("#side");

async function go(id) {
  stopButton()?.click(); // an answer still coming belongs to the conversation that is left
  for (let tries = 0; (stopButton() || unkept) && tries < 100; tries++)
    await new Promise((resolve) => setTimeout(resolve, 50));
  current = id;
  open();
  show();
  if (narrow()) toggle(false);
  document.querySelector("#prompt textarea")?.focus();
}

function toggle(wanted) {
  if (sidebar()?.classList.contains("open") !== wanted) document.querySelector(".toggle-button")?.click();
}

function keys(event) {
  const control = event.ctrlKey || event.metaKey;
  if (control && event.key === "k") {
    toggle(true);
    find(".search").focus();
  } else if (control && event.shiftKey && event.key.toLowerCase() === "o") go(null);
  else if (event.key === "Escape" && stopButton()) stopButton().click();
  else return;
  event.preventDefault();
}

function theme(dark) {
  document.body.classList.toggle("dark", dark);
  localStorage.setItem(THEME, dark ? "dark" : "light");
}

// Gradio's own copying would take the thinking and the figures too.
function copy(event) {
  const pressed = event.target.closest(".talk .message-buttons-left [title='Copy message']");
  const talk = pressed?.closest(".talk");
  if (!talk || !navigator.clipboard) return;
  const before = (question) => question.compareDocumentPosition(pressed) & Node.DOCUMENT_POSITION_FOLLOWING;
  const turn = [...talk.querySelectorAll("[data-testid=user]")].filter(before).length - 1;
  const answer = answers(read(current)?.[talk.id] ?? [])[turn];
  if (!answer) return;
  event.stopPropagation();
  navigator.clipboard.writeText(answer).then(() => say("Copied."));
}

function answers(messages) {
  const said = [];
  for (const message of messages) {
    if (kind(message) === "question") said.push("");
    else if (kind(message) === "answer") said[said.length - 1] += text(message);
  }
  return said;
}

// ---- keeping to the end of an answer that grows, unless the reader scrolled up ----

const loose = new Set(); // the columns that were scrolled up
const seen = new WeakMap();

function scrolled({ target }) {
  if (!target.matches?.(".talk [role=log]")) return;
  if (target.scrollTop < (seen.get(target) ?? 0)) loose.add(target);
  if (target.scrollHeight - target.clientHeight - target.scrollTop < 40) loose.delete(target);
  seen.set(target, target.scrollTop);
}

function follow() {
  for (const log of document.querySelectorAll(".talk [role=log]")) {
    if (!loose.has(log)) log.scrollTop = log.scrollHeight;
  }
}

// ---- what Gradio leaves out ----

// For screen readers: names for buttons and columns, and quiet while each token comes.
function describe() {
  document.querySelector("#prompt .submit-button")?.setAttribute("aria-label", "Send");
  stopButton()?.setAttribute("aria-label", "Stop");
  for (const talk of document.querySelectorAll(".talk")) {
    const log = talk.querySelector("[role=log]");
    log?.setAttribute("aria-live", "off");
    log?.setAttribute("aria-label", `Conversation in the ${talk.id} column`);
  }
}

// ---- files ----

function download(name, type, content) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function markdown(kept) {
  const side = (messages, model) =>
    messages
      .filter((message) => !["thinking", "error"].includes(kind(message)))
      .map((message) => {
        if (kind(message) === "figures") return `*${message.metadata.title}*`;
        return `**${kind(message) === "question" ? "You" : model}:**\n\n${text(message)}`;
      })
      .join("\n\n");
  const sides = [side(kept.left, kept.models[0]), kept.right.length ? side(kept.right, kept.models[1]) : ""];
  return `# ${title(kept)}\n\n${sides.filter(Boolean).join("\n\n---\n\n")}\n`;
}

async function take(file) {
  try {
    const conversations = JSON.parse(await file.text()).conversations.filter(whole);
    if (!conversations.length) throw new Error("nothing to take");
    const newer = conversations.filter(({ id, when }) => !(read(id)?.when >= when));
    for (const { id, ...kept } of newer) write(id ?? newId(), kept);
    show();
    say(`${newer.length} of ${conversations.length} added; the others are here.`);
  } catch {
    say(`${file.name} holds no conversations: choose a file that this page exported.`);
  }
}

export function start(element, trigger) {
  [frame, open] = [element, trigger];
  frame.innerHTML = FRAME;
  if (localStorage.getItem(THEME)) theme(localStorage.getItem(THEME) === "dark");
  find(".new").addEventListener("click", () => go(null));
  find(".theme").addEventListener("click", () => theme(!document.body.classList.contains("dark")));
  find(".search").addEventListener("input", show);
  find(".markdown").addEventListener("click", () => {
    const kept = read(current);
    if (kept) download("conversation.md", "text/markdown", markdown(kept));
    else say("There is nothing to save yet.");
  });
  find(".export").addEventListener("click", () =>
    download("conversations.json", "application/json", JSON.stringify({ conversations: all() }, null, 1)),
  );
  find(".import").addEventListener("click", () => find(".file").click());
  find(".file").addEventListener("change", async ({ target }) => {
    await take(target.files[0]);
    target.value = ""; // so that the same file can be chosen again
  });
  document.addEventListener("keydown", keys);
  document.addEventListener("click", copy, true);
  document.addEventListener("scroll", scrolled, true);
  addEventListener("storage", show); // another tab's doing
  addEventListener("pagehide", () => unkept && keep(...unkept));
  const drawn = new MutationObserver(() => requestAnimationFrame(() => (describe(), follow())));
  drawn.observe(document.querySelector("gradio-app"), { childList: true, subtree: true });
  current = read(location.hash.slice(1)) ? location.hash.slice(1) : null;
  if (current) setTimeout(open);
  if (narrow()) setTimeout(() => toggle(false));
  show();
}
