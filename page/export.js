/* Conversations as files for data.py, a JSON object a line: so what people think of answers becomes training data.
   Those about images are left out: there an image is a file of its own. */

import { isAboutImage, messagesOf, pathTo, shownPath } from "./conversation.js";

const GOOD = 1, BAD = -1; // an answer's rating
const isText = (conversation) => conversation.is_chat && !isAboutImage(conversation);

/* Conversations as they are shown, for fine-tuning (sft); the loss is not taken on answers with weight 0, the bad ones. */
export function shownLines(conversations) {
  return sftLines(conversations, (conversation) => [shownPath(conversation)], (answer) => answer.rating !== BAD);
}

/* The good answers alone, on all branches, each after what was said before it, which has weight 0 unless good, too. */
export function goodLines(conversations) {
  return sftLines(conversations, ({ root }) => pathsToGood(root), (answer) => answer.rating === GOOD);
}

/* Paths that end with a good answer after which no other good one comes. */
function pathsToGood(node) {
  const below = node.children.flatMap((child) => pathsToGood(child).map((path) => [child, ...path]));
  return below.length || node.rating !== GOOD ? below : [[]];
}

function sftLines(conversations, pathsOf, isLearned) {
  const lines = [];
  for (const conversation of conversations.filter(isText)) {
    for (let path of pathsOf(conversation)) {
      path = path.slice(0, path.findLastIndex((node) => node.role === "assistant" && isLearned(node)) + 1);
      if (!path.length) continue;
      const said = path.map((node) => (node.role === "assistant" && !isLearned(node) ? { weight: 0 } : {}));
      const messages = messagesOf(conversation, path), n_before = messages.length - path.length; // a system message
      lines.push({ messages: messages.map((message, i) => ({ ...message, ...said[i - n_before] })) });
    }
  }
  return lines;
}

/* Pairs of a good and a bad answer to the same question, for preference tuning (dpo). */
export function pairLines(conversations) {
  const lines = [];
  for (const conversation of conversations.filter(isText)) {
    const visit = (node) => {
      const rated = (rating) => node.children.filter((child) => child.rating === rating).map((child) => child.content);
      for (const chosen of rated(GOOD)) {
        for (const rejected of rated(BAD)) {
          const prompt = messagesOf(conversation, pathTo(node, conversation.root));
          if (chosen !== rejected) lines.push({ prompt, chosen, rejected });
        }
      }
      node.children.forEach(visit);
    };
    visit(conversation.root);
  }
  return lines;
}

export function download(lines, name) {
  const text = lines.map((line) => `${JSON.stringify(line)}\n`).join("");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // the browser reads it after the click
}
