"use strict";
// What comes from questions, answers and file names reaches the page as text alone: textContent, never innerHTML.
const at = (id) => document.getElementById(id);
const make = (tag, content = "", kind = "") => {
  const made = document.createElement(tag);
  if (content) made.textContent = content;
  if (kind) made.className = kind;
  return made;
};
const picture = (name) => `/image?name=${encodeURIComponent(name)}`;
let about = { runs: [], kinds: [], percent: [], imagesPerText: 1 };
let page = 0, listed = 0, asked = 0, chosen = [], maps = []; // `listed`, `asked`: a later one makes the answer stale

async function call(path, options) {
  const response = await fetch(path, options);
  const value = await response.json();
  if (!response.ok) throw new Error(value.error);
  return value;
}

function mark(right, value) {
  if (right === null || right === undefined) return make("span", "? unknown", "faint");
  const partly = value > 0 && value < 1 ? ` (${value.toFixed(1)})` : "";
  return make("span", (right ? "✓ right" : "✗ wrong") + partly, right ? "right" : "wrong");
}

function line(label, answer, right, value) {
  const made = make("div");
  if (label) made.append(make("span", `${label}: `, "faint"));
  made.append(make("span", answer), " ", mark(right, value));
  return made;
}

function truths(answers) {
  const counts = new Map();
  for (const answer of answers) counts.set(answer, (counts.get(answer) || 0) + 1);
  return [...counts].map(([answer, count]) => (count > 1 ? `${answer} ×${count}` : answer)).join(", ");
}

function card(item) {
  const button = make("button", "", "card"), images = make("div", "", "images"), body = make("div", "", "body");
  button.type = "button";
  for (const name of item.images) {
    const image = make("img");
    image.src = picture(name); image.alt = ""; image.loading = "lazy";
    images.append(image);
  }
  body.append(make("strong", item.question));
  item.predictions.forEach((answer, run) =>
    body.append(line(item.predictions.length > 1 ? "AB"[run] : "", answer, item.right[run], item.values[run])));
  if (item.answers.length) body.append(make("div", `true: ${truths(item.answers)}`, "faint"));
  if (item.kind) body.append(make("div", item.kind, "faint"));
  button.append(images, body);
  button.addEventListener("click", () => open(item));
  const entry = make("li");
  entry.append(button);
  return entry;
}

async function list() {
  const turn = ++listed;
  const query = new URLSearchParams({ show: at("show").value, kind: at("kind").value, search: at("search").value, page });
  const found = await call(`/questions?${query}`);
  if (turn !== listed) return; // a later filter is under way
  page = found.page;
  at("cards").replaceChildren(...found.items.map(card));
  at("count").textContent = `${found.total.toLocaleString()} questions`;
  at("place").textContent = `Page ${page + 1} of ${found.pages}`;
  at("before").disabled = page === 0;
  at("after").disabled = page + 1 >= found.pages;
}

function open(item) {
  asked++;
  chosen = item ? [...item.images] : [];
  maps = [];
  at("title").textContent = item ? `Question ${item.id}` : "Ask about an image";
  at("question").value = item ? item.question : "";
  at("truth").textContent = item && item.answers.length ? `true: ${truths(item.answers)}` : "";
  at("said").textContent = "";
  at("answers").replaceChildren();
  at("words").replaceChildren();
  const files = [];
  for (let place = 0; place < about.imagesPerText; place++) {
    const label = make("label", about.imagesPerText > 1 ? `Image ${place + 1} ` : (item ? "Another image " : "Image "));
    const input = make("input");
    input.type = "file"; input.accept = "image/png,image/jpeg,image/webp,image/gif,image/bmp";
    input.addEventListener("change", () => upload(input, place));
    label.append(input);
    files.push(label);
  }
  at("files").replaceChildren(...files);
  draw();
  at("detail").showModal();
  if (item) ask();
}

async function upload(input, place) {
  if (!input.files.length) return;
  const turn = ++asked, into = chosen;
  try {
    at("said").textContent = "";
    const options = { method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: input.files[0] };
    into[place] = (await call("/upload", options)).image;
    if (into !== chosen) return; // another question was opened
    maps = [];
    at("truth").textContent = "";
    at("answers").replaceChildren();
    at("words").replaceChildren();
    draw();
  } catch (error) { if (turn === asked) at("said").textContent = error.message; }
}

