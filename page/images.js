/* An image for the next question: chosen, dropped on the page, or pasted.

   POST /tokenize makes of a file what a model reads of it, `image_size` pixels wide. That is shown, kept and sent from
   then on: the answer is the same to the last bit, and a photo of megabytes becomes kilobytes in the browser's storage.
   `images` are these by their size: {36: "data:image/png;base64,...", ...}, as models may differ in what they read. */

import { openConversation } from "./chat.js";
import { updateSend } from "./composer.js";
import { $, make } from "./elements.js";
import { callJson } from "./server.js";
import { isChat } from "./settings.js";
import { say, word } from "./words.js";

let images = null; // of the next question
let is_reading = false; // what was chosen last
let allModels = () => [], chosenModels = () => []; // as GET /v1/models describes them

export const nextImages = () => images;
export const isReadingImage = () => is_reading;

/* Those of the next question; null: none. */
export function setImages(given) {
  images = given;
  $("attached").hidden = !images;
  $("attached").replaceChildren();
  if (images) addImage($("attached"), images);
  showImageBar();
}

/* As the model that is chosen sees it. */
export function addImage(parent, by_size) {
  const chosen = chosenModels()[0]?.nano.image_size;
  const size = chosen in by_size ? chosen : Object.keys(by_size)[0], url = by_size[size];
  const picture = make("img", size < 96 ? "picture enlarged" : "picture", parent);
  Object.assign(picture, { src: url, ariaLabel: word("image") });
  picture.dataset.label = "image";
}

/* The button is there for models that see, in a conversation: an image is part of a question. */
export function showImageBar() {
  const can_see = chosenModels().length > 0 && !whoReadsText().length;
  $("image-bar").hidden = !images && !(can_see && isChat());
  $("attach").hidden = images !== null;
  $("detach").hidden = images === null;
}

const whoReadsText = () => chosenModels().filter(({ nano }) => !nano.image_size);

async function attach(file) {
  if (is_reading || document.body.classList.contains("busy") || document.querySelector("dialog[open]")) return;
  const names = whoReadsText().map(({ id }) => id).join(", ");
  if (names) return say($("notice"), "reads_text", { names });
  if (!isChat()) return say($("notice"), "image_in_text");
  if (!/^image\/(png|jpeg)$/.test(file.type)) return say($("notice"), "image_kind");
  const most = chosenModels()[0].nano.max_image_bytes;
  if (file.size > most) return say($("notice"), "image_too_large", { megabytes: file.size / 1e6, most: most / 1e6 });
  say($("notice"), "reading_image");
  is_reading = true;
  updateSend();
  try {
    const read = await readAsModelsDo(file);
    if ($("turns").children.length) openConversation(); // it belongs to the first question
    setImages(read);
    say($("notice"), "");
    $("question").focus();
  } catch ({ message }) {
    say($("notice"), "image_failed", { message });
  }
  is_reading = false;
  updateSend();
}

async function readAsModelsDo(file) {
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
  const read = {};
  for (const { id: model, nano } of [...chosenModels(), ...allModels()]) {
    if (!nano.image_size || nano.image_size in read) continue;
    const messages = [{ role: "user", content: [{ type: "image_url", image_url: { url } }] }];
    read[nano.image_size] = (await callJson("/tokenize", { model, messages })).image;
  }
  return read;
}

/* models(): all; chosen(): those that answer. */
export function listenToImages({ models, chosen }) {
  [allModels, chosenModels] = [models, chosen];
  $("attach").addEventListener("click", () => $("image-file").click());
  $("detach").addEventListener("click", () => {
    setImages(null);
    $("question").focus();
  });
  $("image-file").addEventListener("change", ({ target }) => {
    if (target.files.length) attach(target.files[0]);
    target.value = ""; // the same one can be chosen again
  });
  const drag = (type, listener) => {
    document.addEventListener(type, (event) => {
      if (!event.dataTransfer.types.includes("Files") || $("chat").hidden) return;
      event.preventDefault(); // else the browser would leave the page and show the file
      listener(event);
    });
  };
  drag("dragover", () => document.body.classList.add("dropping"));
  drag("dragleave", ({ relatedTarget }) => relatedTarget ?? document.body.classList.remove("dropping"));
  drag("drop", ({ dataTransfer }) => {
    document.body.classList.remove("dropping");
    if (dataTransfer.files.length) attach(dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => {
    const { files, types } = event.clipboardData;
    if (!files.length || types.includes("text/plain")) return; // of a text copied from a document there is a picture, too
    event.preventDefault();
    attach(files[0]);
  });
}
