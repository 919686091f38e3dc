"use strict";
/* The language model of a web page: network, sampling, conversation; tokenizer.js stands in front of it. It runs in a
   Web Worker, so that the page stays alive, and speaks to the page in messages (at the end of the file).

   The same in Python: model.py, layers/, serving/text_generator.py. Here is the whole of a GPT without any library.
*/

// ---------------------------------------------------------------------------------------------------------- weights

/* The number that 16 bits stand for: a sign, 5 bits of exponent, 10 bits of fraction (IEEE 754, "half precision"). */
function fromFloat16(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = (bits & 1023) / 1024;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction) : 2 ** -14 * fraction);
}

/* The tensors by name, as Float32Arrays, out of the bytes that weights/webpage.py wrote one after the other.

   q8_0 is llama.cpp's type: every row is cut into blocks of 32 numbers, each block is a scale (float16) and 32
   integers of 8 bits; a number is scale * integer. They are expanded here, so that all that follows has one kind. */
function readTensors(descriptions, bytes) {
  const tensors = {};
  let at = 0;
  for (const { name, shape, type } of descriptions) {
    const size = shape.reduce((a, b) => a * b), columns = shape[shape.length - 1];
    if (type === "float32") {
      tensors[name] = new Float32Array(bytes.slice(at, at + 4 * size).buffer); // slice: aligned to 4 bytes
      at += 4 * size;
      continue;
    }
    const values = (tensors[name] = new Float32Array(size));
    for (let row = 0; row < size; row += columns) {
      for (let start = row; start < row + columns; start += 32) {
        const end = Math.min(start + 32, row + columns);
        const scale = fromFloat16(bytes[at] | (bytes[at + 1] << 8));
        at += 2;
        for (let i = start; i < end; i++) values[i] = scale * ((bytes[at++] << 24) >> 24); // 0..255 to -128..127
      }
    }
  }
  if (at !== bytes.length) throw new Error("the weights are incomplete");
  return tensors;
}

function fromBase64(text) {
  const characters = atob(text), bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
}

// ---------------------------------------------------------------------------------------------------------- network

/* y = W x + bias. The rows of W lie one after the other, from `offset` on: y.length rows of x.length numbers.

   Nearly all the time of an answer goes by in the inner loop. Four rows at a time read every x once, and their sums do
   not wait for each other, as the additions to a single one would. */
function linear(y, weight, x, bias, offset = 0) {
  const n = x.length, rows = y.length;
  let row = 0, w = offset;
  for (; row + 4 <= rows; row += 4, w += 4 * n) {
    let a = 0, b = 0, c = 0, d = 0;
    for (let i = 0; i < n; i++) {
      const value = x[i];
      a += weight[w + i] * value;
      b += weight[w + n + i] * value;
      c += weight[w + 2 * n + i] * value;
      d += weight[w + 3 * n + i] * value;
    }
    y[row] = a;
    y[row + 1] = b;
    y[row + 2] = c;
    y[row + 3] = d;
  }
  for (; row < rows; row++, w += n) {
    let sum = 0;
    for (let i = 0; i < n; i++) sum += weight[w + i] * x[i];
    y[row] = sum;
  }
  if (bias) for (let i = 0; i < rows; i++) y[i] += bias[i];
}

/* LayerNorm (arXiv:1607.06450), which GPT-2 has: the mean is subtracted first. */
function layerNorm(y, x, weight, bias, eps) {
  const mean = x.reduce((sum, value) => sum + value, 0) / x.length;
  for (let i = 0; i < x.length; i++) y[i] = x[i] - mean;
  rmsNorm(y, y, weight, eps);
  if (bias) for (let i = 0; i < x.length; i++) y[i] += bias[i];
}

/* RMSNorm (arXiv:1910.07467): y = x / sqrt(mean(x^2) + eps) * weight, of `weight.length` numbers from `start` on. */
function rmsNorm(y, x, weight, eps, start = 0) {
  const n = weight.length;
  let squares = 0;
  for (let i = 0; i < n; i++) squares += x[start + i] * x[start + i];
  const scale = 1 / Math.sqrt(squares / n + eps);
  for (let i = 0; i < n; i++) y[start + i] = x[start + i] * scale * weight[i];
}

