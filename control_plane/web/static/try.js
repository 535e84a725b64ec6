// The "try it" box: streams from /v1/completions with a key that never leaves this tab.
"use strict";

const form = document.getElementById("try");
const output = document.getElementById("try-output");
const note = document.getElementById("try-note");
const generate = form.querySelector("button[type=submit]");
const stop = form.elements.stop;
let running = null;

async function* events(body) {
  const decoder = new TextDecoderStream();
  let pending = "";
  for (const reader = body.pipeThrough(decoder).getReader(); ; ) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (pending + value).split("\n\n");
    pending = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

async function run() {
  const fields = form.elements;
  const prompt = fields.prompt.value;
  const started = performance.now();
  running = new AbortController();
  const answer = await fetch("/v1/completions", {
    method: "POST",
    signal: running.signal,
    headers: { "Content-Type": "application/json", Authorization: `Bearer ${fields.key.value.trim()}` },
    body: JSON.stringify({
      model: fields.model.value,
      prompt,
      max_tokens: Number(fields.max_tokens.value),
      temperature: Number(fields.temperature.value),
      stream: true,
      stream_options: { include_usage: true },
    }),
  });
  if (!answer.ok) throw new Error((await answer.json()).error.message);

  const shown = document.createElement("span");
  shown.className = "prompt";
  shown.textContent = prompt;
  const text = document.createTextNode("");
  output.replaceChildren(shown, text);
  output.hidden = false;
  let firstMs = null;
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    firstMs ??= performance.now() - started;
    if (chunk.choices.length) text.data += chunk.choices[0].text;
    if (chunk.usage) note.textContent = summary(chunk.usage, firstMs, performance.now() - started);
  }
}

function summary(usage, firstMs, totalMs) {
  const rate = (usage.completion_tokens / (totalMs / 1000)).toFixed(0);
  return `${usage.completion_tokens} tokens, first after ${firstMs.toFixed(0)} ms, ${rate} tokens/s`;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  generate.disabled = true;
  stop.disabled = false;
  note.className = "hint";
  note.textContent = "…";
  try {
    await run();
  } catch (error) {
    const stopped = error.name === "AbortError";
    note.className = stopped ? "hint" : "error";
    note.textContent = stopped ? "stopped" : error.message;
  }
  generate.disabled = false;
  stop.disabled = true;
});

stop.addEventListener("click", () => running?.abort());
