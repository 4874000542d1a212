// Recording: on and off, and the file when it is done.

import * as api from "./api.js";
import { notice } from "./notices.js";

const $ = (id) => document.getElementById(id);

const clock = (seconds) => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;

export class Recorder {
  #url = null;

  on = false;

  // `session()`: the one that runs now. `marked`: files carry a mark that no eye sees.
  constructor(session, { marked }) {
    this.marked = marked;
    $("record").onclick = () => session()?.kept && this.#toggle(session().kept);
  }

  async #toggle(kept) {
    try {
      if (this.on) await api.stopRecording(kept); // an event tells that it is done
      else this.show(await api.record(kept));
    } catch (problem) {
      notice(problem.message);
    }
  }

  // What the server says about the recording.
  show({ state, seconds }) {
    this.on = state === "on";
    $("record").setAttribute("aria-pressed", this.on);
    $("recorded").hidden = !this.on;
    $("recorded-time").textContent = clock(seconds);
  }

  // Fetches the file: the server keeps it only for a while.
  async fetch(kept) {
    try {
      const file = await api.recording(kept);
      if (this.#url) URL.revokeObjectURL(this.#url);
      this.#url = URL.createObjectURL(file);
      $("playback").src = $("download").href = this.#url;
      const mark = this.marked ? ", invisibly marked as AI-generated" : "";
      $("recording-about").textContent = `MP4, ${(file.size / 1e6).toFixed(1)} MB${mark}`;
      $("recording").hidden = false;
    } catch (problem) {
      notice(`The recording cannot be fetched. ${problem.message}`);
    }
  }
}
