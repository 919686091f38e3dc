/* The drawer with the conversations that are kept, and what can be taken out of them. */

import { openConversation, currentConversation } from "./chat.js";
import { shownPath } from "./conversation.js";
import { $, make, makeButton } from "./elements.js";
import { download, goodLines, pairLines, shownLines } from "./export.js";
import { forget, keep, keptConversations } from "./storage.js";
import { say, word } from "./words.js";

const EXPORTS = { "export-sft": [shownLines, "sft"], "export-good": [goodLines, "good"], "export-dpo": [pairLines, "dpo"] };

export function keepConversation(conversation) {
  if (!conversation.root.children.length) return forget(conversation);
  if (!keep(conversation)) say($("notice"), "full");
}

/* Good and Bad below an answer; a second press takes it back. */
export function addRating(actions, answer) {
  const buttons = { good: 1, bad: -1 };
  const show = () => {
    for (const key of Object.keys(buttons)) actions.querySelector(`.${key}`).ariaPressed = answer.rating === buttons[key];
  };
  for (const [key, rating] of Object.entries(buttons)) {
    makeButton(key, actions, () => {
      answer.rating = answer.rating === rating ? 0 : rating;
      show();
      keepConversation(currentConversation());
    });
  }
  show();
}

function showHistory() {
  const kept = keptConversations();
  $("kept").replaceChildren();
  for (const conversation of kept) {
    const row = make("li", conversation.id === currentConversation().id ? "is-open" : "", $("kept"));
    const open = make("button", "title", row);
    open.type = "button";
    open.dir = "auto";
    open.textContent = shownPath(conversation)[0].content;
    open.addEventListener("click", () => {
      $("history").close();
      location.hash = "";
      if (conversation.id !== currentConversation().id) openConversation(conversation);
    });
    const remove = makeButton("remove", row, () => removeConversation(conversation, row));
    remove.ariaLabel = `${word("remove")}: ${open.textContent.slice(0, 60)}`;
  }
  for (const [id, [lines]] of Object.entries(EXPORTS)) {
    const n = lines(kept).length;
    say($(id), id, { n });
    $(id).disabled = !n;
  }
}

/* A second press is asked for: what is deleted is gone. */
function removeConversation(conversation, row) {
  const button = row.querySelector(".remove");
  if (button.dataset.text === "remove") {
    button.dataset.text = "really";
    button.textContent = word("really");
    return;
  }
  if (conversation.id === currentConversation().id) openConversation();
  forget(conversation);
  const next = row.nextElementSibling ?? row.previousElementSibling;
  const place = [...$("kept").children].indexOf(next) - (next === row.nextElementSibling ? 1 : 0);
  showHistory();
  ($("kept").children[place]?.querySelector("button") ?? $("history-title")).focus();
}

export function listenToHistory() {
  $("history-button").addEventListener("click", () => {
    showHistory();
    $("history").showModal();
  });
  for (const [id, [lines, name]] of Object.entries(EXPORTS)) {
    const date = new Date().toISOString().slice(0, 10);
    $(id).addEventListener("click", () => download(lines(keptConversations()), `nano-${name}-${date}.jsonl`));
  }
}
