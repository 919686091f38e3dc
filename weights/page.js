"use strict";
/* What the page shows, and what happens when somebody types, points or presses a key.

   The model is behind an object with two methods, so that this file does not depend on where it runs:
       backend.answer(request, listener)   request {is_chat, messages, settings} as model.js takes it;
                                           listener({type: "note" | "token" | "done" | "refused" | "failed", ...})
       backend.stop()
   Whatever people or models wrote is put in place as textContent, never as markup. */

// ------------------------------------------------------------------------------------------------------------ words

const WORDS = {
  en: {
    menu: "Menu",
    new: "New",
    settings: "Settings",
    dark: "Dark",
    light: "Light",
    other_language: "中文",
    welcome: "A language model, whole in this file. It runs on your device, and what you write stays there.",
    figures: ({ weights, bits, vocabulary, window }) =>
      `${weights} weights of ${bits} bits, a vocabulary of ${vocabulary} tokens, a window of ${window} tokens.`,
    legend:
      "The less likely a token was, the more it is coloured. Point at one, or press an arrow key on an answer, " +
      "to see what else might have been said.",
    turns: "Conversation",
    ask: "Ask something",
    ask_text: "Write the beginning of a text",
    send: "Send",
    stop: "Stop",
    answer: "Answer; the arrow keys show its tokens",
    mode: "Mode",
    chat: "Conversation",
    continue: "Continue a text",
    system: "System message",
    temperature: "Temperature",
    temperature_help: "0: always the likeliest token",
    top_help: "top-k: draw from the k likeliest tokens only; top-p: from the likeliest whose probabilities sum to p",
    max_length: "Maximum length",
    max_length_help:
      "In tokens, question and answer together; empty: the model's window. Past the window, its newest three " +
      "quarters are kept.",
    all: "all",
    close: "Done",
    loading: "Reading the model…",
    answering: "Answering",
    figures_of_answer: ({ n, speed }) => (speed ? `${n} tokens, ${speed} tokens/s` : `${n} tokens`),
    stopped: "Stopped.",
    length: "Ended by the maximum length.",
    unknown_characters: ({ characters, more }) =>
      `Not in the vocabulary, read as <|unknown|>: ${characters}${more ? ` and ${more} more` : ""}`,
    forgotten: ({ n }) => `The window is full: the oldest ${n === 1 ? "turn was" : `${n} turns were`} not read.`,
    cut: ({ n, read }) => `The text has ${n} tokens; the model reads the newest ${read}.`,
    empty: "There is nothing to read.",
    too_long: ({ n, window }) =>
      `The question with its system message has ${n} tokens, the model's window ${window}: shorten it.`,
    max_length_reached: ({ n, limit }) =>
      `The question has ${n} tokens, which the maximum length ${limit} counts too: set it above ${n}.`,
    failed: ({ message }) => `The model cannot run here: ${message}`,
    space: "space",
    before_settings: "The model's own probabilities, before temperature, top-k and top-p.",
  },
  zh: {
    menu: "菜单",
    new: "新对话",
    settings: "设置",
    dark: "深色",
    light: "浅色",
    other_language: "English",
    welcome: "一个完整的语言模型，就在这个文件里。它在你的设备上运行，你写的内容不会离开这里。",
    figures: ({ weights, bits, vocabulary, window }) =>
      `${weights} 个 ${bits} 位的权重，词表 ${vocabulary} 个 token，窗口 ${window} 个 token。`,
    legend: "一个 token 越不可能，颜色越深。指向它，或在回答上按方向键，就能看到原本还可能说什么。",
    turns: "对话",
    ask: "问点什么",
    ask_text: "写下一段文字的开头",
    send: "发送",
    stop: "停止",
    answer: "回答；方向键逐个查看 token",
    mode: "模式",
    chat: "对话",
    continue: "续写",
    system: "系统消息",
    temperature: "温度",
    temperature_help: "0：总是取最可能的 token",
    top_help: "top-k：只从最可能的 k 个 token 中抽取；top-p：只从概率之和达到 p 的最可能的 token 中抽取",
    max_length: "最大长度",
    max_length_help: "以 token 计，问题和回答合计；留空：模型的窗口。超过窗口时，保留窗口中最新的四分之三。",
    all: "全部",
    close: "完成",
    loading: "正在读取模型……",
    answering: "正在回答",
    figures_of_answer: ({ n, speed }) => (speed ? `${n} 个 token，每秒 ${speed} 个` : `${n} 个 token`),
    stopped: "已停止。",
    length: "到达最大长度。",
    unknown_characters: ({ characters, more }) =>
      `不在词表中，读作 <|unknown|>：${characters}${more ? ` 等，另有 ${more} 个` : ""}`,
    forgotten: ({ n }) => `窗口已满：最早的 ${n} 轮没有读。`,
    cut: ({ n, read }) => `文字有 ${n} 个 token；模型只读最新的 ${read} 个。`,
    empty: "没有可读的内容。",
    too_long: ({ n, window }) => `问题连同系统消息有 ${n} 个 token，而模型的窗口是 ${window}：请缩短。`,
    max_length_reached: ({ n, limit }) => `问题有 ${n} 个 token，也计入最大长度 ${limit}：请把它设为大于 ${n}。`,
    failed: ({ message }) => `模型无法在这里运行：${message}`,
    space: "空格",
    before_settings: "模型自己的概率，尚未经过温度、top-k 和 top-p。",
  },
};
const said = new Map(); // element -> [key, values] of what it says, so that it can say it in the other language
let language = navigator.language.startsWith("zh") ? "zh" : "en";

