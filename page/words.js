/* What the page says, in English and Chinese, and how numbers are written. The page of serve.py adds its own words. */

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
      "to see what else might have been said; press it to go on with that.",
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
    press_one: "Press one, and another answer goes on from here with it.",
    decimal: ({ value }) => value.toLocaleString("en", { minimumFractionDigits: 2 }),
    edit: "Edit",
    cancel: "Cancel",
    copy: "Copy",
    copied: "Copied.",
    again: "Again",
    previous: "Previous",
    next: "Next",
    place: ({ n, of }) => `${n} of ${of}`,
    branched: "The answer goes on from here",
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
    legend: "一个 token 越不可能，颜色越深。指向它，或在回答上按方向键，就能看到原本还可能说什么；点击它，可以换一个接着写。",
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
    press_one: "点选其中一个，另一个回答就从这里接着它往下写。",
    decimal: ({ value }) => value.toLocaleString("zh", { minimumFractionDigits: 2 }),
    edit: "修改",
    cancel: "取消",
    copy: "复制",
    copied: "已复制。",
    again: "重答",
    previous: "上一个",
    next: "下一个",
    place: ({ n, of }) => `第 ${n} 个，共 ${of} 个`,
    branched: "回答从这里继续",
  },
};

/* Words of one page alone; those of the same name take the place of the shared ones. */
export function addWords(more) {
  for (const name of Object.keys(WORDS)) Object.assign(WORDS[name], more[name]);
}

const said = new Map(); // element -> [key, values] of what it says, so that it can say it in the other language
export let language = navigator.language.startsWith("zh") ? "zh" : "en";

export function word(key, values = {}) {
  const text = WORDS[language][key];
  return typeof text === "function" ? text(values) : text;
}

export function say(element, key, values) {
  said.set(element, [key, values]);
  element.textContent = key ? word(key, values) : "";
}

export function number(value) {
  return value.toLocaleString(language, { maximumFractionDigits: 0 });
}

export function percent(p) {
  if (p < 0.00005) return `< ${percent(0.0001)}`;
  return p.toLocaleString(language, { style: "percent", minimumFractionDigits: 2, maximumFractionDigits: 2 });
}

/* The page in a language; in the markup, data-text, data-label and data-hint are keys of words. */
export function speak(chosen) {
  language = chosen;
  document.documentElement.lang = language === "zh" ? "zh-Hans" : "en";
  const each = (name, put) => document.querySelectorAll(`[data-${name}]`).forEach((e) => put(e, word(e.dataset[name])));
  each("text", (element, text) => (element.textContent = text));
  each("hint", (element, text) => (element.placeholder = text));
  each("label", (element, text) => element.setAttribute("aria-label", text));
  for (const [element, [key, values]] of said) {
    if (element.isConnected) say(element, key, values);
    else said.delete(element); // of a turn that is no longer shown
  }
}

export function listenToLanguage() {
  document.getElementById("language").addEventListener("click", () => speak(language === "en" ? "zh" : "en"));
}
