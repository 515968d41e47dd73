"use strict";

// Forms work without this file. It adds keys, the time spent, pictures at whole multiples of their
// size, and trying again when the server cannot be reached: an answer that was stored but not
// acknowledged comes back as 409.

let busy = false;
let begun = performance.now();

const root = document.documentElement.dataset.root;
const find = (what) => document.querySelector(what);
const all = (what) => [...document.querySelectorAll(what)];
const words = () => JSON.parse(find("main").dataset.words || "{}");
const say = (text) => { find("#status").textContent = text; };
const wait = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

function begin() {
  begun = performance.now();
  count();
  all(".ranking .picture").forEach((tile) => tile.classList.add("click"));
  find("h1").focus({ preventScroll: true });
  fitAll();
}

// The word on the button says what is about to be sent.
function count() {
  const send = find(".tags #send span");
  if (!send) return;
  const tagged = all(".picture input:checked").length;
  send.textContent = tagged ? words().some.replace("%", tagged) : words().none;
}

// ---- pictures

// So many screen pixels for each of the picture's own, so that none of them is blurred.
function scale(image, times) {
  image.classList.toggle("whole", times >= 1);
  image.style.width = times >= 1 ? `${(image.naturalWidth * times) / devicePixelRatio}px` : "";
  image.style.height = times >= 1 ? `${(image.naturalHeight * times) / devicePixelRatio}px` : "";
}

function most(image, box) {
  const wide = (box.clientWidth * devicePixelRatio) / image.naturalWidth;
  return Math.floor(Math.min(wide, (box.clientHeight * devicePixelRatio) / image.naturalHeight));
}

const fit = (image) => image.naturalWidth && scale(image, most(image, image.parentElement));
const fitAll = () => all(".picture img").forEach(fit);
addEventListener("resize", fitAll);
document.addEventListener("load", (event) => {
  if (event.target.matches?.(".picture img")) fit(event.target);
}, true);

const zoom = { place: 0, times: 1 };

function enlarge(place) {
  const box = find("#zoom");
  const images = all("#vote .picture img");
  if (!box || !images.length || find("main.veiled")) return;
  const stage = box.querySelector(".stage");
  const image = stage.querySelector("img") ?? stage.appendChild(new Image());
  zoom.place = (place + images.length) % images.length;
  image.src = images[zoom.place].src;
  image.alt = images[zoom.place].alt;
  image.decode().then(() => {
    if (!box.open) {
      box.showModal();
      zoom.times = Math.max(1, most(image, stage));
    }
    scale(image, zoom.times);
    box.querySelector("output").textContent = `${zoom.place + 1}/${images.length} · ${zoom.times}×`;
  });
}

function inZoom(key) {
  const next = { ArrowRight: 1, ArrowLeft: -1 }[key];
  if (key === "z" || key === "Escape") find("#zoom").close();
  else if (/^[1-9]$/.test(key)) { if (key <= all("#vote .picture").length) enlarge(key - 1); }
  else if (next) enlarge(zoom.place + next);
  else if (["+", "=", "-", "0"].includes(key)) {
    const change = { "-": -1, "0": 1 - zoom.times }[key] ?? 1;
    zoom.times = Math.min(64, Math.max(1, zoom.times + change));
    enlarge(zoom.place);
  } else return false;
  return true;
}

// ---- rankings

function rank(tile) {
  const tiles = all(".ranking .picture");
  const ranked = tiles.filter((one) => one.dataset.rank).sort((a, b) => a.dataset.rank - b.dataset.rank);
  const order = !tile ? [] : tile.dataset.rank ? ranked.filter((one) => one !== tile) : [...ranked, tile];
  if (tile && !tile.dataset.rank && order.length === tiles.length - 1) {
    order.push(tiles.find((one) => !order.includes(one)));
  }
  tiles.forEach((one) => {
    const place = order.indexOf(one) + 1 || "";
    one.dataset.rank = place;
    one.querySelector("input").value = place;
    one.querySelector(".rank").textContent = place;
  });
}

// ---- answers

function show(html) {
  const page = new DOMParser().parseFromString(html, "text/html");
  const main = page.querySelector("main");
  document.title = page.title;
  find("main").replaceWith(document.adoptNode(main));
  scrollTo(0, 0);
  begin();
}

// What was written stays, to be corrected and sent again.
function refused(html) {
  find("main").classList.remove("busy");
  say(new DOMParser().parseFromString(html, "text/html").querySelector("h1").textContent);
}

// POST until there is an answer. 409 means that this was answered before: by an earlier try of
// ours, or, on the first try, because this page is out of date. Either way, show the next item.
async function post(action, body) {
  for (let tries = 0; ; tries += 1) {
    try {
      const response = await fetch(action, { method: "POST", body });
      if (response.status === 409) return { page: await fetch(`${root}/`), stale: tries === 0 };
      if (response.status < 429) return { page: response, stale: false };
    } catch {
      // no connection
    }
    say(words().unsaved);
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
  find("main").classList.add("busy");
  const { page, stale } = await post(form.action, body);
  if (page.ok && new URL(page.url).pathname === `${root}/`) show(await page.text());
  else if ([400, 413].includes(page.status)) refused(await page.text());
  else location.assign(`${root}/`);
  if (stale && find("#status")) say(words().stale);
  busy = false;
}

document.addEventListener("submit", (event) => {
  if (!/\/(vote|skip|undo)$/.test(event.target.action)) return;
  event.preventDefault();
  submit(event.target, event.submitter);
});

document.addEventListener("change", count);

document.addEventListener("click", (event) => {
  const at = (what) => event.target.closest(what);
  if (at("[data-zoom]")) enlarge(Number(at("[data-zoom]").dataset.zoom));
  else if (at("[data-do]")) inZoom(at("[data-do]").dataset.do);
  else if (at("#again")) rank(null);
  else if (at(".ranking .picture")) {
    event.preventDefault();
    rank(at(".picture"));
  } else if (at("#reveal")) {
    const veiled = find("main").classList.toggle("veiled");
    at("#reveal").setAttribute("aria-pressed", String(!veiled));
    at("#reveal").querySelector("span").textContent = veiled ? words().show : words().hide;
  }
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || busy) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (find("#zoom")?.open) {
    if (inZoom(key)) event.preventDefault();
    return;
  }
  if (event.target.matches("textarea")) {
    if (key === "Escape") event.target.blur();
    return;
  }
  if (key === "Enter" && event.target.closest("button, a, summary")) return;
  if (key === "z") enlarge(0);
  const target = find(`[data-keys~="${CSS.escape(key)}"]`);
  if (!target) return;
  event.preventDefault();
  if (target.matches("textarea")) target.focus();
  else target.click();
});

begin();
