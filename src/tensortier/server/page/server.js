// Talks to the server this page came from: JSON, and streams of server-sent events. Sends the API key where one is
// needed, and asks for it when the server does.

const KEY = "tensortier-api-key";
let askForKey = null;
let asking = null;

/** `ask` is called when the server wants a key; its promise gives one. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

function headers(more, key) {
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

export class ServerError extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

async function request(path, options) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    let response;
    try {
      response = await fetch(path, { ...options, headers: headers(options.headers || {}, key), cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The server does not answer: is it still running?", 0);
    }
    if (response.status === 401 && askForKey) {
      if (sessionStorage.getItem(KEY) !== key) continue; // another one was given while this request was under way
      asking ??= askForKey().finally(() => {
        asking = null;
      });
      sessionStorage.setItem(KEY, await asking);
      continue;
    }
    if (!response.ok) {
      const { message, code } = await reason(response);
      throw new ServerError(message, response.status, code);
    }
    return response;
  }
}

async function reason(response) {
  const plain = `The server answered with ${response.status}.`;
  try {
    const body = await response.json();
    return { message: body.error?.message || plain, code: body.error?.code };
  } catch {
    return { message: plain };
  }
}

export async function get(path, options = {}) {
  return (await request(path, options)).json();
}

export async function post(path, body, options = {}) {
  const asked = { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } };
  return (await request(path, { ...options, ...asked })).json();
}

export async function remove(path) {
  return (await request(path, { method: "DELETE" })).json();
}

/** The events of a stream, as {event, data}; ends with the stream. */
export async function* stream(path, options = {}) {
  const response = await request(path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  let event = { event: "message", data: [] };
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      pending += value;
      const lines = pending.split(/\r\n|\n|\r(?!$)/);
      pending = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (event.data.length) yield { event: event.event, data: event.data.join("\n") };
          event = { event: "message", data: [] };
        } else if (line.startsWith("data:")) event.data.push(line.slice(5).replace(/^ /, ""));
        else if (line.startsWith("event:")) event.event = line.slice(6).trim();
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // tells the server that nobody listens any more
  }
}

export function streamPost(path, body, signal) {
  return stream(path, {
    method: "POST",
    body: JSON.stringify(body),
    headers: { "Content-Type": "application/json" },
    signal,
  });
}
