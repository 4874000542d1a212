// What the page says in words: a status, a message that can be closed, and a veil over the avatar.

const $ = (id) => document.getElementById(id);

let fading = null;

export function status(text) {
  if ($("status").textContent !== text) $("status").textContent = text;
}

// Empty: nothing is wrong any more. `seconds`: good news need not stay.
export function notice(text, { seconds = 0, kind = "problem" } = {}) {
  clearTimeout(fading);
  $("notice-text").textContent = text ?? "";
  $("notice").hidden = !text;
  $("notice").dataset.kind = kind;
  if (seconds) fading = setTimeout(notice, 1000 * seconds, null);
}

// `count`: changes each second, and is not read out each time. `cancel`: the button's word.
export function veil(text, { count = null, cancel = null } = {}) {
  $("veil").hidden = !text;
  if ($("veil-text").textContent !== text) $("veil-text").textContent = text ?? "";
  $("veil-count").textContent = count ?? "";
  $("veil-cancel").hidden = !cancel;
  if (cancel) $("veil-cancel").textContent = cancel;
}

$("notice-close").onclick = () => notice(null);