/* The first n numbers of x become probabilities. The largest is subtracted, as exp() of a large number is infinite. */
function softmax(x, n = x.length) {
  let largest = -Infinity, sum = 0;
  for (let i = 0; i < n; i++) largest = Math.max(largest, x[i]);
  for (let i = 0; i < n; i++) sum += x[i] = Math.exp(x[i] - largest);
  for (let i = 0; i < n; i++) x[i] /= sum;
  return x;
}

/* The error function, within 1.5e-7 (Abramowitz and Stegun, 7.1.26); JavaScript has none. */
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const series = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t;
  return Math.sign(x) * (1 - series * Math.exp(-x * x));
}

const ACTIVATIONS = {
  swiglu: (gate, up) => (gate / (1 + Math.exp(-gate))) * up, // arXiv:2002.05202
  gelu: (x) => (x * (1 + erf(x / Math.SQRT2))) / 2,
  gelu_tanh: (x) => (x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)))) / 2, // GPT-2's
  relu2: (x) => Math.max(0, x) ** 2, // arXiv:2109.08668
};

/* A GPT with its KV cache: keys and values of the tokens read so far, which every later token attends to. */
class Network {
  constructor(config, tensors) {
    this.config = config;
    this.tensors = tensors;
    this.tokens = []; // that the cache holds
    const size = config.block_size * config.n_kv_head * config.head_dim;
    this.keys = config.windows.map(() => new Float32Array(size));
    this.values = config.windows.map(() => new Float32Array(size));
  }

  weight(name) {
    return this.tensors[`${name}.weight`];
  }

  /* y = the linear layer `name` of x: a new array of `size` numbers. */
  linear(name, x, size) {
    const y = new Float64Array(size); // JavaScript's own numbers are float64; the weights stay float32
    linear(y, this.weight(name), x, this.tensors[`${name}.bias`]);
    return y;
  }

  norm(name, x) {
    const y = new Float64Array(x.length), { norm, norm_eps } = this.config;
    if (norm === "layernorm") layerNorm(y, x, this.weight(name), this.tensors[`${name}.bias`], norm_eps);
    else rmsNorm(y, x, this.weight(name), norm_eps);
    return y;
  }

  /* The final hidden state after the last of `tokens`. What the cache holds of them is not computed again: of a
     conversation only what is new is read. `pause` is awaited after every token. */
  async read(tokens, pause) {
    let known = 0, hidden = null;
    const most = Math.min(this.tokens.length, tokens.length - 1);
    while (known < most && this.tokens[known] === tokens[known]) known++;
    this.tokens.length = known;
    for (const token of tokens.slice(known)) {
      hidden = this.forward(token, this.tokens.length);
      this.tokens.push(token);
      await pause();
    }
    return this.norm("norm", hidden);
  }

  /* One token at a position: embed it, then let every block add to it (the residual stream). */
  forward(token, position) {
    const { n_embd, windows, rope } = this.config;
    const at = token * n_embd;
    const x = Float64Array.from(this.weight("token_embedding").subarray(at, at + n_embd));
    const add = (y) => y.forEach((value, i) => (x[i] += value));
    if (!rope) add(this.weight("position_embedding").subarray(position * n_embd, (position + 1) * n_embd));
    windows.forEach((window, layer) => {
      const block = `blocks.${layer}`;
      add(this.attention(layer, window, this.norm(`${block}.attention_norm`, x), position));
      const h = this.norm(`${block}.mlp_norm`, x);
      add(this.config.n_expert ? this.mixture(`${block}.mlp`, h) : this.mlp(`${block}.mlp`, h, this.config.n_hidden));
    });
    return x;
  }