function draw() {
  const strongest = Math.max(...maps.flat(2).map(Math.abs), 1e-12);
  at("pictures").replaceChildren(...chosen.filter(Boolean).map((name, place) => {
    const frame = make("div", "", "picture"), image = make("img");
    image.src = picture(name); image.alt = `image ${place + 1}`;
    frame.append(image);
    if (maps[place] && at("heat").checked) {
      frame.classList.add("heated");
      frame.append(heat(maps[place], strongest));
    }
    return frame;
  }));
}

function heat(map, strongest) {
  const canvas = make("canvas");
  canvas.width = map[0].length; canvas.height = map.length;
  const context = canvas.getContext("2d");
  map.forEach((row, y) => row.forEach((value, x) => {
    const [r, g, b] = value > 0 ? [0, 110, 220] : [235, 110, 0];
    context.fillStyle = `rgba(${r}, ${g}, ${b}, ${0.75 * Math.abs(value) / strongest})`;
    context.fillRect(x, y, 1, 1);
  }));
  return canvas;
}

async function ask(answer = null) {
  const turn = ++asked;
  at("said").textContent = "The model is asked …";
  try {
    const body = JSON.stringify({ images: chosen.filter(Boolean), question: at("question").value, answer });
    const found = await call("/ask", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    if (turn !== asked) return;
    maps = found.maps;
    const read = !maps.some(Boolean) || maps.flat(2).some(Boolean);
    at("said").textContent = `Relevance for “${found.answer}”. Choose another answer to see its own.` +
      (read ? "" : " It leans on no single patch: this fusion reads each image as a whole.");
    draw();
    at("answers").replaceChildren(...found.answers.map((one) => {
      const row = make("tr"), name = make("td"), value = make("td"), button = make("button", one.answer), bar = make("meter");
      button.type = "button";
      button.setAttribute("aria-pressed", one.answer === found.answer);
      button.addEventListener("click", () => ask(one.answer));
      bar.value = one.probability;
      name.append(button);
      value.append(bar, ` ${(100 * one.probability).toFixed(1)}%`);
      row.append(name, value);
      return row;
    }));
    const most = Math.max(...found.tokens.map(([, value]) => Math.abs(value)), 1e-12);
    at("words").replaceChildren(...found.tokens.flatMap(([word, value]) => {
      const made = make("span", word, "word");
      made.style.background = `rgba(${value > 0 ? "0, 110, 220" : "235, 110, 0"}, ${0.6 * Math.abs(value) / most})`;
      made.title = `relevance ${value.toPrecision(2)}`;
      return [made, " "];
    }));
  } catch (error) { if (turn === asked) at("said").textContent = error.message; }
}

function fail(error) { at("count").textContent = error.message; }

async function start() {
  about = await call("/about");
  const two = about.runs.length > 1;
  at("runs").textContent = about.runs.map((name, run) => {
    const percent = about.percent[run];
    return (two ? `${"AB"[run]}: ` : "") + name + (percent === null ? "" : ` (${percent.toFixed(2)}%)`);
  }).join(" · ");
  const shows = [["all", "all"], ["right", two ? "A right" : "right"], ["wrong", two ? "A wrong" : "wrong"]];
  if (two) shows.push(["differ", "A and B differ"], ["better", "B better"], ["worse", "B worse"]);
  for (const [value, text] of shows) at("show").append(new Option(text, value));
  at("kind").append(new Option("all", ""), ...about.kinds.map((kind) => new Option(kind, kind)));
  at("filter").addEventListener("submit", (event) => event.preventDefault());
  const filter = () => { page = 0; list().catch(fail); };
  at("show").addEventListener("change", filter);
  at("kind").addEventListener("change", filter);
  at("search").addEventListener("input", filter);
  at("before").addEventListener("click", () => { page--; list().catch(fail); });
  at("after").addEventListener("click", () => { page++; list().catch(fail); });
  at("own").addEventListener("click", () => open(null));
  at("ask").addEventListener("click", () => ask());
  at("question").addEventListener("keydown", (event) => { if (event.key === "Enter") ask(); });
  at("heat").addEventListener("change", draw);
  if (!about.kinds.length) at("kind").parentElement.hidden = true;
  if (about.runs.length) await list();
  else { at("filter").hidden = at("paging").hidden = true; open(null); }
}
start().catch(fail);
