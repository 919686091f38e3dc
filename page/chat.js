/* The conversation: what happens when somebody asks, stops, edits, asks again, or goes on from a token.

   A model is behind an object with two methods, so that this file does not depend on where it runs:
       backend.answer(request, listener)   request {is_chat, messages, settings, begun}: settings of settings.js; begun:
                                           tokens that the answer begins with, as tokens.js has them
                                           listener({type: "note" | "token" | "done" | "refused" | "failed", ...}): the
                                           tokens that are begun come again, first
       backend.stop()                      the answer ends with what it has, and "done"
   Whatever people or models wrote is put in place as textContent, never as markup. */

import { listenToComposer, makeEditor, showBusy, writeQuestion } from "./composer.js";
import { addChild, messagesOf, newConversation, parentOf, pathTo, removeChild, shownAnswers, shownPath } from "./conversation.js";
import { $, make, makeButton, onceAFrame, scrollDown, visible } from "./elements.js";
import { isChat, readSettings, useMode } from "./settings.js";
import { addToken, hideCard, isCardShown, listenToTokens } from "./tokens.js";
import { number, say, speak, language, word } from "./words.js";

let conversation = newConversation();
const running = new Map(); // answers that are being given -> their backends
const places = new WeakMap(); // a question or an answer -> the element that shows it
const answers = new WeakMap(); // the element of an answer's text -> the answer
let page = null; // what is different about the page that this is part of, see startChat

/* given: backends()                   the models that answer: none yet, one, or two beside each other
          backendOf(answer)            the model that gave an answer
          changed(conversation)        something was said; to be kept
          images()                     those that the first question is about, as images.js has them; null: none
          setImages(images)            they are in the question that is written
          addImage(element, images)    shows one
          addActions(element, answer)  more buttons below an answer
          showToken(answer, place)     more about a token */
export function startChat(given) {
  page = { changed: () => {}, images: () => null, setImages: () => {}, addImage: () => {}, addActions: () => {}, showToken: () => {}, ...given };
  listenToChat();
}

const isBusy = () => running.size > 0;
export const currentConversation = () => conversation;

// ------------------------------------------------------------------------------------------------------ what is shown

function showTurns() {
  hideCard();
  $("turns").replaceChildren();
  for (const node of shownPath(conversation)) if (node.role === "user") showQuestion(node);
  $("welcome").hidden = $("turns").children.length > 0;
}

function showQuestion(question) {
  const turn = make("li", conversation.is_chat ? "turn" : "turn continued", $("turns"));
  if (question.images) page.addImage(turn, question.images);
  const row = make("div", "asked", turn), asked = make("div", "question", row);
  asked.dir = "auto";
  asked.textContent = question.content;
  places.set(question, turn);
  const actions = make("div", "actions", conversation.is_chat ? row : turn); // a text and its continuation are one
  const replies = make("div", question.beside === undefined ? "replies" : "replies beside", turn);
  for (const answer of shownAnswers(question)) showAnswer(answer, question, replies);
  if (!conversation.is_chat) turn.append(actions);
  addPlace(actions, parentOf(conversation, question), question);
  makeButton("edit", actions, () => edit(question, turn));
}

function showAnswer(answer, question, replies) {
  const reply = make("div", "reply", replies);
  if (question.beside !== undefined) make("p", "by", reply).textContent = answer.model;
  const text = make("div", "answer", reply);
  Object.assign(text, { dir: "auto", tabIndex: 0 });
  text.setAttribute("role", "group");
  text.dataset.label = "answer";
  text.setAttribute("aria-label", word("answer"));
  places.set(answer, reply);
  answers.set(text, answer);
  answer.tokens.forEach((token) => addToken(text, token));
  text.append(answer.content.slice(text.textContent.length)); // what has no tokens: they were not kept
  answer.notes.forEach((note) => addNote(reply, note));
  if (running.has(answer)) reply.classList.add("waiting");
  else finish(answer, question);
}

