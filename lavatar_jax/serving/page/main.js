// Puts the parts together: what the page shows in each state, and what its buttons do.

import * as api from "./api.js";
import { Crop } from "./crop.js";
import { Faces } from "./faces.js";
import { showLevel } from "./meter.js";
import { Microphone } from "./microphone.js";
import { notice, status, veil } from "./notices.js";
import { showNumbers } from "./numbers.js";
import { Recorder } from "./recorder.js";
import { Screen } from "./screen.js";
import { left, Session } from "./session.js";
import { setUpTalk } from "./talk.js";

const $ = (id) => document.getElementById(id);
const force = new URLSearchParams(window.location.search).get("media"); // ws or webrtc: that way only
const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

const screen = new Screen({ frame: $("screen"), video: $("video"), canvas: $("canvas") });
const microphone = new Microphone();
let config, faces, recorder;
let session = null;
let pressed = 0; // when Start was, for the time to the first frame
let firstFrame, roundTrip, stats;

// ---- states ------------------------------------------------------------------------------------------------

const states = {
  asking: () => veil("Your browser asks whether this page may use the microphone.", { cancel: "Go on without" }),
  opening() {
    status("Opening");
    veil("Opening a session…", { cancel: "Cancel" });
  },
  waiting({ message, seconds }) {
    status("Waiting");
    veil(message, { count: `Trying again in ${seconds} s`, cancel: "Cancel" });
  },
  connecting() {
    status("Connecting");
    veil("Connecting…", { cancel: "Cancel" });
  },
  lost({ seconds, restarts }) {
    status(restarts ? "Waiting" : "Connection lost");
    delete $("screen").dataset.speaking;
    const lost = "The connection is lost. Trying to come back…";
    veil(restarts ? "The server restarts. The session goes on when it is back…" : lost, { count: `for ${seconds} s more`, cancel: "Stop" });
  },
  live() {
    veil(null);
    status("Live");
    firstFrame ??= performance.now() - pressed;
    if (document.body.dataset.state === "live") return;
    enter("live");
    showMicrophone();
    if (document.activeElement === document.body) $("mute").focus({ preventScroll: true });
  },
  over({ message, code }) {
    const { kept } = session;
    session = null;
    microphone.stop();
    screen.clear();
    veil(null);
    notice(message);
    enter("setup");
    delete $("screen").dataset.speaking;
    status("Ready");
    if (recorder.on) recorder.fetch(kept);
    recorder.show({ state: "off", seconds: 0 });
    if (code === "unauthorized") $("key").focus();
    else $("start").focus({ preventScroll: true });
  },
};

function changed(state, about) {
  if (state !== "live" && state !== "over" && document.body.dataset.state === "setup") enter("opening");
  states[state](about);
}

// What the whole page is: setup, opening or live.
function enter(state) {
  document.body.dataset.state = state;
  $("start").disabled = state !== "setup";
  document.querySelector(".panel").inert = state === "opening";
}

// ---- what the server tells -----------------------------------------------------------------------------------

const events = {
  "session.state": ({ session: about }) => {
    recorder.show(about.recording);
    faces.mark(about.face);
    if (document.activeElement !== $("prompt")) $("prompt").value = about.prompt;
  },
  stats(event) {
    stats = event.stats;
    recorder.show(event.recording);
  },
  "agent.speech_started": () => {
    $("screen").dataset.speaking = "";
    status("Speaking");
  },
  "agent.speech_ended": () => {
    delete $("screen").dataset.speaking;
    status("Live");
  },
  "agent.interrupted": () => status("Interrupted"),
  "prompt.updated": () => status("The new prompt is in use"),
  "recording.started": () => recorder.show({ state: "on", seconds: 0 }),
  "recording.stopped": ({ recording }) => {
    recorder.show(recording);
    recorder.fetch(session.kept);
  },
  "recording.failed": ({ error }) => {
    notice(`The recording has stopped: ${error.message}`);
    recorder.fetch(session.kept);
  },
  // It goes on later, but what was recorded is here only now.
  "session.closed": () => {
    if (recorder.on) recorder.fetch(session.kept);
    recorder.show({ state: "off", seconds: 0 });
  },
  pong: ({ t }) => (roundTrip = performance.now() - t),
  error: ({ error }) => notice(error.message),
};

setInterval(() => {
  if (!session) return;
  const { fps, delay } = screen.numbers;
  const to = delay === null ? null : delay + (roundTrip ?? 0) / 2;
  showNumbers({ fps, screen: to, firstFrame, way: session.way }, stats);
}, 500);
setInterval(() => session?.send({ type: "ping", t: performance.now() }), 2000);

