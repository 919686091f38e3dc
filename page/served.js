/* The page of serve.py: the chat that the page of one file has, too, with the server's models, and what they allow. */

import { currentConversation, endAnswers, startChat } from "./chat.js";
import { updateSend } from "./composer.js";
import { messagesOf, pathTo } from "./conversation.js";
import { $, listenToTheme } from "./elements.js";
import { addRating, keepConversation, listenToHistory } from "./history.js";
import { addImage, isReadingImage, listenToImages, nextImages, setImages, showImageBar } from "./images.js";
import { listenToInside, lookInside } from "./inside.js";
import { callJson, serverModel } from "./server.js";
import { WORDS_SERVED } from "./served_words.js";
import { isChat, listenToSettings, useMode } from "./settings.js";
import { hideCard } from "./tokens.js";
import { showTraining } from "./training.js";
import { addWords, language, listenToLanguage, number, say, speak, word } from "./words.js";

let models = []; // as GET /v1/models describes them

const chosen = () => ["model", "second"].map((id) => models.find((model) => model.id === $(id).value)).filter(Boolean);

// ------------------------------------------------------------------------------------------------------------ models

async function loadModels() {
  say($("notice"), "loading");
  try {
    models = (await callJson("/v1/models")).data;
  } catch ({ message }) {
    return say($("notice"), "failed", { message });
  }
  say($("notice"), "");
  $("model").append(...models.map(({ id }) => new Option(id)));
  $("second").append(new Option(word("alone"), ""), ...models.map(({ id }) => new Option(id)));
  $("second").options[0].dataset.text = "alone";
  $("second").hidden = models.length < 2;
  $("models").hidden = false;
  useModel();
}

/* What the model chosen is; one that was only pretrained continues texts. */
function useModel() {
  const [{ nano }] = chosen();
  const shape = { n_layer: nano.n_layer, n_head: nano.n_head, n_expert: nano.n_expert, image_size: nano.image_size };
  const figures = [nano.parameters, nano.vocab_size, nano.block_size].map(number);
  say($("figures"), "figures", { ...shape, weights: figures[0], vocabulary: figures[1], window: figures[2] });
  $("max-length").placeholder = nano.block_size;
  if (!currentConversation().root.children.length) useMode(nano.instruct);
  setImages(isChat() ? nextImages() : null); // as this model sees it; a text has none
  speak(language);
  useSecondModel();
}

function useSecondModel() {
  updateSend();
  showImageBar();
}

// ------------------------------------------------------------------------------------------------------- look inside

let looked = null; // the answer and the place of the token whose card is shown

function showToken(answer, place) {
  looked = [answer, place];
  const is_known = models.some(({ id }) => id === answer.model);
  const is_seen = pathTo(answer, currentConversation().root)[0].images; // /inspect reads tokens alone
  $("look-inside").hidden = !is_known || is_seen || answer.tokens.slice(0, place).some(({ id }) => id === null);
}

async function look() {
  const [answer, place] = looked, conversation = currentConversation();
  const question = pathTo(answer, conversation.root).slice(0, -1);
  hideCard();
  try {
    await lookInside({ is_chat: conversation.is_chat, messages: messagesOf(conversation, question) }, answer, place);
  } catch ({ message }) {
    say($("notice"), "failed", { message });
  }
}

// ------------------------------------------------------------------------------------------------------------- start

/* #training in the address shows the trainings, anything else the conversation: so the browser's Back works. */
function showView() {
  const is_training = location.hash === "#training";
  $("chat").hidden = $("composer-bar").hidden = is_training;
  $("training-link").href = is_training ? "#" : "#training";
  $("training-link").dataset.text = is_training ? "conversation" : "training";
  $("training-link").textContent = word($("training-link").dataset.text);
  showTraining(is_training);
}

addWords(WORDS_SERVED);
listenToTheme();
listenToLanguage();
listenToSettings();
listenToHistory();
listenToInside();
listenToImages({ models: () => models, chosen });
$("model").addEventListener("change", useModel);
$("second").addEventListener("change", useSecondModel);
$("look-inside").addEventListener("click", look);
$("new").addEventListener("click", () => (location.hash = ""));
addEventListener("hashchange", showView);
addEventListener("pagehide", endAnswers); // which keeps them
startChat({
  backends: () => (isReadingImage() ? [] : chosen().map(serverModel)),
  backendOf: ({ model }) => serverModel(models.find(({ id }) => id === model) ?? { id: model, nano: { stop_tokens: [] } }),
  changed: keepConversation,
  images: nextImages,
  setImages,
  addImage,
  addActions: addRating,
  showToken,
});
showView();
speak(language);
loadModels();