function word(key, values = {}) {
  const text = WORDS[language][key];
  return typeof text === "function" ? text(values) : text;
}

function say(element, key, values) {
  said.set(element, [key, values]);
  element.textContent = key ? word(key, values) : "";
}

function number(value) {
  return value.toLocaleString(language, { maximumFractionDigits: 0 });
}

function percent(p) {
  if (p < 0.00005) return `< ${percent(0.0001)}`;
  return p.toLocaleString(language, { style: "percent", minimumFractionDigits: 2, maximumFractionDigits: 2 });
}

/* The page in a language; in the markup, data-text, data-label and data-hint are keys of words. */
function speak(chosen) {
  language = chosen;
  document.documentElement.lang = language === "zh" ? "zh-Hans" : "en";
  const each = (name, put) => document.querySelectorAll(`[data-${name}]`).forEach((e) => put(e, word(e.dataset[name])));
  each("text", (element, text) => (element.textContent = text));
  each("hint", (element, text) => (element.placeholder = text));
  each("label", (element, text) => element.setAttribute("aria-label", text));
  showTemperature();
  for (const [element, [key, values]] of said) say(element, key, values);
}

// ------------------------------------------------------------------------------------------------------ what it shows

const $ = (id) => document.getElementById(id);

function make(tag, className, parent) {
  const element = document.createElement(tag);
  element.className = className;
  parent.append(element);
  return element;
}

const darkness = matchMedia("(prefers-color-scheme: dark)");

function useTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").dataset.text = theme === "dark" ? "light" : "dark"; // the button names what it leads to
  $("theme").textContent = word($("theme").dataset.text);
}

/* What cannot be seen gets a sign. */
function visible(text) {
  const signs = { " ": "␣", "\n": "⏎", "\t": "⇥" };
  const code = (character) => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
  return text.replace(/[ \n\t]/g, (character) => signs[character]).replace(/[\p{C}\p{Z}]/gu, code);
}

/* A question and the place for its answer. */
function makeTurn(question, is_chat) {
  const turn = make("li", is_chat ? "turn waiting" : "turn waiting continued", $("turns"));
  const asked = make("div", "question", turn);
  asked.dir = "auto";
  asked.textContent = question;
  const answer = make("div", "answer", turn);
  Object.assign(answer, { dir: "auto", tabIndex: 0 });
  answer.setAttribute("role", "group");
  answer.dataset.label = "answer";
  answer.setAttribute("aria-label", word("answer"));
  return { turn, answer };
}

