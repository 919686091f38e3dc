/* Small things that every part of the page needs: finding and making elements, their place, the colours. */

import { word } from "./words.js";

export const $ = (id) => document.getElementById(id);

export function make(tag, className, parent) {
  const element = document.createElement(tag);
  element.className = className;
  parent.append(element);
  return element;
}

/* A button that says a word of words.js, in whichever language is spoken. */
export function makeButton(key, parent, press) {
  const button = make("button", key, parent);
  button.type = "button";
  button.dataset.text = key;
  button.textContent = word(key);
  button.addEventListener("click", press);
  return button;
}

/* What cannot be seen gets a sign. */
export function visible(text) {
  const signs = { " ": "␣", "\n": "⏎", "\t": "⇥" };
  const code = (character) => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
  return text.replace(/[ \n\t]/g, (character) => signs[character]).replace(/[\p{C}\p{Z}]/gu, code);
}

/* Below a rectangle, where there is no room above it, else beside it; always inside the window. */
export function placeBeside(card, { left, right, top, bottom }) {
  const { width, height } = card.getBoundingClientRect(), gap = 10;
  const lowest = innerHeight - height - gap, rightmost = innerWidth - width - gap;
  const below = bottom + gap, above = top - gap - height, is_beside = below > lowest && above < gap;
  const x = !is_beside ? left - 16 : right + gap <= rightmost ? right + gap : left - gap - width;
  const y = below <= lowest ? below : above;
  card.style.left = `${Math.max(gap, Math.min(x, rightmost))}px`;
  card.style.top = `${Math.max(gap, Math.min(y, lowest))}px`;
}

/* Shows the messages that came, once a frame: a new layout for every token would leave no time for anything else. A tab
   in the background draws no frames, but its answers go on. */
export function onceAFrame(show) {
  let waiting = [];
  const showAll = () => {
    const is_at_end = innerHeight + scrollY >= document.documentElement.scrollHeight - 80;
    const messages = waiting;
    waiting = [];
    messages.forEach(show);
    if (is_at_end) scrollDown();
  };
  return (message) => {
    if (waiting.push(message) === 1) document.hidden ? setTimeout(showAll) : requestAnimationFrame(showAll);
  };
}

export function scrollDown() {
  scrollTo(0, document.documentElement.scrollHeight);
}

const darkness = matchMedia("(prefers-color-scheme: dark)");

function useTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").dataset.text = theme === "dark" ? "light" : "dark"; // the button names what it leads to
  $("theme").textContent = word($("theme").dataset.text);
}

export function listenToTheme() {
  useTheme(darkness.matches ? "dark" : "light");
  $("theme").addEventListener("click", () => useTheme($("theme").dataset.text));
  darkness.addEventListener("change", ({ matches }) => useTheme(matches ? "dark" : "light"));
}
