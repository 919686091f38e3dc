/* A conversation is a tree, so that nothing is lost when a question is edited or an answer is given again:

       root ── question ── answer ── question ── answer
           │           └── answer             (given again, branched from a token, or by another model beside it)
           └── question                       (the first one, edited)

   A node is {role, content, children, at}; `at` is the child that is shown. What is shown from the root on is the path.
   Two answers stand beside each other where a question has `beside`, the place of the second. The first question may
   have `images`, see images.js. */

export function newConversation() {
  const id = `${Date.now()}-${Math.random().toString(36).slice(2, 8)}`; // tells when it began, too
  return { id, is_chat: true, system: "", root: { children: [], at: 0 } };
}

export function addChild(parent, values) {
  const node = { content: "", children: [], ...values };
  if (node.role === "user") node.at = 0;
  parent.children.push(node);
  parent.at = parent.children.length - 1;
  return node;
}

export function removeChild(parent, node) {
  parent.children.splice(parent.children.indexOf(node), 1);
  parent.at = Math.max(0, parent.children.length - 1);
  delete parent.beside;
}

/* The nodes below the root that lead to one, itself the last. */
export function pathTo(node, parent) {
  for (const child of parent.children) {
    const rest = child === node ? [] : pathTo(node, child);
    if (rest) return [child, ...rest];
  }
  return null;
}

/* The nodes that are shown: question, answer, question, ... */
export function shownPath(conversation) {
  const path = [];
  for (let node = conversation.root; (node = node.children[node.at ?? 0]); ) path.push(node);
  return path;
}

export function parentOf(conversation, node) {
  return pathTo(node, conversation.root).at(-2) ?? conversation.root;
}

/* The answers of a question that are shown: one, or two beside each other. */
export function shownAnswers({ children, at, beside }) {
  if (beside === undefined) return children.length ? [children[at]] : [];
  return [...new Set([at, beside])].sort((a, b) => a - b).map((i) => children[i]);
}

/* Messages as OpenAI's API and our files for fine-tuning have them. */
export function messagesOf(conversation, path) {
  const system = conversation.is_chat && conversation.system ? [{ role: "system", content: conversation.system }] : [];
  const nodes = conversation.is_chat ? path : path.slice(-1); // a text to continue stands alone
  return [...system, ...nodes.map(({ role, content, images }) => ({ role, content, ...(images && { images }) }))];
}

export const isAboutImage = ({ root }) => root.children.some(({ images }) => images);

/* Without the n oldest turns: a turn is a question and what answers it; system messages stay. */
export function withoutOldestTurns(messages, n) {
  const first = messages.flatMap(({ role }, i) => (role === "user" ? [i] : []))[n];
  return [...messages.slice(0, first).filter(({ role }) => role === "system"), ...messages.slice(first)];
}