const drawn = new WeakMap(); // the element of a token -> what model.js says of it

/* A token as it comes; one that only continues a character, or ends the answer, has no text of its own. */
function addToken(answer, token) {
  const element = make("span", "token", answer);
  element.textContent = token.text;
  element.style.setProperty("--doubt", (1 - token.probability).toFixed(4));
  drawn.set(element, token);
}

// --------------------------------------------------------------------------------- what else might have been said

let shown = null; // the token whose alternatives are on the screen

function showOthers(element) {
  hideOthers();
  if (!element) return;
  shown = element;
  shown.classList.add("shown");
  const { name, id, probability, others } = drawn.get(element);
  $("drawn-name").textContent = visible(name);
  $("drawn-probability").textContent = percent(probability);
  $("candidates").replaceChildren();
  for (const [text, p, candidate] of others) {
    const row = make("li", candidate === id ? "is-drawn" : "", $("candidates"));
    make("span", "text", row).textContent = visible(text);
    make("span", "bar", row).style.setProperty("--p", p);
    make("span", "percent", row).textContent = percent(p);
  }
  $("others").hidden = false;
  placeBeside($("others"), element.getClientRects()[0]);
}

/* Below a rectangle, where there is no room above it, else beside it; always inside the window. */
function placeBeside(card, { left, right, top, bottom }) {
  const { width, height } = card.getBoundingClientRect(), gap = 10;
  const lowest = innerHeight - height - gap, rightmost = innerWidth - width - gap;
  const below = bottom + gap, above = top - gap - height, is_beside = below > lowest && above < gap;
  const x = !is_beside ? left - 16 : right + gap <= rightmost ? right + gap : left - gap - width;
  const y = below <= lowest ? below : above;
  card.style.left = `${Math.max(gap, Math.min(x, rightmost))}px`;
  card.style.top = `${Math.max(gap, Math.min(y, lowest))}px`;
}

function hideOthers() {
  if (shown) shown.classList.remove("shown");
  shown = null;
  $("others").hidden = true;
}

/* Arrow keys on an answer go through its tokens, and each is spoken with its probability. */
function walkTokens(event) {
  if (!event.target.matches(".answer")) return;
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 };
  const tokens = [...event.target.children], at = tokens.indexOf(shown);
  const places = { Home: 0, End: tokens.length - 1 };
  for (const [key, step] of Object.entries(steps)) places[key] = at < 0 ? 0 : at + step;
  if (!(event.key in places)) return;
  const next = tokens[places[event.key]];
  event.preventDefault();
  if (!next) return;
  next.scrollIntoView({ block: "nearest" });
  showOthers(next);
  const { name, probability, others, id } = drawn.get(next);
  const spoken = (text, p) => `${text === " " ? word("space") : visible(text)} ${percent(p)}`;
  const rest = others.filter((other) => other[2] !== id).slice(0, 3);
  $("spoken").textContent = [spoken(name, probability), ...rest.map(([text, p]) => spoken(text, p))].join(", ");
}

// ------------------------------------------------------------------------------------------------------ conversation

let turns = []; // messages so far: {role, content}
let backend = null;
let is_busy = false;

const isChat = () => document.querySelector('[name="mode"]:checked').value === "chat";

/* An empty number is null: no limit. */
function readSettings() {
  const value = (id) => ($(id).value === "" ? null : $(id).valueAsNumber);
  const [temperature, top_k, top_p, max_length] = ["temperature", "top-k", "top-p", "max-length"].map(value);
  return { temperature, top_k, top_p, max_length };
}

function setBusy(is_answering) {
  is_busy = is_answering;
  const had_focus = document.activeElement === $("send") || document.activeElement === $("stop");
  $("send").hidden = is_busy;
  $("stop").hidden = !is_busy;
  if (had_focus) $("question").focus();
  updateSend();
}

