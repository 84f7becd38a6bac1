// The chat page: conversations with the model of the server that this page came from, spoken to as OpenAI's API.
//
// In:  GET v1/models, POST v1/chat/completions as server-sent events. Out: what is seen, and what this browser keeps.
// Whatever a person, the model or the server says becomes visible through textContent alone: never HTML, never a link.

const WORDS = {
  en: {
    new: "New conversation", conversations: "Conversations", settings: "Settings", theme: "Dark or light",
    otherLanguage: "中文", log: "Answers", question: "Your question", send: "Send", stop: "Stop", copy: "Copy",
    copied: "Copied", again: "Regenerate", delete: "Delete", really: "Delete?", user: "You", assistant: "Answer",
    hint: "Enter sends, Shift+Enter begins a line, Esc stops", welcome: "What would you like to know?",
    save: "Save", cancel: "Cancel", system: "System prompt", temperature: "Temperature", top_p: "Top p",
    max_tokens: "Max tokens", seed: "Seed", key: "API key",
    empty: "What is left empty is up to the server. The key is forgotten when this tab closes.",
    stopped: "stopped", length: "cut off: the limit of tokens was reached", broken: "the rest did not come",
    error401: "The server wants an API key, and this one is missing or wrong: enter it in the settings.",
    full: "The conversation is longer than the model can read: begin a new one, or ask less. ",
    error503: "The server is busy: try again", seconds: " in {} s", period: ".",
    error: "The server refused: ", network: "The server cannot be reached: is it running, and the network up?",
    ended: "The connection ended before the answer did.", silent: "The model said nothing.",
    quota: "The browser's storage is full or closed: what is new is lost with this page. Delete old conversations.",
    unreadable: "A saved conversation cannot be read and is left as it is: ",
  },
  zh: {
    new: "新对话", conversations: "对话列表", settings: "设置", theme: "深色或浅色",
    otherLanguage: "English", log: "回答", question: "你的问题", send: "发送", stop: "停止", copy: "复制",
    copied: "已复制", again: "重新生成", delete: "删除", really: "确定删除?", user: "你", assistant: "回答",
    hint: "Enter 发送，Shift+Enter 换行，Esc 停止", welcome: "想知道什么？",
    save: "保存", cancel: "取消", system: "系统提示词", temperature: "温度", top_p: "Top p",
    max_tokens: "最多 token 数", seed: "随机种子", key: "API 密钥",
    empty: "留空的由服务器决定。密钥在关闭此标签页后即忘记。",
    stopped: "已停止", length: "已截断：达到 token 上限", broken: "后面的内容没有收到",
    error401: "服务器需要 API 密钥，目前缺失或有误：请在设置中填写。",
    full: "对话超出了模型能读的长度：请开始新对话，或缩短问题。",
    error503: "服务器繁忙：请", seconds: "在 {} 秒后", period: "重试。",
    error: "服务器拒绝了请求：", network: "无法连接服务器：它在运行吗？网络正常吗？",
    ended: "回答还没有结束，连接就断开了。", silent: "模型没有说话。",
    quota: "浏览器的存储空间已满或不可用：最新的内容会随页面关闭而丢失。请删除旧对话。",
    unreadable: "有一个保存的对话无法读取，保持原样：",
  },
};

const byId = (id) => document.getElementById(id);
const [log, box, dialog, side] = ["log", "question", "dialog", "side"].map(byId);
const form = dialog.querySelector("form");
const narrow = matchMedia("(max-width: 700px)");

// What the browser keeps ----------------------------------------------------------------------------------------------

// Every name begins with "chat": another program on the same port may keep things of its own.
const PREFIX = "chat:"; // one entry for each conversation, so that two tabs do not overwrite each other's

function kept(name, storage = "localStorage") {
  try {
    return window[storage].getItem(name);
  } catch {
    return null; // the user has closed it to pages
  }
}

function keep(name, value, storage = "localStorage") {
  try {
    if (value === null) window[storage].removeItem(name);
    else window[storage].setItem(name, value);
  } catch {
    complain(say("quota"));
  }
}

