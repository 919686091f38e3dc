/* The page of one file: its model runs in a Web Worker, beside the chat that the page of serve.py has, too. */

import { updateSend } from "./composer.js";
import { startChat } from "./chat.js";
import { $, listenToTheme } from "./elements.js";
import { listenToSettings } from "./settings.js";
import { language, listenToLanguage, number, say, speak } from "./words.js";

let backend = null; // the model, once the worker has read it

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
        answer({ begun, ...request }, to) {
          listener = to;
          worker.postMessage({ type: "answer", number: ++asked, ...request, begun: begun.map(({ id }) => id) });
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
}

listenToTheme();
listenToLanguage();
listenToSettings();
startChat({ backends: () => (backend ? [backend] : []), backendOf: () => backend });
speak(language);
document.addEventListener("DOMContentLoaded", start); // the weights stand below this script