  /* softmax(q k^T / sqrt(head_dim)) v: each head's query weighs the values of the tokens it sees. With fewer heads of
     keys and values than of queries, groups of queries share one (arXiv:2305.13245). window 0: it sees all. */
  attention(layer, window, x, position) {
    const { n_head, n_kv_head, head_dim: D, n_embd, block_size, qk_norm, norm_eps, rope } = this.config;
    const name = `blocks.${layer}.attention`, nQueries = n_head * D, nKeys = n_kv_head * D;
    const qkv = this.linear(`${name}.qkv`, x, nQueries + 2 * nKeys); // queries of all heads, then keys, then values
    for (let head = 0; head < n_head + n_kv_head; head++) {
      const norm = this.weight(head < n_head ? `${name}.q_norm` : `${name}.k_norm`);
      if (qk_norm) rmsNorm(qkv, qkv, norm, norm_eps, head * D);
      if (rope) rotate(qkv, head * D, D, position, rope);
    }
    const keys = this.keys[layer], values = this.values[layer]; // (n_kv_head, block_size, D)
    for (let head = 0; head < n_kv_head; head++) {
      const k = nQueries + head * D, v = k + nKeys, at = (head * block_size + position) * D;
      keys.set(qkv.subarray(k, k + D), at);
      values.set(qkv.subarray(v, v + D), at);
    }

    const first = window ? Math.max(0, position - window + 1) : 0, n = position - first + 1;
    const scores = new Float64Array(n), y = new Float64Array(nQueries);
    for (let head = 0; head < n_head; head++) {
      const q = head * D, shared = Math.floor((head * n_kv_head) / n_head), start = (shared * block_size + first) * D;
      linear(scores, keys, qkv.subarray(q, q + D), null, start); // the keys are the rows of a matrix
      for (let t = 0; t < n; t++) scores[t] /= Math.sqrt(D);
      softmax(scores);
      for (let t = 0, v = start; t < n; t++, v += D) {
        const share = scores[t];
        for (let i = 0; i < D; i++) y[q + i] += share * values[v + i];
      }
    }
    return this.linear(`${name}.out`, y, n_embd);
  }

  mlp(name, x, n_hidden) {
    const { mlp, n_embd } = this.config;
    const up = this.linear(`${name}.up`, x, mlp === "swiglu" ? 2 * n_hidden : n_hidden); // swiglu: gate, then up
    return this.linear(`${name}.down`, activate(up, mlp, n_hidden), n_embd);
  }

  /* A mixture of experts: the router's likeliest MLPs, weighed by their probabilities (arXiv:1701.06538). */
  mixture(name, x) {
    const { n_embd, n_hidden, n_expert, n_expert_per_token: k, n_shared_expert } = this.config;
    const y = n_shared_expert ? this.mlp(`${name}.shared`, x, n_shared_expert * n_hidden) : new Float64Array(n_embd);
    const probabilities = softmax(this.linear(`${name}.router`, x, n_expert));
    const bias = this.tensors[`${name}.choice_bias`]; // it decides who is chosen, not how much they count
    const chosen = likeliest(bias ? probabilities.map((p, i) => p + bias[i]) : probabilities, k);
    const sum = k > 1 ? chosen.reduce((total, expert) => total + probabilities[expert], 0) : 1;
    for (const expert of chosen) {
      const up = new Float64Array(2 * n_hidden), down = new Float64Array(n_embd);
      linear(up, this.tensors[`${name}.up`], x, null, expert * 2 * n_hidden * n_embd);
      linear(down, this.tensors[`${name}.down`], activate(up, "swiglu", n_hidden), null, expert * n_embd * n_hidden);
      down.forEach((value, i) => (y[i] += (probabilities[expert] / sum) * value));
    }
    return y;
  }

  /* The score of every token of the vocabulary to come next. */
  logits(hidden) {
    const { tie_embeddings, vocab_size } = this.config;
    return this.linear(tie_embeddings ? "token_embedding" : "lm_head", hidden, vocab_size);
  }
}

/* The n numbers between the MLP's two layers; with a gate, x holds 2 n: gates, then what they let through. */
function activate(x, kind, n) {
  const f = ACTIVATIONS[kind], y = new Float64Array(n);
  for (let i = 0; i < n; i++) y[i] = f(x[i], x[n + i]);
  return y;
}

/* RoPE (arXiv:2104.09864): number i of a head and number i + D / 2 are a point in the plane, turned by an angle that
   grows with the position. rope: the angle per position of every pair, and a factor on the result (YaRN's). */