function save(chat) {
  if (chats.includes(chat)) keep(PREFIX + chat.id, JSON.stringify(chat));
}

// A conversation is {id, title, at, messages: [{role, content, note}]}; at: when it was last asked, in ms; note: a word
// of WORDS, or "".
// Returns a list of one, or of none.
function load(name) {
  const entry = kept(name);
  if (entry === null) return [];
  try {
    const { title, at, messages } = JSON.parse(entry);
    const sound = (m) => ["user", "assistant"].includes(m.role) && typeof m.content === "string";
    if (typeof title !== "string" || !messages.every(sound)) throw new TypeError(name);
    return [{ id: name.slice(PREFIX.length), title, at: Number(at) || 0, messages }];
  } catch {
    complain(say("unreadable") + name);
    return [];
  }
}

function loadAll() {
  try {
    return Object.keys(localStorage).filter((name) => name.startsWith(PREFIX)).flatMap(load);
  } catch {
    complain(say("quota"));
    return [];
  }
}

// State ---------------------------------------------------------------------------------------------------------------

let language = kept("chat.language");
if (!["en", "zh"].includes(language)) language = navigator.language.startsWith("zh") ? "zh" : "en";
let chats = [];
let current = null; // the conversation that is seen; it is in `chats` once something was asked
let model = ""; // its id; "": to be asked for
let running = null; // the AbortController of the answer that is coming

const say = (name) => (Object.hasOwn(WORDS[language], name) ? WORDS[language][name] : "");

function settings() {
  try {
    return JSON.parse(kept("chat.settings")) ?? {};
  } catch {
    return {};
  }
}

// What is seen --------------------------------------------------------------------------------------------------------

function element(tag, className, text, parent) {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  parent?.append(made);
  return made;
}

function button(name, className, parent, onclick) {
  const made = element("button", className, say(name), parent);
  made.type = "button";
  made.onclick = () => onclick(made);
  return made;
}

function complain(text) {
  byId("error").textContent = text;
}

function drawWords() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const item of document.querySelectorAll("[data-say]")) item.textContent = say(item.dataset.say);
  for (const item of document.querySelectorAll("[data-name]")) item.ariaLabel = say(item.dataset.name);
  box.placeholder = say("question");
}

function drawList() {
  chats.sort((a, b) => b.at - a.at);
  byId("chats").replaceChildren(...chats.map((chat) => {
    const row = element("li", "", "");
    const open = element("button", "open", chat.title, row);
    open.title = chat.title;
    open.ariaCurrent = chat === current ? "true" : null;
    open.onclick = () => show(chat);
    // The first press asks, the second deletes.
    const remove = button("delete", "quiet", row, () => {
      if (remove.dataset.asked) return forget(chat);
      remove.dataset.asked = "yes";
      remove.textContent = say("really");
    });
    remove.ariaLabel = `${say("delete")}: ${chat.title}`;
    remove.onblur = () => {
      delete remove.dataset.asked;
      remove.textContent = say("delete");
    };
    return row;
  }));
}

// One message; returns the element of its text.
function drawMessage(message, last) {
  const item = element("article", message.role, "", log);
  item.ariaLabel = say(message.role);
  const text = element("div", "text", message.content, item);
  text.dir = "auto";
  if (message.role === "user") return text;
  const tools = element("p", "tools", "", item);
  button("copy", "quiet", tools, (pressed) => copy(text, pressed));
  if (last) button("again", "quiet", tools, () => (answer(current), log.focus()));
  element("span", "note", say(message.note), tools);
  return text;
}

function draw() {
  log.ariaLive = "off"; // what was said before is not read out again
  log.replaceChildren();
  const messages = current.messages;
  if (!messages.length) element("p", "welcome", say("welcome"), log);
  messages.forEach((message, k) => drawMessage(message, k === messages.length - 1));
  log.scrollTop = log.scrollHeight;
  drawList();
}

function drawBusy() {
  byId("send").hidden = running !== null;
  byId("stop").hidden = running === null;
  log.ariaBusy = String(running !== null); // an answer is read out when it is whole
}

