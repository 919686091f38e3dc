/* The server's API, and a model behind it as chat.js wants one. */

import { withoutOldestTurns } from "./conversation.js";
import { $ } from "./elements.js";
import { word } from "./words.js";

// ---------------------------------------------------------------------------------------------------------- requests

const KEY = "nano:key"; // in sessionStorage: it is forgotten with the tab

/* The response to a GET, or with a body to a POST; throws an Error whose message is for people. */
export async function call(path, body, signal) {
  for (;;) {
    const key = sessionStorage.getItem(KEY), headers = key ? { Authorization: `Bearer ${key}` } : {};
    const post = { method: "POST", body: JSON.stringify(body), headers: { ...headers, "Content-Type": "application/json" } };
    const response = await fetch(path, { signal, ...(body ? post : { headers }) }).catch((error) => {
      throw error.name === "AbortError" ? error : new Error(word("unreachable"));
    });
    if (response.ok) return response;
    if (response.status !== 401) throw new Error((await response.json().catch(() => null))?.error?.message ?? response.statusText);
    if (key === sessionStorage.getItem(KEY)) await askForKey(); // else another request has asked already
  }
}

export const callJson = async (path, body) => (await call(path, body)).json();

let asking = null; // one dialog for all requests that wait for the key

function askForKey() {
  asking ??= new Promise((resolve, reject) => {
    const dialog = $("key-dialog");
    $("key").value = dialog.returnValue = "";
    dialog.showModal();
    dialog.onclose = () => {
      asking = null;
      if (!$("key").value) return reject(new Error(word("no_key")));
      sessionStorage.setItem(KEY, $("key").value);
      resolve();
    };
  });
  return asking;
}

/* The objects of a stream of server-sent events: lines "data: {...}", at last "data: [DONE]". */
async function* events(response) {
  const reader = response.body.getReader(), decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error(word("broken_off"));
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = lines.pop(); // a line that has not come whole
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const data = line.slice(6).trim();
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ a model

/* A question as the model reads it, ready for the answer: {tokens, pieces, count, max_model_len}. */
export function tokenize(model, is_chat, messages) {
  return callJson("/tokenize", { model, ...(is_chat ? { messages } : { prompt: messages.at(-1).content }) });
}

/* description: what GET /v1/models says of it. One answer at a time. */
export function serverModel({ id: model, nano }) {
  let controller = null;
  return {
    model,
    answer: async (request, listener) => {
      controller = new AbortController();
      try {
        const messages = request.messages.map((message) => withImagePart(message, nano));
        await giveAnswer(model, nano.stop_tokens, { ...request, messages }, listener, controller.signal);
      } catch ({ message }) {
        listener({ type: "failed", message });
      }
    },
    stop: () => controller?.abort(),
  };
}

/* A message as OpenAI's API has it, its image as this model reads it. */
function withImagePart({ images, ...message }, { image_size }) {
  if (!images) return message;
  const url = images[image_size];
  if (!url) throw new Error(word(image_size ? "other_image_size" : "no_eyes"));
  return { ...message, content: [{ type: "text", text: message.content }, { type: "image_url", image_url: { url } }] };
}

async function giveAnswer(model, stop_tokens, { is_chat, messages, settings, begun }, listener, signal) {
  const { max_length, ...sampling } = settings;
  let reason = "end", text = "", n_tokens = begun.length, began = 0, n_first = 0;
  const is_ended = stop_tokens.includes(begun.at(-1)?.id); // somebody chose that the answer ends here
  begun.forEach((token, i) => {
    listener({ type: "token", ...token, text: is_ended && i === begun.length - 1 ? "" : token.text });
  });
  try {
    const read = await fit(model, is_chat, messages, max_length, begun.length, listener);
    if (!read) return; // refused
    const body = { model, ...sampling, max_tokens: read.room, stream: true };
    if (is_chat) {
      const continue_token_ids = begun.map(({ id }) => id);
      Object.assign(body, { messages: read.messages, continue_token_ids, logprobs: true, top_logprobs: 10 });
    } else {
      const prompt = messages.at(-1).content + begun.map(({ text }) => text).join("");
      Object.assign(body, { prompt, logprobs: 10 });
    }
    const path = is_chat ? "/v1/chat/completions" : "/v1/completions";
    for await (const { choices } of is_ended ? [] : events(await call(path, body, signal))) {
      for (const choice of choices) {
        const tokens = is_chat ? chatTokens(choice) : textTokens(choice);
        const completed = (is_chat ? choice.delta.content : choice.text) ?? "";
        // a character, or what may begin a stop text, can be spread over several tokens: the last one shows it
        if (tokens.length) tokens.at(-1).text = completed;
        else text += completed;
        tokens.forEach((token) => listener({ type: "token", ...token }));
        n_tokens += tokens.length;
        if (tokens.length && !began) [began, n_first] = [performance.now(), n_tokens];
        if (choice.finish_reason === "length") reason = "length";
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    reason = "stopped";
  }
  const seconds = (performance.now() - began) / 1000;
  listener({ type: "done", reason, text, n_tokens, tokens_per_second: began ? (n_tokens - n_first) / seconds : 0 });
}

/* What is read of a conversation, and the room for an answer in tokens; null where there is none. As inference.py does:
   max_length counts question and answer, and above three quarters of it the oldest turns are left out. */
async function fit(model, is_chat, messages, max_length, n_begun, listener) {
  const n_turns = messages.filter(({ role }) => role === "user").length;
  for (let n_forgotten = 0; ; n_forgotten++) {
    const read = withoutOldestTurns(messages, n_forgotten);
    const { count: n, pieces, max_model_len: window } = await tokenize(model, is_chat, read);
    const limit = Math.min(max_length ?? window, window), room = limit - n - n_begun;
    if (is_chat && n + n_begun > Math.floor((limit * 3) / 4) && n_forgotten < n_turns - 1) continue;
    const is_blind = n_forgotten && messages.some(({ content }) => Array.isArray(content)); // an image is in the first turn
    if (n_forgotten) listener({ type: "note", key: is_blind ? "forgotten_image" : "forgotten", values: { n: n_forgotten } });
    if (pieces.includes("<|unknown|>")) listener({ type: "note", key: "some_unknown" });
    if (room > 0) return { messages: read, room };
    const key = n < window && max_length ? "max_length_reached" : "too_long";
    listener({ type: "refused", key, values: { n: n + n_begun, limit, window } });
    return null;
  }
}

/* The tokens of a chunk as tokens.js has them; their text is filled in by who knows what they complete. */
function chatTokens({ logprobs }) {
  const entries = logprobs?.content ?? [];
  return entries.map(({ token, id, logprob, top_logprobs }) => ({
    text: "",
    name: token,
    id,
    probability: Math.exp(logprob),
    // a part of a character has no bytes of its own; the token that completes it shows it
    others: top_logprobs.map((other) => [other.token, Math.exp(other.logprob), other.id, other.bytes ? other.token : ""]),
  }));
}

/* Plain completions name the other tokens by their texts alone; parts of characters and special tokens have none. */
function textTokens({ logprobs, token_ids }) {
  const names = logprobs?.tokens ?? [];
  return names.map((name, i) => ({
    text: "",
    name,
    id: token_ids[i],
    probability: Math.exp(logprobs.token_logprobs[i]),
    others: Object.entries(logprobs.top_logprobs[i])
      .sort((one, other) => other[1] - one[1])
      .map(([other, logprob]) => {
        const text = /^token_id:\d+$|^<\|.*\|>$/.test(other) ? null : other;
        return [other, Math.exp(logprob), other === name ? token_ids[i] : null, text];
      }),
  }));
}
