// Requests to the server. What it refuses becomes a Refusal, whose message is a sentence to show.

export class Refusal extends Error {
  constructor({ code, message, retry_after: retryAfter = null }, status = 0) {
    super(message);
    this.code = code;
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

let apiKey = "";

export function useApiKey(key) {
  apiKey = key.trim();
}

// `patience`: milliseconds until the server counts as gone; null: as long as it takes.
async function request(method, path, { token, body, type, signal, patience = 15000 } = {}) {
  const headers = {};
  if (token) headers.Authorization = `Bearer ${token}`;
  else if (apiKey) headers["X-API-Key"] = apiKey;
  if (type) headers["Content-Type"] = type;
  if (patience) signal ??= AbortSignal.timeout(patience);
  let answer;
  try {
    answer = await fetch(path, { method, headers, body, signal, cache: "no-store" });
  } catch (problem) {
    if (problem.name === "AbortError") throw problem;
    throw new Refusal({ code: "unreachable", message: "The server cannot be reached." });
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  const unknown = { code: "internal", message: `The server answered with an error (${answer.status}).` };
  throw new Refusal(told?.error ?? unknown, answer.status);
}

const json = async (...asked) => (await request(...asked)).json();
const sent = (token, value) => ({ token, body: JSON.stringify(value), type: "application/json" });

export const config = () => json("GET", "/v1/config");
export const ready = () => json("GET", "/readyz");
export const faces = async () => (await json("GET", "/v1/faces")).faces;

// `wish`: face or image (with consent), prompt, options.
export function openSession(wish, signal) {
  const form = new FormData();
  for (const [name, value] of Object.entries(wish)) {
    if (value instanceof Blob) form.append(name, value, "picture.jpg");
    else form.append(name, typeof value === "object" ? JSON.stringify(value) : String(value));
  }
  return json("POST", "/v1/sessions", { body: form, signal });
}

// Everything below is about one session: `kept` has its id and token.
const below = (kept, path = "") => `/v1/sessions/${kept.id}${path}`;

export const session = (kept) => json("GET", below(kept), { token: kept.token, patience: 4000 });
export const closeSession = (kept) => request("DELETE", below(kept), { token: kept.token });
// A text waits for those before it, and each may take the server a minute.
export const say = (kept, text, voice) =>
  json("POST", below(kept, "/speak"), { ...sent(kept.token, { text, voice }), patience: null });
export const record = (kept) => json("POST", below(kept, "/recording"), { token: kept.token });
export const stopRecording = (kept) => json("DELETE", below(kept, "/recording"), { token: kept.token });
export const recording = async (kept) =>
  (await request("GET", below(kept, "/recording"), { token: kept.token, patience: null })).blob();

export function play(kept, file) {
  const form = new FormData();
  form.append("audio", file);
  return json("POST", below(kept, "/speak"), { token: kept.token, body: form, patience: null });
}

export const iceServers = async (kept) => (await json("GET", below(kept, "/ice"), { token: kept.token })).ice_servers;

// An offer in SDP; returns the answer.
export async function call(kept, offer) {
  const asked = { token: kept.token, body: offer, type: "application/sdp" };
  return (await request("POST", below(kept, "/call"), asked)).text();
}
