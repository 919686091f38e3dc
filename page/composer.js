/* The field where one writes, with its buttons to send and to stop; and the one for a question that is edited. */

import { $, make, makeButton } from "./elements.js";
import { word } from "./words.js";

let canSend = () => false; // whether there is a model, and it is not answering

export function updateSend() {
  $("send").disabled = !canSend() || !$("question").value.trim();
}

export function writeQuestion(text) {
  $("question").value = text;
  fitQuestion();
}

/* The field grows with its text. */
function fitQuestion() {
  $("question").style.height = "auto";
  $("question").style.height = `${$("question").scrollHeight + 2}px`;
  updateSend();
}

export function showBusy(is_busy) {
  document.body.classList.toggle("busy", is_busy);
  const had_focus = document.activeElement === $("send") || document.activeElement === $("stop");
  $("send").hidden = is_busy;
  $("stop").hidden = !is_busy;
  if (had_focus) $("question").focus();
  updateSend();
}

/* Enter without Shift. While an input method composes (Chinese), Enter takes its suggestion; Safari then says 229. */
function isSending(event) {
  const is_sending = event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
  if (is_sending) event.preventDefault();
  return is_sending;
}

export function listenToComposer({ send, stop, canSend: can_send }) {
  canSend = can_send;
  $("composer").addEventListener("submit", (event) => (event.preventDefault(), send()));
  $("question").addEventListener("input", fitQuestion);
  $("question").addEventListener("keydown", (event) => isSending(event) && send());
  $("stop").addEventListener("click", stop);
  updateSend();
  if (matchMedia("(hover: hover)").matches) $("question").focus(); // on a phone the keyboard would cover the page
}

/* A field like it, for a question that is edited in its place. */
export function makeEditor(text, send, cancel) {
  const form = document.createElement("form"), field = make("textarea", "", form);
  form.className = "edit";
  Object.assign(field, { value: text, rows: Math.min(10, text.split("\n").length + 1), ariaLabel: word("edit") });
  const actions = make("div", "actions", form);
  makeButton("send", actions, () => {}).type = "submit";
  makeButton("cancel", actions, cancel);
  form.addEventListener("submit", (event) => (event.preventDefault(), send(field.value)));
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") cancel();
    if (isSending(event)) form.requestSubmit();
  });
  return form;
}
