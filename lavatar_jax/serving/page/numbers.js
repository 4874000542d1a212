// The small print: how fast, how late, and where the time goes.

const $ = (id) => document.getElementById(id);

const PARTS = {
  wait: "collecting sound",
  features: "hearing it",
  feed: "handing over",
  stages: "imagining",
  decode: "painting",
  out: "handing out",
  encode: "compressing",
  send: "waiting its turn",
  screen: "to your screen",
};

const inSeconds = (ms) => `${(ms / 1000).toFixed(1)} s`;
const inMilliseconds = (ms) => `${Math.round(ms)} ms`;
const known = (value) => typeof value === "number" && Number.isFinite(value);

// `here`: measured in this page; `there`: the server's stats.
export function showNumbers(here, there) {
  const voice = known(there?.silence_to_speech_ms) ? there.silence_to_speech_ms + (here.screen ?? 0) : null;
  const shown = {
    picture: `${here.fps.toFixed(0)} frames/s`,
    "first frame": known(here.firstFrame) && inSeconds(here.firstFrame),
    "voice to mouth": known(voice) && inSeconds(voice),
    "to your screen": known(here.screen) && inMilliseconds(here.screen),
  };
  fill($("numbers"), shown, (name, value) => {
    const pair = document.createElement("div");
    pair.append(term(name), detail(value));
    return [pair];
  });
  if ($("costs").open && there) showParts({ ...there.parts_ms, screen: here.screen }, here, there);
}

function showParts(parts, here, there) {
  const most = Math.max(...Object.values(parts).filter(known), 1);
  const bars = Object.fromEntries(
    Object.entries(PARTS).map(([name, words]) => [words, known(parts[name]) && parts[name]]),
  );
  fill($("parts"), bars, (words, value) => {
    const bar = document.createElement("i");
    bar.style.inlineSize = `${Math.max(1, (100 * value) / most)}%`;
    const cell = detail(inMilliseconds(value));
    cell.prepend(bar);
    return [term(words), cell];
  });
  const factor = known(there.real_time_factor) && `${(100 * there.real_time_factor).toFixed(0)} %`;
  const held = there.held + there.underruns;
  const rest = { "of real time needed": factor, "frames held": held, "connected by": here.way };
  for (const [name, value] of Object.entries(rest))
    if (value !== false) $("parts").append(term(name), detail(String(value)));
}

function fill(list, entries, make) {
  const told = Object.entries(entries).filter(([, value]) => value !== false && value !== null);
  list.replaceChildren(...told.flatMap(([name, value]) => make(name, value)));
}

const term = (text) => Object.assign(document.createElement("dt"), { textContent: text });
const detail = (text) => Object.assign(document.createElement("dd"), { textContent: text });