/* "2 / 3" with a button to either side, where a question was edited or answered more than once. */
function addPlace(actions, parent, node) {
  const of = parent.children.length, at = parent.children.indexOf(node);
  if (of < 2 || parent.beside !== undefined) return;
  const pager = make("span", "pager", actions);
  const turnTo = (key, next) => {
    const button = make("button", key, pager);
    Object.assign(button, { type: "button", textContent: key === "previous" ? "‹" : "›", disabled: !parent.children[next] });
    button.dataset.label = key;
    button.ariaLabel = word(key);
    button.addEventListener("click", () => {
      if (isBusy()) return;
      parent.at = next;
      changed();
      places.get(parent.children[next]).querySelector(`.${key}:enabled, .pager :enabled`).focus();
      $("spoken").textContent = word("place", { n: next + 1, of });
    });
  };
  turnTo("previous", at - 1);
  make("span", "", pager).textContent = `${at + 1} / ${of}`;
  turnTo("next", at + 1);
}

/* What stands below an answer that has ended. */
function finish(answer, question) {
  const reply = places.get(answer), { reason = "stopped", model, tokens_per_second } = answer;
  const n = answer.n_tokens ?? answer.tokens.length;
  reply.classList.remove("waiting");
  if (reason !== "end") say(make("p", "below", reply), ...[reason].flat());
  const row = make("div", "foot", reply), actions = make("div", "actions", row);
  const speed = n > 1 && tokens_per_second ? number(tokens_per_second) : "";
  say(make("p", "below figures", row), "figures_of_answer", { n, speed, model });
  addPlace(actions, question, answer);
  if (question.beside !== undefined) {
    const at = question.children.indexOf(answer);
    reply.classList.toggle("is-chosen", question.at === at);
    const choose = makeButton("choose", actions, () => {
      if (isBusy() || question.at === at) return;
      [question.at, question.beside] = [at, question.at];
      changed();
      places.get(answer).querySelector(".choose").focus();
    });
    choose.ariaPressed = question.at === at;
  }
  if (navigator.clipboard) {
    makeButton("copy", actions, async () => {
      await navigator.clipboard.writeText(answer.content);
      $("spoken").textContent = word("copied");
    });
  }
  makeButton("again", actions, () => answerAgain(question));
  page.addActions(actions, answer);
}

function addNote(reply, [key, values]) {
  const N_SHOWN = 40; // unknown characters that a note names
  if (key === "unknown_characters") {
    const characters = values.characters.map(visible);
    values = { characters: characters.slice(0, N_SHOWN).join(" "), more: Math.max(0, characters.length - N_SHOWN) };
  }
  say(make("p", "below note", reply), key, values);
}

function changed() {
  page.changed(conversation);
  showTurns();
}

// --------------------------------------------------------------------------------------------------- what is answered

/* A question that follows a node; by two backends beside each other if there are two. */
function ask(parent, content, images) {
  const backends = page.backends();
  if (isBusy() || !backends.length || !content.trim()) return false;
  if (parent === conversation.root) Object.assign(conversation, { is_chat: isChat(), system: $("system").value });
  const question = addChild(parent, { role: "user", content, ...(images && parent === conversation.root ? { images } : {}) });
  giveAnswers(question, backends, []);
  return true;
}

/* One more answer to a question. With a fixed seed it would be the same one: the next seed is taken, as inference.py
   does for --num_samples. */
function answerAgain(question, backend = page.backends()[0], begun = []) {
  if (isBusy() || !backend) return;
  delete question.beside;
  giveAnswers(question, [backend], begun);
}

function giveAnswers(question, backends, begun) {
  const settings = readSettings(), n_before = question.children.length;
  conversation.system = $("system").value;
  if (settings.seed !== undefined) {
    if (settings.seed !== null) settings.seed += n_before;
    else if (backends.length > 1) settings.seed = Math.floor(Math.random() * 2 ** 31); // the same for both
  }
  const path = pathTo(question, conversation.root);
  const request = { is_chat: conversation.is_chat, messages: messagesOf(conversation, path), settings, begun };
  const given = backends.map((backend) => {
    const answer = addChild(question, { role: "assistant", tokens: [], notes: [], model: backend.model });
    running.set(answer, backend);
    return answer;
  });
  question.at = n_before;
  if (given.length > 1) question.beside = n_before + 1;
  showTurns();
  say($("notice"), "");
  $("spoken").textContent = word(begun.length ? "branched" : "answering");
  showBusy(isBusy());
  if (places.get(question) === $("turns").lastElementChild) scrollDown();
  for (const answer of given) listenToAnswer(running.get(answer), answer, question, request);
}

