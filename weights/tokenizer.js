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
  constructor({ tokens, merges, splits }) {
    this.tokens = tokens; // spelled in the byte alphabet, in the order of their ids
    this.ids = new Map(tokens.map((token, id) => [token, id]));
    this.ranks = new Map(merges.map((merge, rank) => [merge, rank])); // "left right"
    this.splits = splits.map((pattern) => new RegExp(pattern, "gu")); // one after the other
    this.alphabet = byteAlphabet();
    this.byteOf = new Map(this.alphabet.map((character, byte) => [character, byte]));
    this.known = new Map(); // word -> ids
  }

  encode(text) {
    let pieces = [text.replace(/\p{Cs}/gu, "?")]; // half of a UTF-16 pair is no text
    for (const pattern of this.splits) pieces = pieces.flatMap((piece) => isolate(piece, pattern));
    return pieces.flatMap((piece) => this.encodeWord(piece));
  }

  encodeWord(word) {
    if (this.known.has(word)) return this.known.get(word);
    let parts = Array.from(utf8.encode(word), (byte) => this.alphabet[byte]);
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
    return Uint8Array.from(this.tokens[id], (character) => this.byteOf.get(character));
  }

  unknownCharacters() {
    return []; // every text is bytes
  }
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
function nameOf(bytes) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return Array.from(bytes, (byte) => `\\x${byte.toString(16).padStart(2, "0").toUpperCase()}`).join("");
  }
}

/* Line ends as \n and no byte-order mark in front, as in the training texts. */
function normalise(text) {
  return text.replace(/^\uFEFF/, "").replace(/\r\n?/g, "\n");
}

/* Token ids of a conversation. The template says what stands before and after a message of each role: texts, which
   become tokens together with the message, and ids of special tokens, which nobody can type. */
function encodeChat(tokenizer, template, messages) {
  const pieces = [], system = [];
  for (const { role, content } of messages) {
    const { before, after } = template[role];
    const isHeld = role === "system" && template.system_in_question; // until the next question
    const inside = role === "user" ? system.splice(0) : [];
    (isHeld ? system : pieces).push(...before, ...inside, content, ...after);
  }
  const ids = [];
  let text = "";
  for (const piece of [...pieces, ...template.prompt, 0]) { // the 0 at the end only flushes the last text
    if (typeof piece === "string") text += piece;
    else {
      ids.push(...tokenizer.encode(text), piece);
      text = "";
    }
  }
  return ids.slice(0, -1);
}
