/* Conversations kept in the browser: each under a key of its own in localStorage, which holds about 5 million characters
   and may be switched off. Two tabs do not overwrite each other's conversations. */

const PREFIX = "nano:conversation:";

/* Those that are kept, the newest first. */
export function keptConversations() {
  const keys = keptKeys();
  return keys.sort().reverse().map((key) => parse(localStorage.getItem(key))).filter(Boolean);
}

function keptKeys() {
  try {
    return Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
  } catch {
    return []; // switched off
  }
}

function parse(text) {
  try {
    const conversation = JSON.parse(text);
    return Array.isArray(conversation.root.children) ? conversation : null;
  } catch {
    return null; // not ours
  }
}

/* Whether there was room. Where it is short, the probabilities of the oldest conversations are given up, never a word
   of what was said. */
export function keep(conversation) {
  const key = PREFIX + conversation.id, text = JSON.stringify(conversation, rounded);
  for (const other of [null, ...keptKeys().sort().filter((name) => name !== key)]) {
    try {
      if (other) localStorage.setItem(other, JSON.stringify(parse(localStorage.getItem(other)), withoutTokens));
      localStorage.setItem(key, text);
      return true;
    } catch {
      // full: the next one has to give
    }
  }
  try {
    localStorage.setItem(key, JSON.stringify(conversation, withoutTokens));
    return true;
  } catch {
    return false;
  }
}

export function forget(conversation) {
  localStorage.removeItem(PREFIX + conversation.id);
}

const rounded = (_, value) => (typeof value === "number" && !Number.isInteger(value) ? Number(value.toPrecision(4)) : value);
const withoutTokens = (key, value) => (key === "tokens" ? [] : value);