async function copy(text, pressed) {
  try {
    await navigator.clipboard.writeText(text.textContent);
  } catch {
    getSelection().selectAllChildren(text); // the other way: browsers keep the first one from pages without TLS
    document.execCommand("copy");
    getSelection().removeAllRanges();
  }
  pressed.textContent = say("copied");
  setTimeout(() => (pressed.textContent = say("copy")), 1500);
}

// Conversations -------------------------------------------------------------------------------------------------------

function show(chat) {
  stop();
  current = chat ?? { id: crypto.getRandomValues(new Uint32Array(2)).join("-"), title: "", at: 0, messages: [] };
  complain("");
  takeBack();
  fit();
  draw();
  if (narrow.matches) fold(true);
  (narrow.matches ? log : box).focus(); // on a phone the box would bring its keyboard
}

function forget(chat) {
  chats = chats.filter((other) => other !== chat);
  keep(PREFIX + chat.id, null);
  if (chat === current) show(null);
  else {
    draw();
    byId("new").focus();
  }
}

// A question that got no answer goes back into the box: in a conversation the two always alternate.
function takeBack() {
  if (current.messages.at(-1)?.role !== "user") return;
  box.value = [current.messages.pop().content, box.value].filter(Boolean).join("\n");
}

function fold(hidden) {
  side.hidden = hidden;
  byId("fold").ariaExpanded = String(!hidden);
}

function fit() {
  box.style.height = "auto"; // set from script, which a policy on styles allows
  box.style.height = `${box.scrollHeight + 2}px`;
}

// Asking --------------------------------------------------------------------------------------------------------------

class Refused extends Error {} // its message is for the person

async function request(path, options = {}) {
  const key = kept("chat.key", "sessionStorage");
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  model = ""; // it may be another server by now
  const said = (await response.json().catch(() => null))?.error;
  const wait = /^\d+$/.exec(response.headers.get("Retry-After") ?? "");
  if (response.status === 401) throw new Refused(say("error401"));
  if (response.status === 503) {
    const seconds = wait ? say("seconds").replace("{}", wait[0]) : "";
    throw new Refused(say("error503") + seconds + say("period"));
  }
  const full = said?.code === "context_length_exceeded" ? say("full") : say("error");
  throw new Refused(full + String(said?.message ?? `HTTP ${response.status}`));
}

async function askModel(signal) {
  const { data } = await (await request("v1/models", { signal })).json();
  model = String(data[0].id);
  byId("model").textContent = byId("model").title = model;
  document.title = model;
}

// The pieces of an answer; ends with [DONE], and throws where the stream does not.
async function* pieces(response) {
  let rest = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader(); // joins halves of characters
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Refused(say("ended"));
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refused(say("error") + String(event.error.message));
      yield event.choices[0] ?? {}; // none: the counts at the end
    }
  }
}

// Answers the last question of a conversation; an answer that is there gives way with the new one's first word.
async function answer(chat) {
  stop();
  const controller = (running = new AbortController());
  const before = chat.messages.at(-1).role === "user" ? chat.messages : chat.messages.slice(0, -1);
  const made = { role: "assistant", content: "", note: "broken" };
  const { system, ...sampling } = settings();
  const messages = before.map(({ role, content }) => ({ role, content }));
  if (system) messages.unshift({ role: "system", content: system });

  complain("");
  if (chat.messages !== before) log.lastElementChild.remove();
  log.ariaLive = "polite";
  drawBusy();
  const text = drawMessage(made, false);
  text.classList.add("coming");
  log.scrollTop = log.scrollHeight;
  try {
    if (!model) await askModel(controller.signal);
    const body = JSON.stringify({ model, messages, stream: true, ...sampling });
    const response = await request("v1/chat/completions", { method: "POST", body, signal: controller.signal });
    for await (const { delta, finish_reason: end } of pieces(response)) {
      if (end) made.note = end === "length" ? "length" : "";
      if (!delta?.content) continue;
      const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40; // who reads further up is left there
      made.content += delta.content;
      text.textContent = made.content;
      if (chat.messages.at(-1) !== made) chat.messages = [...before, made];
      if (chat === current && atEnd) log.scrollTop = log.scrollHeight;
    }
    if (!made.content) throw new Refused(say("silent"));
  } catch (e) {
    if (controller.signal.aborted) made.note = "stopped";
    else if (chat === current) complain(e instanceof Refused ? e.message : say("network"));
  }
  controller.abort(); // of an answer that broke off, the rest is not wanted: the server stops
  if (running === controller) running = null;
  drawBusy();
  if (made.content) save(chat);
  if (chat !== current) return;
  takeBack();
  fit();
  draw();
  log.ariaLive = "polite";
}