function rotate(x, start, D, position, { frequencies, scale }) {
  for (let i = 0; i < D / 2; i++) {
    const angle = Math.fround(position * frequencies[i]); // in float32, as in training
    const cos = scale * Math.cos(angle), sin = scale * Math.sin(angle);
    const a = x[start + i], b = x[start + i + D / 2];
    x[start + i] = a * cos - b * sin;
    x[start + i + D / 2] = b * cos + a * sin;
  }
}

// --------------------------------------------------------------------------------------------------------- sampling

/* The indices of the n largest numbers, largest first; of equal ones the first. */
function likeliest(numbers, n) {
  if (n > 100) return Array.from(numbers.keys()).sort((a, b) => numbers[b] - numbers[a] || a - b).slice(0, n);
  const best = [];
  for (let i = 0; i < numbers.length; i++) {
    if (best.length === n && !(numbers[i] > numbers[best[n - 1]])) continue;
    let place = best.length;
    while (place && numbers[i] > numbers[best[place - 1]]) place--;
    best.splice(place, 0, i);
    best.length = Math.min(best.length, n);
  }
  return best;
}

/* A token drawn from logits. A temperature below 1 sharpens the distribution, above 1 flattens it; 0 takes the
   likeliest. top_k: only the k likeliest. top_p: the fewest whose probabilities sum to p (arXiv:1904.09751). */
function sample(logits, { temperature, top_k, top_p }) {
  const top = likeliest(logits, 1)[0];
  if (temperature === 0) return top;
  const probabilities = softmax(logits.map((logit) => (logit - logits[top]) / temperature));
  let candidates = Array.from(probabilities.keys());
  if (top_k && top_k < candidates.length) candidates = likeliest(probabilities, top_k);
  let total = candidates.reduce((sum, token) => sum + probabilities[token], 0);
  if (top_p && top_p < 1) {
    candidates.sort((a, b) => probabilities[b] - probabilities[a]);
    let sum = 0, n = 0;
    while (n < candidates.length && sum < top_p * total) sum += probabilities[candidates[n++]];
    [candidates, total] = [candidates.slice(0, n), sum];
  }
  let rest = Math.random() * total;
  for (const token of candidates) if ((rest -= probabilities[token]) < 0) return token;
  return candidates[0]; // rounding left a rest
}

// ----------------------------------------------------------------------------------------------------- conversation

/* Why there is no answer: a key of the page's words, and what to put into them. */
class Refusal extends Error {
  constructor(key, values = {}) {
    super(key);
    Object.assign(this, { key, values });
  }
}

/* Token ids of a conversation; above the limit without its oldest turns, but never without the last. A turn is a
   question and what answers it; system messages stay. Returns [ids, number of turns left out]. */
function chatIds(tokenizer, template, messages, limit) {
  for (let n = 0; ; n++) {
    const ids = encodeChat(tokenizer, template, messages);
    const asked = messages.flatMap(({ role }, i) => (role === "user" ? [i] : []));
    if (ids.length <= limit || asked.length < 2) return [ids, n];
    const system = messages.slice(0, asked[1]).filter(({ role }) => role === "system");
    messages = [...system, ...messages.slice(asked[1])];
  }
}

/* The token ids to continue, and notes for the reader: [key, values]. As TextGenerator.prompt_ids() in Python. */
function promptIds({ tokenizer, template, network }, { is_chat, messages, settings }) {
  const window = network.config.block_size, limit = settings.max_length || window, notes = [];
  messages = messages.map((message) => ({ ...message, content: normalise(message.content) }));
  const last = messages[messages.length - 1].content, system = messages[0].role === "system" ? messages[0].content : "";
  const unknown = tokenizer.unknownCharacters(system + last);
  if (unknown.length) notes.push(["unknown_characters", { characters: unknown }]);
  let ids, n_forgotten = 0;
  if (is_chat) {
    const most = Math.floor((Math.min(limit, window) * 3) / 4);
    [ids, n_forgotten] = chatIds(tokenizer, template, messages, most);
    if (n_forgotten) notes.push(["forgotten", { n: n_forgotten }]);
  } else ids = [...template.begin_text, ...tokenizer.encode(last)];
  const n = ids.length;
  if (!n || (is_chat && !last.trim())) throw new Refusal("empty");
  if (is_chat && n >= window) throw new Refusal("too_long", { n, window });
  if (n >= window && !settings.max_length) {
    const begin = is_chat ? [] : template.begin_text, n_kept = window - Math.floor(window / 4);
    ids = [...begin, ...ids.slice(begin.length - n_kept)];
  }
  if (ids.length >= limit) throw new Refusal("max_length_reached", { n, limit });
  if (!is_chat && n >= window) notes.push(["cut", { n, read: Math.min(ids.length, window) }]);
  return [ids, notes];
}

