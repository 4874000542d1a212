// Recording: on and off, and the file when it is done.

import * as api from "./api.js";
import { notice } from "./notices.js";

const $ = (id) => document.getElementById(id);

const clock = (seconds) => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;

export class Recorder {
  #session;
  #url = null;

  on = false;

  constructor(session) {
    this.#session = session;
    $("record").onclick = () => this.#toggle();
  }

  async #toggle() {
    const { kept } = this.#session() ?? {};
    if (!kept) return;
    try {
      if (this.on) await api.stopRecording(kept);
      else this.show(await api.record(kept));
    } catch (problem) {
      return notice(problem.message);
    }
    if (this.on && $("record").getAttribute("aria-pressed") === "true") return;
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
      $("recording-about").textContent = `MP4, ${(file.size / 1e6).toFixed(1)} MB, marked as AI-generated`;
      $("recording").hidden = false;
    } catch (problem) {
      notice(`The recording cannot be fetched. ${problem.message}`);
    }
  }
}
