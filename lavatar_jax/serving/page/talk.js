// What else the avatar can be given to say: a text, or a sound file.

import * as api from "./api.js";
import { notice, status } from "./notices.js";

const $ = (id) => document.getElementById(id);

// `session()`: the one that runs now.
export function setUpTalk(config, session) {
  const { available, voices, default_voice: usual } = config.tts;
  $("text").maxLength = config.limits.text_chars;
  $("text").disabled = $("say").disabled = !available;
  $("text").hidden = $("say").hidden = !available;
  if (!available)
    $("talk-hint").textContent =
      "This server cannot speak texts: no text-to-speech is installed on it (flite is enough).";
  $("voice-field").hidden = voices.length < 2;
  $("voice").replaceChildren(...voices.map((voice) => new Option(voice, voice, voice === usual, voice === usual)));

  $("talk").onsubmit = async (event) => {
    event.preventDefault();
    const text = $("text").value.trim();
    if (!text || !session()?.kept) return;
    $("text").value = "";
    const said = await queue(() => api.say(session().kept, text, $("voice").value));
    if (!said && !$("text").value) $("text").value = text;
  };
  $("text").onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("talk").requestSubmit();
  };
  $("file-button").onclick = () => $("file").click();
  $("file").onchange = () => {
    const file = $("file").files[0];
    $("file").value = "";
    if (file && session()?.kept) queue(() => api.play(session().kept, file));
  };
}

async function queue(ask) {
  try {
    const { seconds } = await ask();
    notice(null);
    if (seconds) status(`${seconds.toFixed(1)} s to say`); // 0: it was interrupted
    return true;
  } catch (problem) {
    notice(problem.message);
    return false;
  }
}
