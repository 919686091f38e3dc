/* The dialog of settings: how tokens are drawn, as inference.py has it. A field's data-setting is the setting's name. */

import { $ } from "./elements.js";
import { say } from "./words.js";

export const isChat = () => document.querySelector('[name="mode"]:checked').value === "chat";

/* {temperature, top_k, ...}; an empty field is null: no limit. */
export function readSettings() {
  const settings = {};
  for (const field of document.querySelectorAll("[data-setting]")) {
    const value = field.type === "text" ? field.value : field.valueAsNumber;
    settings[field.dataset.setting] = field.value === "" ? null : value;
  }
  return settings;
}

export function useMode(is_chat) {
  document.querySelector(`[name="mode"][value="${is_chat ? "chat" : "text"}"]`).checked = true;
  $("system-field").hidden = !is_chat;
  const key = is_chat ? "ask" : "ask_text";
  Object.assign($("question").dataset, { hint: key, label: key });
}

export function listenToSettings() {
  const show = () => say($("temperature-value"), "decimal", { value: $("temperature").valueAsNumber });
  show();
  $("temperature").addEventListener("input", show);
  $("settings-button").addEventListener("click", () => $("settings").showModal());
  $("settings").addEventListener("close", () => {
    // Escape leaves a number that is none: forget it
    for (const field of $("settings").querySelectorAll("input")) if (!field.checkValidity()) field.value = "";
  });
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", ({ target }) => target === dialog && dialog.close()); // beside it
  }
}