function updateSend() {
  $("send").disabled = is_busy || !backend || !$("question").value.trim();
}

function ask() {
  const question = $("question").value, is_chat = isChat();
  if (is_busy || !backend || !question.trim()) return;
  const { turn, answer } = makeTurn(question, is_chat);
  $("welcome").hidden = true;
  writeQuestion("");
  say($("notice"), "");
  $("spoken").textContent = word("answering");
  hideOthers();
  setBusy(true);
  scrollDown();

  const asked = { role: "user", content: question }, history = is_chat ? turns : [], mine = turns;
  const system = is_chat && $("system").value ? [{ role: "system", content: $("system").value }] : [];
  const show = (message) => {
    if (mine !== turns) return; // of a conversation that was cleared
    if (message.type === "note") return addNote(turn, message);
    if (message.type === "token") return addToken(answer, message);
    turn.classList.remove("waiting");
    setBusy(false);
    if (message.type === "done") {
      finish(turn, answer, message);
      if (is_chat) turns = [...history, asked, { role: "assistant", content: answer.textContent }];
    } else {
      turn.remove();
      $("welcome").hidden = $("turns").children.length > 0;
      writeQuestion(question);
      say($("notice"), message.key ?? "failed", message.values ?? message);
    }
  };
  backend.answer({ is_chat, messages: [...system, ...history, asked], settings: readSettings() }, onceAFrame(show));
}

/* Shows the messages that came, once a frame: a new layout for every token would leave no time for anything else. */
function onceAFrame(show) {
  let waiting = [];
  const showAll = () => {
    const is_at_end = innerHeight + scrollY >= document.documentElement.scrollHeight - 80;
    waiting.forEach(show);
    waiting = [];
    if (is_at_end) scrollDown();
  };
  return (message) => {
    if (waiting.push(message) === 1) requestAnimationFrame(showAll);
  };
}

/* What stands below an answer. message.text: the sign for bytes that never became a character. */
function finish(turn, answer, { reason, text, n_tokens, tokens_per_second }) {
  if (text) answer.append(text);
  if (reason !== "end") say(make("p", "below", turn), reason);
  const speed = n_tokens > 1 ? number(tokens_per_second) : "";
  say(make("p", "below figures", turn), "figures_of_answer", { n: n_tokens, speed });
  $("spoken").textContent = answer.textContent;
}

function addNote(turn, { key, values }) {
  const N_SHOWN = 40; // unknown characters that a note names
  if (key === "unknown_characters") {
    const characters = values.characters.map(visible);
    values = { characters: characters.slice(0, N_SHOWN).join(" "), more: Math.max(0, characters.length - N_SHOWN) };
  }
  say(make("p", "below note", turn), key, values);
}

function startAgain() {
  backend?.stop();
  turns = [];
  for (const element of said.keys()) if ($("turns").contains(element)) said.delete(element);
  $("turns").replaceChildren();
  $("welcome").hidden = false;
  hideOthers();
  say($("notice"), "");
  $("spoken").textContent = "";
  setBusy(false);
  $("question").focus();
}

function scrollDown() {
  scrollTo(0, document.documentElement.scrollHeight);
}

function writeQuestion(text) {
  $("question").value = text;
  fitQuestion();
}

/* The field grows with its text. */
function fitQuestion() {
  $("question").style.height = "auto";
  $("question").style.height = `${$("question").scrollHeight + 2}px`;
  updateSend();
}

// ------------------------------------------------------------------------------------------------ keys and pointers