function listenToAnswer(backend, answer, question, request) {
  const show = (message) => {
    if (!running.has(answer)) return; // of a conversation that was left
    const reply = places.get(answer), { type } = message;
    if (type === "note") {
      answer.notes.push([message.key, message.values]);
      return addNote(reply, answer.notes.at(-1));
    }
    if (type === "token") {
      const { text, name, id, probability, others } = message;
      answer.tokens.push({ text, name, id, probability, others });
      answer.content += text;
      return addToken(reply.querySelector(".answer"), message);
    }
    running.delete(answer);
    if (type === "done" || answer.tokens.length) {
      const { reason, text = "", n_tokens = answer.tokens.length, tokens_per_second } = message;
      const failure = [message.key ?? "failed", message.values ?? { message: message.message }];
      reply.querySelector(".answer").append(text); // the sign for bytes that never became a character
      answer.content += text;
      Object.assign(answer, { reason: reason ?? failure, n_tokens, tokens_per_second });
      finish(answer, question);
      $("spoken").textContent = answer.content;
      page.changed(conversation);
    } else takeBack(answer, question, message);
    showBusy(isBusy());
  };
  backend.answer(request, onceAFrame(show));
}

/* An answer that never began: the question returns to where it was written, unless there is another answer. */
function takeBack(answer, question, { key = "failed", values, message }) {
  removeChild(question, answer);
  if (!question.children.length) {
    removeChild(parentOf(conversation, question), question);
    if (!$("question").value) writeQuestion(question.content);
    if (!conversation.root.children.length) page.setImages(question.images ?? null);
  }
  showTurns();
  say($("notice"), key, values ?? { message });
}

function stop() {
  for (const backend of new Set(running.values())) backend.stop();
}

/* A press on one of the ten likeliest tokens: another answer of its model, which begins as it did, but for that token. */
function branch(element, place, [name, probability, id, text]) {
  const answer = answers.get(element), question = parentOf(conversation, answer);
  const { others } = answer.tokens[place];
  hideCard();
  const begun = [...answer.tokens.slice(0, place), { text: text ?? name, name, id, probability, others }];
  answerAgain(question, page.backendOf(answer), begun);
}

/* The question as a field, in its place; sent, it becomes another question beside the first. */
function edit(question, turn) {
  if (isBusy()) return;
  const send = (text) => ask(parentOf(conversation, question), text, question.images);
  turn.querySelector(".asked").replaceWith(makeEditor(question.content, send, showTurns));
  turn.querySelector(".edit textarea").focus();
}

// -------------------------------------------------------------------------------------------------- one conversation

/* Answers that are being given end as they are: the conversation, or the page, is left. */
export function endAnswers() {
  const left = [...running.keys()];
  stop();
  running.clear();
  for (const answer of left) Object.assign(answer, { reason: "stopped", n_tokens: answer.tokens.length });
  if (left.length) page.changed(conversation);
}

/* Another conversation, or a new one. */
export function openConversation(other = newConversation()) {
  endAnswers();
  const is_new = !other.root.children.length;
  if (is_new) other.is_chat = isChat();
  else $("system").value = other.system;
  conversation = other;
  useMode(other.is_chat);
  page.setImages(null);
  speak(language); // the field's hint
  showTurns();
  say($("notice"), "");
  $("spoken").textContent = "";
  showBusy(isBusy());
  if (is_new) $("question").focus();
  else scrollDown();
}

function listenToChat() {
  const send = () => {
    if (!ask(shownPath(conversation).at(-1) ?? conversation.root, $("question").value, page.images())) return;
    writeQuestion("");
    page.setImages(null);
  };
  listenToComposer({ send, stop, canSend: () => !isBusy() && page.backends().length > 0 });
  $("new").addEventListener("click", () => openConversation());
  for (const choice of document.querySelectorAll('[name="mode"]')) {
    choice.addEventListener("change", () => openConversation());
  }
  listenToTokens(branch, (element, place) => page.showToken(answers.get(element), place));
  document.addEventListener("keydown", ({ key }) => {
    if (key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (isCardShown()) hideCard();
    else stop();
  });
}