/* Yields {token, logits}, one step at a time: read, score, draw, append, again. The first tokens, those of begun, are not
   drawn: the answer goes on from them. When the context window is full, the newest three quarters of it are kept and
   read again from position 0, as cached keys carry their old positions. */
async function* generate(network, ids, begun, n_tokens, settings, pause) {
  const window = network.config.block_size;
  let context = ids.slice(-window);
  for (let n = 0; n < n_tokens; n++) {
    const logits = network.logits(await network.read(context, pause));
    const token = n < begun.length ? begun[n] : sample(logits, settings);
    yield { token, logits };
    context.push(token);
    if (context.length > window) context = context.slice(-Math.max(1, window - Math.floor(window / 4)));
  }
}

// ---------------------------------------------------------------------------------------------------- in the worker

let model = null; // {tokenizer, template, network}
let current = 0; // number of the answer that is being given; 0: none

/* Lets messages in that wait, "stop" above all, at most every 16 ms. (setTimeout() would sleep for 4 ms a time.) */
const channel = new MessageChannel();
let last_pause = 0;
function letMessagesIn() {
  if (performance.now() - last_pause < 16) return undefined;
  return new Promise((resume) => {
    channel.port1.onmessage = () => resume((last_pause = performance.now()));
    channel.port2.postMessage(null);
  });
}

function load({ about, weights }) {
  const { config, tensors, tokenizer, template } = about;
  const kinds = { char: CharTokenizer, bpe: BPETokenizer };
  model = {
    tokenizer: new kinds[tokenizer.kind](tokenizer),
    template,
    network: new Network(config, readTensors(tensors, fromBase64(weights))),
  };
  postMessage({ type: "ready" });
}

/* One answer, token by token: the text that it completes, how likely it was, and the ten likeliest. */
async function answer(request) {
  const { number, settings, begun } = request, { tokenizer, template, network } = model;
  current = number;
  const tell = (type, values) => postMessage({ type, number, ...values });
  class Stopped extends Error {}
  const pause = async () => {
    await letMessagesIn();
    if (current !== number) throw new Stopped();
  };
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true }); // a character may be spread over several tokens
  let n_tokens = 0, first = 0, reason = "length";
  try {
    const [ids, notes] = promptIds(model, request);
    for (const [key, values] of notes) tell("note", { key, values });
    const limit = settings.max_length || network.config.block_size;
    for await (const { token, logits } of generate(network, ids, begun, limit - ids.length, settings, pause)) {
      first = first || performance.now();
      n_tokens++;
      const probabilities = softmax(logits), is_end = template.stop_tokens.includes(token);
      const bytes = tokenizer.bytes(token), text = is_end ? "" : decoder.decode(bytes, { stream: true });
      const others = likeliest(probabilities, 10).map((id) => [nameOf(tokenizer, id), probabilities[id], id]);
      tell("token", { text, name: nameOf(tokenizer, token), id: token, probability: probabilities[token], others, is_end });
      if (is_end) {
        reason = "end";
        break;
      }
    }
  } catch (error) {
    if (error instanceof Refusal) return tell("refused", { key: error.key, values: error.values });
    if (!(error instanceof Stopped)) throw error;
    reason = "stopped";
  }
  const seconds = (performance.now() - first) / 1000;
  tell("done", { reason, text: decoder.decode(), n_tokens, tokens_per_second: (n_tokens - 1) / seconds });
}

addEventListener("message", async ({ data }) => {
  try {
    if (data.type === "load") load(data);
    if (data.type === "stop") current = 0;
    if (data.type === "answer") await answer(data);
  } catch (error) {
    postMessage({ type: "failed", message: String(error) }); // no memory for the weights, say
  }
});
