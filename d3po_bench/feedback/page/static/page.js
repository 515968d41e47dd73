"use strict";

// Forms work without this file. It adds keys, the time spent, and trying again when the server
// cannot be reached: an answer that was stored but not acknowledged comes back as 409.

let busy = false;
let begun = performance.now();

const say = (words) => { document.querySelector("#status").textContent = words; };
const wait = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

function begin() {
  begun = performance.now();
  count();
  document.querySelector("h1").focus({ preventScroll: true });
}

// The word on the button says what is about to be sent.
function count() {
  const send = document.querySelector("#send span");
  if (!send) return;
  const tagged = document.querySelectorAll(".picture input:checked").length;
  const word = document.querySelector("main").dataset.word;
  send.textContent = tagged ? `Send: ${tagged} ${word}` : `Send: none ${word}`;
}

function show(html) {
  const page = new DOMParser().parseFromString(html, "text/html");
  const main = page.querySelector("main");
  document.title = page.title;
  document.querySelector("main").replaceWith(document.adoptNode(main));
  scrollTo(0, 0);
  begin();
}

// POST until there is an answer. 409 means that this was answered before: by an earlier try of
// ours, or, on the first try, because this page is out of date. Either way, show the next item.
async function post(action, body) {
  for (let tries = 0; ; tries += 1) {
    try {
      const response = await fetch(action, { method: "POST", body });
      if (response.status === 409) return { page: await fetch("/"), stale: tries === 0 };
      if (response.status < 429) return { page: response, stale: false };
    } catch {
      // no connection
    }
    say("Not saved yet. Trying again…");
    await wait(Math.min(0.5 * 2 ** tries, 5));
  }
}

async function submit(form, button) {
  if (busy) return;
  busy = true;
  const body = new URLSearchParams(new FormData(form, button));
  if (body.has("milliseconds")) {
    body.set("milliseconds", Math.min(Math.round(performance.now() - begun), 86400000));
  }
  document.querySelector("main").classList.add("busy");
  const { page, stale } = await post(form.action, body);
  if (page.ok && new URL(page.url).pathname === "/") show(await page.text());
  else location.assign("/");
  if (stale) say("That page was out of date: nothing was changed.");
  busy = false;
}

document.addEventListener("submit", (event) => {
  if (event.target.action.endsWith("/leave")) return;
  event.preventDefault();
  submit(event.target, event.submitter);
});

document.addEventListener("change", count);

document.addEventListener("click", (event) => {
  const button = event.target.closest("#reveal");
  if (!button) return;
  const veiled = document.querySelector("main").classList.toggle("veiled");
  button.setAttribute("aria-pressed", String(!veiled));
  button.querySelector("span").textContent = veiled ? "Show pictures" : "Hide pictures";
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || busy) return;
  if (event.key === "Enter" && event.target.closest("button, a")) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const target = document.querySelector(`[data-keys~="${CSS.escape(key)}"]`);
  if (!target) return;
  event.preventDefault();
  target.click();
});

begin();
