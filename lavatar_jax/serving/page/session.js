// A session from wish to end: it waits for a place, connects, and comes back after a loss.

import * as api from "./api.js";
import * as webrtc from "./webrtc.js";
import * as websocket from "./websocket.js";

const WAITS = new Set(["busy", "starting", "rate_limited"]);
const GONE = new Set(["unauthorized", "not_found"]);
const NO_SERVER = new Set(["unreachable", "stopping"]); // another way would lead there too
const FIRST_FRAME = 6000; // milliseconds; without one, another way may do better
const SILENT = 5000; // milliseconds without an event, of which there is one every second: the line is dead
const RESTART = 600; // seconds for which a server keeps sessions when it restarts
const KEPT = "session"; // in sessionStorage: what a reload of the page goes on with

const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

export const left = () => JSON.parse(sessionStorage.getItem(KEPT) ?? "null");

export class Session {
  #way = null;
  #ways;
  #cancelled = new AbortController();
  #heard = 0;
  #over = false;
  #restarts = false; // the server: it will know the session again
  #seen = () => {};

  kept = null; // id and token

  // `changed(state, about)`: opening, waiting (message, seconds), connecting, live, lost (seconds), over (message).
  constructor({ config, microphone, screen, force, changed, told }) {
    Object.assign(this, { config, microphone, screen, changed, told });
    const known = { webrtc, ws: websocket };
    this.#ways = Object.entries(known)
      .filter(([name, way]) => (force in known ? name === force : way.supported()))
      .map(([, way]) => way);
    screen.onFirstFrame = () => {
      if (!this.#over) changed("live");
      this.#seen(true);
    };
  }

  get way() {
    return this.#way?.name ?? null;
  }

  async open(wish) {
    try {
      this.#keep(await this.#patiently(() => api.openSession(wish, this.#cancelled.signal)));
      await this.#connect();
    } catch (problem) {
      await this.#failed(problem);
    }
  }

  // Goes on with the session that a page had before it was loaded again.
  async resume(kept) {
    this.kept = kept;
    await this.#comeBack();
  }

  #keep({ id, token }) {
    this.kept = { id, token };
    sessionStorage.setItem(KEPT, JSON.stringify(this.kept));
  }

  async #patiently(ask) {
    for (;;) {
      this.changed("opening");
      try {
        return await ask();
      } catch (problem) {
        if (!WAITS.has(problem.code) || problem.retryAfter === null) throw problem;
        for (let seconds = problem.retryAfter; seconds > 0; seconds--) {
          this.changed("waiting", { code: problem.code, message: problem.message, seconds });
          await sleep(1000);
          this.#cancelled.signal.throwIfAborted();
        }
      }
    }
  }

  async #connect() {
    this.changed("connecting");
    let problem = new Error("This browser knows neither WebRTC with H.264 nor WebCodecs; a newer one does.");
    for (const way of this.#ways) {
      try {
        this.#heard = performance.now();
        const { kept, microphone, screen: view } = this;
        const lost = () => this.#comeBack();
        const told = (event) => this.#event(event);
        const seen = new Promise((resolve) => (this.#seen = resolve)); // a frame may come before `connect` is done
        const opened = await way.connect({ kept, microphone, view, told, lost });
        if (this.#over) return opened.close();
        this.#way = opened;
        const isLast = way === this.#ways.at(-1);
        const isGood = isLast || (await Promise.race([seen, sleep(FIRST_FRAME)]));
        if (this.#way !== opened) return; // lost, or closed, meanwhile
        if (isGood) {
          this.#ways = [way, ...this.#ways.filter((other) => other !== way)];
          this.#restarts = false;
          return this.#watch(opened);
        }
        opened.close();
      } catch (failure) {
        problem = failure;
        if (GONE.has(failure.code) || NO_SERVER.has(failure.code)) break;
      }
    }
    throw problem;
  }

  #watch(way) {
    const timer = setInterval(() => {
      if (this.#way !== way) return clearInterval(timer);
      if (performance.now() - this.#heard < SILENT) return;
      clearInterval(timer);
      way.close();
      this.#comeBack();
    }, 500);
  }

  // After a loss: again and again, for as long as the server keeps the session, or has yet to take it up again.
  async #comeBack() {
    if (this.#over) return;
    this.#way = null;
    let end = 0;
    const patient = (seconds) => (end = Math.max(end, performance.now() + 1000 * seconds));
    patient(this.#restarts ? RESTART : this.config.reconnect_seconds);
    for (let pause = 300; performance.now() < end && !this.#over; pause = Math.min(1.5 * pause, 3000)) {
      this.changed("lost", { seconds: Math.ceil((end - performance.now()) / 1000), restarts: this.#restarts });
      try {
        const about = await api.session(this.kept);
        if (about.state !== "closed") return await this.#connect();
        if (about.reason.code !== "restart") return this.#end(about.reason.message);
        this.#restarts = true;
        patient(RESTART);
      } catch (problem) {
        if (GONE.has(problem.code)) return this.#end("The session has ended.");
        if (problem.code === "starting") {
          this.#restarts = true;
          patient(this.config.reconnect_seconds);
        }
      }
      await sleep(pause);
    }
    if (!this.#over) this.#end("The connection was lost and did not come back.");
  }

  async #failed(problem) {
    if (problem.name === "AbortError") return this.#end(null);
    if (this.kept && problem.code === "unreachable") return this.#comeBack();
    if (this.kept) api.closeSession(this.kept).catch(() => {});
    this.#end(problem.message, problem.code);
  }

  #event(event) {
    this.#heard = performance.now();
    if (event.type !== "session.closed") return this.told(event);
    const { code, message } = event.reason;
    if (code !== "restart") return this.#end(code === "closed" ? null : message);
    this.told(event);
    this.#restarts = true;
    if (!this.#way) return; // still connecting: it will be lost
    this.#way.close();
    this.#comeBack();
  }

  send(verb) {
    this.#way?.send(verb);
  }

  // It was muted, permission came later, or it was unplugged.
  microphoneChanged() {
    this.#way?.microphoneChanged();
  }

  async close() {
    this.#cancelled.abort();
    if (this.kept) await api.closeSession(this.kept).catch(() => {});
    this.#end(null);
  }

  #end(message, code = null) {
    if (this.#over) return;
    this.#over = true;
    sessionStorage.removeItem(KEPT);
    this.#way?.close();
    this.#way = null;
    this.screen.stop();
    this.changed("over", { message, code });
  }
}