// ---- beginning and ending ------------------------------------------------------------------------------------

function newSession() {
  pressed = performance.now();
  firstFrame = roundTrip = stats = undefined;
  notice(null);
  const told = (event) => session && events[event.type]?.(event);
  return new Session({ config, microphone, screen, force, changed, told });
}

async function start() {
  api.useApiKey($("key").value);
  session = newSession();
  const mine = session;
  const problem = $("use-microphone").checked ? await askForMicrophone() : null;
  if (session !== mine) return;
  pressed = performance.now();
  const prompt = $("prompt").value.trim();
  session.open({ ...faces.wish, ...(prompt && { prompt }) });
  if (problem) notice(problem);
}

// Returns what is to be said about it. An answer may also come later: see `onOpened`.
async function askForMicrophone() {
  changed("asking");
  const skipped = new Promise((resolve) => ($("veil-cancel").onclick = resolve));
  try {
    await Promise.race([microphone.start(), skipped]);
    return null;
  } catch (problem) {
    return problem.message;
  } finally {
    $("veil-cancel").onclick = cancel;
  }
}

async function goOn(kept) {
  const resumed = (session = newSession());
  enter("opening");
  const permission = await navigator.permissions?.query({ name: "microphone" }).catch(() => null);
  if (permission?.state === "granted") await microphone.start().catch((problem) => notice(problem.message));
  if (session === resumed) session.resume(kept); // else it was cancelled meanwhile
}

const cancel = () => session?.close();

// ---- buttons -------------------------------------------------------------------------------------------------

function showMicrophone() {
  $("mute").setAttribute("aria-pressed", microphone.open && !microphone.muted);
}

async function toggleMicrophone() {
  if (microphone.open) {
    microphone.muted = !microphone.muted;
    session.microphoneChanged();
  } else {
    microphone.muted = false;
    await microphone.start().catch((problem) => notice(problem.message));
  }
  showMicrophone();
}

function toggleSound(on = screen.silent) {
  screen.silent = !on;
  $("sound").setAttribute("aria-pressed", on);
}

const interrupt = () => session?.send({ type: "agent.interrupt" });

function key(event) {
  if (document.body.dataset.state !== "live" || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") interrupt();
  if (event.key.toLowerCase() === "m" && !event.target.closest("input, textarea, select")) toggleMicrophone();
}

function setUpButtons() {
  $("start").onclick = start;
  $("stop").onclick = $("veil-cancel").onclick = cancel;
  $("mute").onclick = toggleMicrophone;
  $("sound").onclick = () => toggleSound();
  $("interrupt").onclick = interrupt;
  $("choose").onsubmit = (event) => {
    event.preventDefault();
    if (!$("start").disabled) start();
  };
  $("prompting").onsubmit = (event) => {
    event.preventDefault();
    const prompt = $("prompt").value.trim() || $("prompt").placeholder;
    if (session) session.send({ type: "agent.set_prompt", prompt });
  };
  document.addEventListener("keydown", key);
  microphone.onLevel = showLevel;
  microphone.onOpened = () => {
    session?.microphoneChanged();
    showMicrophone();
  };
  microphone.onLost = () => {
    session?.microphoneChanged();
    showMicrophone();
    notice("The microphone was unplugged. Plug it in, then switch it on again.");
  };
  screen.onBlocked = () => {
    toggleSound(false);
    notice("Your browser keeps the sound off until you press “Sound”.", { kind: "hint" });
  };
}

// ---- loading -------------------------------------------------------------------------------------------------

async function patiently(ask) {
  for (;;) {
    try {
      return await ask();
    } catch (problem) {
      status(problem.message);
      if (problem.code !== "starting") veil(`${problem.message} Trying again…`);
    }
    await sleep(1500);
  }
}

async function load() {
  setUpButtons();
  config = await patiently(api.config);
  const chosen = (url, name) => Object.assign($("still"), { src: url, alt: name, hidden: false });
  const crop = new Crop(config.consent_statement);
  $("crop-model").hidden = config.model !== "tiny";
  faces = new Faces({ list: $("faces"), input: $("picture"), crop, chosen, problem: notice });
  faces.fill(await patiently(api.faces));
  recorder = new Recorder(() => session, { marked: config.provenance.watermark });
  setUpTalk(config, () => session);
  $("prompt").maxLength = config.limits.prompt_chars;
  $("key-field").hidden = !config.api_key_required;
  veil(null);
  const kept = left();
  if (kept) return goOn(kept);
  $("start").disabled = false; // a session may be asked for early: it waits
  await patiently(api.ready);
  if (!session) status("Ready");
}

load();
