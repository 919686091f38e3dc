"use strict";
/* Text to tokens and back: one token per character, or byte-level BPE; and how a conversation becomes tokens.
   The same in Python: text/tokenizer.py. */

const utf8 = new TextEncoder();

/* One token per character; the special tokens come first. */
class CharTokenizer {
  constructor({ special_tokens, characters, unknown }) {
    this.names = [...special_tokens, ...characters]; // `...` of a text gives its characters, not its UTF-16 units
    this.unknown = unknown;
    this.ids = new Map(this.names.map((name, id) => [name, id]));
  }

  encode(text) {
    return Array.from(text, (character) => this.ids.get(character) ?? this.unknown);
  }

  bytes(id) {
    return utf8.encode(this.names[id]);
  }

  unknownCharacters(text) {
    return [...new Set(text)].filter((character) => !this.ids.has(character));
  }
}

/* GPT-2's printable character for every byte: itself if it is one, else the next free one from U+0100 on. */
function byteAlphabet() {
  const isPrintable = (byte) => (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
  let free = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCharCode(isPrintable(byte) ? byte : free++));
}

/* Byte-level BPE (arXiv:1508.07909): text is split into words, a word into bytes; then the pair of neighbours that
   was learned first becomes one token, again and again, until no rule applies. */
class BPETokenizer {
  constructor({ tokens, merges, splits, is_nfc, takes_whole_words, added }) {
    Object.assign(this, { is_nfc, takes_whole_words });
    added.sort((a, b) => b.length - a.length); // of two that begin alike the longer one is taken
    this.added = added.length ? new RegExp(added.map(escapePattern).join("|"), "gu") : null;
    this.tokens = tokens; // spelled in the byte alphabet, in the order of their ids
    this.ids = new Map(tokens.map((token, id) => [token, id]));
    this.ranks = new Map(merges.map((merge, rank) => [merge, rank])); // "left right"
    this.splits = splits.map((pattern) => new RegExp(pattern, "gu")); // one after the other
    this.alphabet = byteAlphabet();
    this.byteOf = new Map(this.alphabet.map((character, byte) => [character, byte]));
    this.known = new Map(); // word -> ids
  }

  encode(text) {
    const valid = text.replace(/\p{Cs}/gu, "?"); // half of a UTF-16 pair is no text
    const parts = this.added ? isolate(valid, this.added) : [valid];
    return parts.flatMap((part) => {
      if (this.added && part.search(this.added) === 0) return [this.ids.get(part)];
      let words = [this.is_nfc ? part.normalize("NFC") : part];
      for (const pattern of this.splits) words = words.flatMap((word) => isolate(word, pattern));
      return words.flatMap((word) => this.encodeWord(word));
    });
  }

  encodeWord(word) {
    if (this.known.has(word)) return this.known.get(word);
    let parts = Array.from(utf8.encode(word), (byte) => this.alphabet[byte]);
    if (this.takes_whole_words && this.ids.has(parts.join(""))) return [this.ids.get(parts.join(""))];
    const rank = (i) => this.ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
    for (;;) {
      let first = 0;
      for (let i = 1; i < parts.length - 1; i++) if (rank(i) < rank(first)) first = i;
      if (parts.length < 2 || rank(first) === Infinity) break;
      const [left, right] = [parts[first], parts[first + 1]], merged = [];
      for (let i = 0; i < parts.length; i++) {
        const fits = parts[i] === left && parts[i + 1] === right;
        merged.push(fits ? left + right : parts[i]);
        if (fits) i++;
      }
      parts = merged;
    }
    const ids = parts.map((part) => this.ids.get(part));
    this.known.set(word, ids);
    return ids;
  }

  bytes(id) {
    const token = this.tokens[id], bytes = Array.from(token, (character) => this.byteOf.get(character));
    return bytes.includes(undefined) ? utf8.encode(token) : Uint8Array.from(bytes); // an added token is plain text
  }

  unknownCharacters() {
    return []; // every text is bytes
  }
}

/* A text as a pattern that finds it alone. */
function escapePattern(text) {
  return text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&");
}

/* A text cut into what a pattern finds and what lies between. */
function isolate(text, pattern) {
  const pieces = [];
  let end = 0;
  for (const { 0: found, index } of text.matchAll(pattern)) {
    pieces.push(text.slice(end, index), found);
    end = index + found.length;
  }
  return [...pieces, text.slice(end)].filter((piece) => piece);
}

/* What people read for a token by itself: its text, or its bytes where they are only a part of a character. */
function nameOf(tokenizer, id) {
  const bytes = tokenizer.bytes(id);
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes) || `#${id}`; // an id without use
  } catch {
    return Array.from(bytes, (byte) => `\\x${byte.toString(16).padStart(2, "0").toUpperCase()}`).join("");
  }
}

/* Line ends as \n and no byte-order mark in front, as in the training texts. */
function normalise(text) {
  return text.replace(/^\uFEFF/, "").replace(/\r\n?/g, "\n");
}

/* Token ids of a conversation that ends with a question, up to where the answer begins. The template says what stands
   around the messages of each role: texts and ids of special tokens, which nobody can type. Texts side by side become
   tokens together, but for a null between them. */
function encodeChat(tokenizer, template, messages) {
  const { begin, default_system, system_in_question, strips } = template;
  if (default_system && messages[0].role !== "system") {
    messages = [{ role: "system", content: default_system }, ...messages];
  }
  const pieces = [...begin, null], system = []; // system: waits for the next question
  for (const { role, content } of messages) {
    const { before, after } = template[role], text = strips ? strip(content) : content;
    if (role === "assistant") pieces.push(...before, null, text, ...after, null);
    else if (role === "user") pieces.push(...before, ...system.splice(0), text, ...after, null);
    else if (system_in_question) system.push(...before, text, ...after);
    else pieces.push(...before, text, ...after, null);
  }
  pieces.push(...template.assistant.before, null);

  const ids = [];
  let text = "";
  for (const piece of pieces) {
    if (typeof piece === "string") text += piece;
    else {
      for (const id of tokenizer.encode(text)) ids.push(id);
      if (piece !== null) ids.push(piece);
      text = "";
    }
  }
  return ids;
}

/* The text without white space around it, as Python's strip() sees it. */
function strip(text) {
  return text.replace(/^[\p{White_Space}\x1c-\x1f]+|[\p{White_Space}\x1c-\x1f]+$/gu, "");
}
