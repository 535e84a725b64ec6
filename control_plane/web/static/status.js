// Keeps the states on the index page fresh: fetches them every few seconds, with the key of the "try it" box if there is
// one, and changes only what differs, so nothing flickers and a selection survives.
"use strict";

const INTERVAL_MS = 3000;
const place = document.getElementById("status");

function sync(old, fresh) {
  if (old.nodeType === Node.TEXT_NODE && fresh.nodeType === Node.TEXT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  if (old.nodeName !== fresh.nodeName || old.childNodes.length !== fresh.childNodes.length) {
    old.replaceWith(fresh);
    return;
  }
  if (old.className !== fresh.className) old.className = fresh.className;
  const freshChildren = [...fresh.childNodes];
  [...old.childNodes].forEach((child, index) => sync(child, freshChildren[index]));
}

async function refresh() {
  try {
    const key = document.getElementById("try").elements.key.value.trim();
    // What is no key would make fetch fail.
    const headers = /^[!-~]+$/.test(key) ? { Authorization: `Bearer ${key}` } : {};
    const answer = await fetch("/status", { cache: "no-store", headers });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const fresh = document.createElement("div");
    fresh.innerHTML = await answer.text();
    if (fresh.childNodes.length === place.childNodes.length) sync(place, fresh);
    else place.replaceChildren(...fresh.childNodes);
    place.removeAttribute("aria-busy");
  } catch {
    place.setAttribute("aria-busy", "true");
  }
  setTimeout(refresh, INTERVAL_MS);
}

setTimeout(refresh, INTERVAL_MS);
