/* Training: the runs whose logs lie in the server's folder, and the curves of one or two of them. */

import { $, make } from "./elements.js";
import { call, callJson } from "./server.js";
import { number, say, word } from "./words.js";

const SECONDS = 5; // between two looks at the logs
let plotted = null; // names of the runs whose curves are shown, the one chosen last at the end; null: not chosen yet
let drawn = ""; // what the picture shows: it is only drawn again when a log has grown
let timer = null;

export function showTraining(is_shown) {
  $("training").hidden = !is_shown;
  clearTimeout(timer);
  if (is_shown) look();
}

async function look() {
  clearTimeout(timer);
  try {
    if (!document.hidden) await showRuns();
  } catch ({ message }) {
    say($("training-notice"), "failed_training", { message });
  }
  if (!$("training").hidden) timer = setTimeout(look, SECONDS * 1000);
}

async function showRuns() {
  const { runs } = await callJson("/training");
  $("runs").hidden = !runs.length;
  say($("training-notice"), runs.length ? "" : "no_runs");
  plotted ??= runs.slice(0, 1).map(({ name }) => name);
  plotted = plotted.filter((name) => runs.some((run) => run.name === name));
  showTable(runs);
  const chosen = runs.filter(({ name }) => plotted.includes(name));
  const state = JSON.stringify([plotted, chosen.map(({ step, val_loss }) => [step, val_loss])]);
  if (state === drawn) return;
  await draw(chosen);
  drawn = state;
}

/* The row that has the focus keeps it: only texts change, unless a run has come. */
function showTable(runs) {
  const body = $("runs").tBodies[0];
  if ([...body.rows].map((row) => row.dataset.name).join() !== runs.map(({ name }) => name).join()) {
    body.replaceChildren();
    for (const { name } of runs) {
      const row = body.insertRow(), choose = make("input", "", row.insertCell());
      row.dataset.name = name;
      Object.assign(choose, { type: "checkbox", ariaLabel: name, checked: plotted.includes(name) });
      choose.addEventListener("change", () => plot(name, choose.checked));
      for (let i = 0; i < 5; i++) row.insertCell();
    }
  }
  runs.forEach((run, i) => {
    const [, ...cells] = body.rows[i].cells;
    const texts = [
      `${run.stage} ${run.name.replace(/^train_|\.log$/g, "")}`,
      run.max_steps ? `${number(run.step ?? 0)} / ${number(run.max_steps)}` : number(run.step ?? 0),
      loss(run.val_loss),
      run.best_checkpoint ? `${loss(run.best_val_loss)} ${run.best_checkpoint}` : "",
      stateOf(run),
    ];
    cells.forEach((cell, column) => (cell.textContent = texts[column]));
  });
}

const loss = (value) => (value === null ? "" : value.toFixed(4));

function stateOf({ running, seconds_left: seconds }) {
  if (!running) return word("ended");
  if (seconds === null) return word("running");
  const minutes = Math.ceil(seconds / 60);
  return word("time_left", { hours: Math.floor(minutes / 60), minutes: minutes % 60 });
}

/* Two at most: a third takes the place of the one chosen first. */
function plot(name, is_chosen) {
  plotted = plotted.filter((other) => other !== name);
  if (is_chosen) plotted = [...plotted, name].slice(-2);
  for (const { dataset, cells } of $("runs").tBodies[0].rows) {
    cells[0].firstElementChild.checked = plotted.includes(dataset.name);
  }
  look();
}

async function draw(runs) {
  const picture = $("curves"), before = picture.src;
  if (!runs.length) return (picture.hidden = true);
  const query = new URLSearchParams(runs.map(({ name }) => ["log", name]));
  // fetched, as <img src> could not send the key; shown as an image, in which no script runs
  picture.src = URL.createObjectURL(await (await call(`/training/curves.svg?${query}`)).blob());
  picture.hidden = false;
  picture.alt = word("curves", { names: runs.map(({ name }) => name).join(", ") });
  if (before) URL.revokeObjectURL(before);
}