function listen() {
  const on = (id, type, listener) => $(id).addEventListener(type, listener);
  on("composer", "submit", (event) => (event.preventDefault(), ask()));
  on("question", "input", fitQuestion);
  on("question", "keydown", (event) => {
    // while an input method composes (Chinese), Enter takes its suggestion; Safari then says 229
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    ask();
  });
  on("stop", "click", () => backend.stop());
  on("new", "click", startAgain);
  on("language", "click", () => speak(language === "en" ? "zh" : "en"));
  on("theme", "click", () => useTheme($("theme").dataset.text));
  darkness.addEventListener("change", ({ matches }) => useTheme(matches ? "dark" : "light"));

  on("settings-button", "click", () => $("settings").showModal());
  on("settings", "click", ({ target }) => target === $("settings") && $("settings").close());
  on("settings", "close", () => {
    // Escape leaves a number that is none: forget it
    for (const field of $("settings").querySelectorAll("input")) if (!field.checkValidity()) field.value = "";
  });
  on("temperature", "input", showTemperature);
  for (const choice of document.querySelectorAll('[name="mode"]')) choice.addEventListener("change", changeMode);

  const tokenAt = (event) => event.target.closest?.(".token");
  on("turns", "pointerover", (event) => event.pointerType === "mouse" && tokenAt(event) && showOthers(tokenAt(event)));
  on("turns", "pointerleave", (event) => event.pointerType === "mouse" && hideOthers());
  document.addEventListener("click", (event) => (tokenAt(event) ? showOthers(tokenAt(event)) : hideOthers()));
  on("turns", "keydown", walkTokens);
  on("turns", "focusin", ({ target: t }) => t.matches(".answer:focus-visible") && showOthers(t.firstElementChild));
  on("turns", "focusout", hideOthers);
  document.addEventListener("scroll", () => shown && placeBeside($("others"), shown.getClientRects()[0]));
  document.addEventListener("keydown", ({ key }) => {
    if (key !== "Escape" || $("settings").open) return;
    if (shown) hideOthers();
    else if (is_busy) backend.stop();
  });
}

function showTemperature() {
  const value = $("temperature").valueAsNumber;
  $("temperature-value").textContent = value.toLocaleString(language, { minimumFractionDigits: 2 });
}

function changeMode() {
  startAgain();
  $("system-field").hidden = !isChat();
  $("question").dataset.hint = $("question").dataset.label = isChat() ? "ask" : "ask_text";
  speak(language);
}

// ---------------------------------------------------------------------------------------------------------- the model

/* The model in a worker. It comes from a Blob, as a page that was opened from disk may load no other file. */
function startWorker(about) {
  const worker = new Worker(URL.createObjectURL(new Blob([$("model").textContent], { type: "text/javascript" })));
  let listener = null, asked = 0;
  const failed = (message) => {
    if (listener) listener({ type: "failed", message });
    else say($("notice"), "failed", { message });
  };
  worker.onerror = ({ message }) => failed(message);
  worker.onmessage = ({ data }) => {
    if (data.type === "failed") failed(data.message);
    else if (data.type === "ready") {
      say($("notice"), "");
      backend = {
        answer(request, to) {
          listener = to;
          worker.postMessage({ type: "answer", number: ++asked, ...request });
        },
        stop: () => worker.postMessage({ type: "stop" }),
      };
      updateSend();
    } else if (data.number === asked) listener?.(data);
  };
  worker.postMessage({ type: "load", about, weights: $("weights").textContent });
  $("weights").remove(); // the worker has it
}

function start() {
  const about = JSON.parse($("about").textContent), { config, name, n_weights, type } = about;
  document.title = $("name").textContent = name;
  const [weights, vocabulary, window] = [n_weights, config.vocab_size, config.block_size].map(number);
  say($("figures"), "figures", { weights, bits: type === "q8_0" ? 8 : 32, vocabulary, window });
  $("max-length").placeholder = config.block_size;
  say($("notice"), "loading");
  try {
    startWorker(about);
  } catch ({ message }) {
    say($("notice"), "failed", { message });
  }
  if (matchMedia("(hover: hover)").matches) $("question").focus(); // on a phone the keyboard would cover the page
}

useTheme(darkness.matches ? "dark" : "light");
listen();
speak(language);
document.addEventListener("DOMContentLoaded", start); // the weights stand below this script
