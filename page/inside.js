/* Look inside: what the model attended to when it chose a token, and which experts computed.

   A token is chosen by what stands at the position before it: from there attention looks at all tokens before the new
   one, with a weight for each; the weights of a head sum to 1. */

import { withoutOldestTurns } from "./conversation.js";
import { $, make, visible } from "./elements.js";
import { callJson, tokenize } from "./server.js";
import { percent, say, word } from "./words.js";

const N_LISTED = 5; // tokens with the largest weights, which are also listed
let looked_into = null; // {names, attention, name} of the token that is looked into

/* asked: {is_chat, messages} of the question; answer: its node; place: of the token in it. */
export async function lookInside({ is_chat, messages }, answer, place) {
  const before = answer.tokens.slice(0, place), { model } = answer;
  const n_forgotten = answer.notes.find(([key]) => key === "forgotten")?.[1].n ?? 0;
  const { tokens, pieces } = await tokenize(model, is_chat, withoutOldestTurns(messages, n_forgotten));
  const ids = [...tokens, ...before.map(({ id }) => id)];
  const names = [...pieces, ...before.map(({ name }) => name)];
  const { attention, experts } = await callJson("/inspect", { model, tokens: ids, position: ids.length - 1 });
  looked_into = { names, attention, name: answer.tokens[place].name };
  const choices = (id, n, first) => {
    const chosen = $(id).selectedIndex;
    $(id).replaceChildren(...first, ...Array.from({ length: n }, (_, i) => new Option(i + 1, i)));
    $(id).selectedIndex = chosen >= 0 && chosen < $(id).length ? chosen : 0;
  };
  choices("layer", attention.length, []);
  choices("head", attention[0].length, [new Option(word("mean"), "mean")]);
  showExperts(experts);
  showAttention();
  $("inside").showModal();
}

/* The weights of one head of the layer, or the mean of all its heads. */
function chosenWeights() {
  const heads = looked_into.attention[$("layer").value], head = $("head").value;
  if (head !== "mean") return heads[head];
  return heads[0].map((_, j) => heads.reduce((sum, weights) => sum + weights[j], 0) / heads.length);
}

function showAttention() {
  const weights = chosenWeights(), most = Math.max(...weights);
  say($("inside-help"), "inside_help", { name: visible(looked_into.name) });
  $("attended").replaceChildren();
  weights.forEach((weight, j) => {
    const token = make("span", "", $("attended"));
    token.textContent = looked_into.names[j] + (looked_into.names[j] === "\n" ? "" : "\u200b"); // a line may end behind each
    token.title = `${visible(looked_into.names[j])} ${percent(weight)}`;
    token.style.setProperty("--weight", (weight / most).toFixed(4));
  });
  make("span", "next", $("attended")).textContent = visible(looked_into.name);
  const order = weights.map((weight, j) => [weight, j]).sort((one, other) => other[0] - one[0]);
  $("most-attended").replaceChildren();
  for (const [weight, j] of order.slice(0, N_LISTED)) {
    const row = make("li", "", $("most-attended"));
    make("span", "text", row).textContent = visible(looked_into.names[j]);
    make("span", "bar", row).style.setProperty("--p", weight);
    make("span", "percent", row).textContent = percent(weight);
  }
  $("attended").ariaLabel = word("attention_of", { layer: +$("layer").value + 1, name: visible(looked_into.name) });
}

/* Of every layer that is a mixture: the experts that the router chose, and the share of each in the output. */
function showExperts(experts) {
  $("experts").hidden = !experts;
  const list = $("experts").querySelector("ol");
  list.replaceChildren();
  for (const chosen of experts ?? []) {
    make("li", "", list).textContent = chosen.map(({ id, weight }) => `${id} (${percent(weight)})`).join(", ");
  }
}

export function listenToInside() {
  $("layer").addEventListener("change", showAttention);
  $("head").addEventListener("change", showAttention);
}
