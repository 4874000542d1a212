// The level meter: rises at once, falls slowly.

const QUIETEST = -60; // decibels
const FALL = 0.92; // for every 20 ms

const bar = document.getElementById("level");
const meter = document.getElementById("meter");
let level = 0;

export function showLevel(decibels) {
  const now = Math.max(0, Math.min(1, 1 - decibels / QUIETEST));
  level = Number.isFinite(decibels) ? Math.max(now, FALL * level) : 0;
  bar.style.transform = `scaleX(${level.toFixed(3)})`;
  meter.setAttribute("aria-valuenow", Math.round(100 * level));
}