function stop() {
  running?.abort();
  running = null;
}

function ask() {
  if (!box.value.trim() || running) return;
  takeBack(); // of another tab
  const question = box.value.trim();
  if (!current.messages.length) current.title = [...question.replace(/\s+/g, " ")].slice(0, 60).join("");
  if (!chats.includes(current)) chats.push(current);
  current.at = Date.now();
  current.messages.push({ role: "user", content: question, note: "" });
  box.value = "";
  fit();
  save(current);
  draw();
  answer(current);
}

// What the person does ------------------------------------------------------------------------------------------------

byId("new").onclick = () => show(null);
byId("stop").onclick = () => (running?.abort(), box.focus());
byId("fold").onclick = () => fold(!side.hidden);
narrow.onchange = () => fold(narrow.matches);
log.onclick = () => narrow.matches && fold(true);
box.oninput = fit;
byId("ask").onsubmit = (event) => {
  event.preventDefault();
  ask();
  box.focus();
};

document.onkeydown = (event) => {
  // While an input method composes, Enter and Escape are its own; Safari tells the last Enter by 229 only.
  if (event.isComposing || event.keyCode === 229 || dialog.open) return;
  if (event.key === "Enter" && !event.shiftKey && event.target === box) {
    event.preventDefault();
    ask();
  } else if (event.key === "Escape") {
    if (running) running.abort();
    else if (narrow.matches) fold(true);
  }
};

byId("language").onclick = () => {
  keep("chat.language", (language = language === "zh" ? "en" : "zh"));
  drawWords();
  if (!running) draw();
  else drawList();
};

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
}
byId("theme").onclick = () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const theme = (document.documentElement.dataset.theme ?? dark) === "dark" ? "light" : "dark";
  setTheme(theme);
  keep("chat.theme", theme);
};

byId("settings").onclick = () => {
  const said = { ...settings(), key: kept("chat.key", "sessionStorage") };
  for (const field of form.querySelectorAll("[name]")) field.value = said[field.name] ?? "";
  dialog.showModal();
};
byId("cancel").onclick = () => dialog.close();
form.onsubmit = () => {
  const { key, ...said } = Object.fromEntries(new FormData(form));
  const filled = Object.entries(said).filter(([, value]) => value.trim());
  const numbers = filled.map(([name, value]) => [name, name === "system" ? value : Number(value)]);
  keep("chat.settings", JSON.stringify(Object.fromEntries(numbers)));
  keep("chat.key", key.trim(), "sessionStorage");
  hello();
};

// Another tab has written or deleted a conversation.
window.onstorage = ({ key }) => {
  const id = key?.startsWith(PREFIX) ? key.slice(PREFIX.length) : null;
  if (id === null || (running && id === current.id)) return; // what is coming here is newer
  chats = [...chats.filter((chat) => chat.id !== id), ...load(key)];
  current = chats.find((chat) => chat.id === current.id) ?? current;
  if (running) drawList();
  else draw();
};
window.onpagehide = () => running && save(current); // half an answer outlives a reload

async function hello() {
  complain("");
  await askModel().catch((e) => complain(e instanceof Refused ? e.message : say("network")));
}

setTheme(kept("chat.theme"));
drawWords();
drawBusy();
fold(narrow.matches);
chats = loadAll();
const unread = byId("error").textContent;
show(chats.reduce((a, b) => (a?.at > b.at ? a : b), null));
hello().then(() => byId("error").textContent || complain(unread));
