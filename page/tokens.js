/* The tokens of an answer: coloured by how unlikely each was, with a card of what else might have been said.

   A token is {text, name, id, probability, others}; others are the ten likeliest, [name, probability, id, text], the text
   if it is not the name, null where the answer cannot go on with it. The pointer and the arrow keys show the card; a
   press, or Enter, holds it, and then one of the ten can be pressed. */

import { $, make, placeBeside, visible } from "./elements.js";
import { percent, word } from "./words.js";

const tokens = new WeakMap(); // the element of a token -> the token
let shown = null; // the element whose card is on the screen
let is_held = false;
let goOn = null; // what a press on one of the ten does: goOn(answer's element, place of the token, one of its others)
let shownToken = () => {}; // told which token is shown, to add to the card

/* A token as it comes; one that only continues a character, or ends the answer, has no text of its own. */
export function addToken(answer, token) {
  const element = make("span", "token", answer);
  element.textContent = token.text;
  element.style.setProperty("--doubt", (1 - token.probability).toFixed(4));
  tokens.set(element, token);
}

export const isCardShown = () => shown !== null;

export function hideCard() {
  if (shown) shown.classList.remove("shown");
  shown = null;
  is_held = false;
  $("others").hidden = true;
  $("others").classList.remove("held");
}

function showCard(element) {
  hideCard();
  if (!element) return;
  shown = element;
  shown.classList.add("shown");
  const { name, id, probability, others } = tokens.get(element);
  $("drawn-name").textContent = visible(name);
  $("drawn-probability").textContent = percent(probability);
  $("candidates").replaceChildren();
  for (const other of others) {
    const [text, p, candidate] = other;
    const row = make("button", "", make("li", candidate === id ? "is-drawn" : "", $("candidates")));
    row.type = "button";
    row.disabled = other[3] === null;
    row.addEventListener("click", () => goOn(element.parentNode, placeOf(element), other));
    make("span", "text", row).textContent = visible(text);
    make("span", "bar", row).style.setProperty("--p", p);
    make("span", "percent", row).textContent = percent(p);
  }
  shownToken(element.parentNode, placeOf(element));
  $("others").hidden = false;
  placeBeside($("others"), element.getClientRects()[0]);
}

function holdCard(element) {
  showCard(element);
  is_held = true;
  $("others").classList.add("held");
  placeBeside($("others"), element.getClientRects()[0]); // it has become larger
}

const placeOf = (element) => [...element.parentNode.children].indexOf(element);

/* Arrow keys on an answer go through its tokens, and each is spoken with its probability; Enter holds the card. */
function walkTokens(event) {
  if (!event.target.matches(".answer")) return;
  if (event.key === "Enter" && shown) {
    event.preventDefault();
    holdCard(shown);
    $("candidates").querySelector("button")?.focus();
    return;
  }
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 };
  const all = [...event.target.children], at = all.indexOf(shown);
  const places = { Home: 0, End: all.length - 1 };
  for (const [key, step] of Object.entries(steps)) places[key] = at < 0 ? 0 : at + step;
  if (!(event.key in places)) return;
  const next = all[places[event.key]];
  event.preventDefault();
  if (!next) return;
  next.scrollIntoView({ block: "nearest" });
  showCard(next);
  const { name, probability, others, id } = tokens.get(next);
  const spoken = (text, p) => `${text === " " ? word("space") : visible(text)} ${percent(p)}`;
  const rest = others.filter((other) => other[2] !== id).slice(0, 3);
  $("spoken").textContent = [spoken(name, probability), ...rest.map(([text, p]) => spoken(text, p))].join(", ");
}

/* go_on: see goOn above; shown_token(answer's element, place): called for every token whose card is shown. */
export function listenToTokens(go_on, shown_token = shownToken) {
  [goOn, shownToken] = [go_on, shown_token];
  const on = (id, type, listener) => $(id).addEventListener(type, listener);
  const tokenAt = (event) => event.target.closest?.(".token");
  on("turns", "pointerover", (event) => {
    if (event.pointerType === "mouse" && tokenAt(event) && !is_held) showCard(tokenAt(event));
  });
  on("turns", "pointerleave", (event) => event.pointerType === "mouse" && !is_held && hideCard());
  document.addEventListener("click", (event) => {
    if (tokenAt(event)) holdCard(tokenAt(event));
    else if (!event.target.closest("#others")) hideCard();
  });
  on("turns", "keydown", walkTokens);
  on("turns", "focusin", ({ target: t }) => t.matches(".answer:focus-visible") && showCard(t.firstElementChild));
  on("turns", "focusout", ({ relatedTarget }) => !$("others").contains(relatedTarget) && !is_held && hideCard());
  document.addEventListener("scroll", () => shown && placeBeside($("others"), shown.getClientRects()[0]));
  on("others", "keydown", ({ key }) => {
    if (key === "Escape") shown?.parentNode.focus({ preventScroll: true }); // back to where Enter was pressed
  });
  on("others", "focusout", ({ relatedTarget: to }) => to && !$("others").contains(to) && hideCard());
}
