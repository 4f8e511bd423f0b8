"use strict";
const $ = (id) => document.getElementById(id);
let picture = null; // the query's picture as a data URL
let latestSearch = 0; // number of the latest search; responses to earlier ones are dropped
let shownQuery = null; // the query whose results are shown
const apiKey = () => sessionStorage.getItem("key") || "";

async function call(path, body) {
  const headers = apiKey() ? { Authorization: "Bearer " + apiKey() } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body === undefined ? "GET" : "POST", headers, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch {
    throw new Error("The server cannot be reached. Is it still running?");
  }
  if (response.status === 401) {
    const enteredKey = prompt("This server needs an API key:");
    if (enteredKey) {
      sessionStorage.setItem("key", enteredKey);
      return call(path, body);
    }
  }
  if (!response.ok) {
    let message = "The server answered with status " + response.status + ".";
    try { message = (await response.json()).error.message; } catch { /* not JSON: keep the status message */ }
    throw new Error(message);
  }
  return response;
}

function say(text, isError) {
  $("status").textContent = text;
  $("status").className = isError ? "error" : "";
}

function usePicture(file) {
  if (!file) return;
  if (!file.type.startsWith("image/")) { say("“" + file.name + "” is not a picture.", true); return; }
  const reader = new FileReader();
  reader.onload = () => {
    picture = reader.result;
    $("thumb").src = picture;
    $("thumb").hidden = false;
    $("hint").textContent = file.name || "pasted picture";
    $("clear").hidden = false;
    search();
  };
  reader.onerror = () => say("“" + file.name + "” cannot be read.", true);
  reader.readAsDataURL(file);
}

function removePicture() {
  picture = null;
  $("file").value = "";
  $("thumb").hidden = true;
  $("thumb").removeAttribute("src");
  $("hint").textContent = "Drop, paste or choose a picture to search with, alone or together with text";
  $("clear").hidden = true;
}

async function search() {
  const text = $("text").value.trim();
  if (!text && !picture) { say("Type a query or add a picture."); return; }
  const number = ++latestSearch;
  const top = Number($("top").value);
  const body = { text, image: picture, top, filter: $("filter").value.trim(), rerank: $("rerank").checked ? "raw:" + top : "" };
  say("Searching…");
  $("results").classList.add("busy");
  try {
    const response = await (await call("v1/search", body)).json();
    if (number !== latestSearch) return;
    shownQuery = { text, image: picture };
    const hits = response.hits;
    show(hits);
    const moved = hits.filter((hit, i) => hit.nearest !== i + 1).length;
    let message = hits.length + (hits.length === 1 ? " result" : " results") + " in " + Math.round(response.milliseconds) + " ms";
    if (body.rerank) message += moved ? "; reranking moved " + moved + " of them" : "; reranking did not change the order";
    if (!hits.length) message = body.filter ? "No document matches the filter" : "The index has no documents";
    say(message + ".");
  } catch (error) {
    if (number === latestSearch) { show([]); say(error.message, true); }
  } finally {
    if (number === latestSearch) $("results").classList.remove("busy");
  }
}

function show(hits) {
  $("results").replaceChildren(...hits.map((hit, i) => {
    const card = document.createElement("button");
    card.type = "button";
    card.className = "card";
    const name = hit.text || hit.id;
    card.setAttribute("aria-label", (i + 1) + ": " + name);
    if (hit.has_picture) {
      const image = document.createElement("img");
      image.alt = "";
      load(image, hit.id, 320);
      card.append(image);
    }
    const words = document.createElement("span");
    words.className = "words";
    const title = document.createElement("span");
    title.className = "name";
    title.textContent = name;
    const score = document.createElement("span");
    score.className = "score";
    const value = document.createElement("span");
    value.textContent = (hit.by === "cosine" ? "cosine " : "P(yes) ") + hit.score.toFixed(3);
    score.append(value);
    if (hit.nearest !== i + 1) {
      const moved = document.createElement("span");
      moved.className = "moved";
      moved.textContent = (hit.nearest > i + 1 ? "▲" : "▼") + " was " + hit.nearest;
      score.append(moved);
    }
    words.append(title, score);
    card.append(words);
    card.addEventListener("click", () => open(hit));
    return card;
  }));
}

async function load(image, id, edge) {
  try {
    const response = await call("v1/documents/" + encodeURIComponent(id) + "/picture?edge=" + edge);
    const url = URL.createObjectURL(await response.blob());
    image.onload = () => URL.revokeObjectURL(url);
    image.src = url;
  } catch (error) {
    image.alt = error.message;
  }
}

async function open(hit) {
  $("detail-title").textContent = hit.id;
  $("detail-text").textContent = hit.text;
  $("detail-picture").parentElement.hidden = !hit.has_picture;
  $("detail-picture").removeAttribute("src");
  $("token-maps").replaceChildren();
  for (const name of ["detail-map", "query-map"]) $(name).hidden = true;
  const rows = [["score", hit.score.toFixed(4) + " (" + hit.by + ")"], ["rank by cosine", hit.nearest], ...Object.entries(hit.metadata)];
  $("detail-metadata").replaceChildren(...rows.filter(([, value]) => value !== null).map(([name, value]) => {
    const row = document.createElement("tr"), head = document.createElement("th"), cell = document.createElement("td");
    head.textContent = name;
    cell.textContent = String(value);
    row.append(head, cell);
    return row;
  }));
  $("detail").showModal();
  const requests = [];
  if (hit.has_picture) {
    load($("detail-picture"), hit.id, 1024);
    requests.push(showAttention("detail-map", { id: hit.id }, true));
  }
  if (shownQuery && shownQuery.image) requests.push(showAttention("query-map", shownQuery, false));
  $("detail-status").textContent = requests.length ? "Computing attention maps…" : "";
  const failed = (await Promise.allSettled(requests)).find((result) => result.status === "rejected");
  $("detail-status").textContent = failed ? failed.reason.message : "";
}

async function showAttention(figureId, body, withTokens) {
  const maps = await (await call("v1/attention", body)).json();
  const figure = $(figureId);
  figure.querySelector("img").src = maps.together;
  figure.hidden = false;
  if (withTokens) {
    $("token-maps").replaceChildren(...maps.tokens.map((url, i) => {
      const image = document.createElement("img");
      image.src = url;
      image.alt = "Where token " + (i + 1) + " looks";
      image.title = image.alt;
      return image;
    }));
  }
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); search(); });
$("file").addEventListener("change", () => usePicture($("file").files[0]));
$("clear").addEventListener("click", () => { removePicture(); $("text").focus(); });
$("drop").addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); $("file").click(); } });
for (const kind of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") usePicture(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", (event) => usePicture([...event.clipboardData.files].find((file) => file.type.startsWith("image/"))));
for (const id of ["rerank", "top"]) $(id).addEventListener("change", () => { if (shownQuery) search(); });

(async () => {
  try {
    const [models, examples] = await Promise.all([call("v1/models"), call("v1/examples")]);
    const model = (await models.json()).data[0];
    $("about").textContent = model.documents.toLocaleString() + " documents, encoded by " + model.id;
    $("examples").replaceChildren(...(await examples.json()).map((text) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "plain";
      button.textContent = text;
      button.addEventListener("click", () => { $("text").value = text; search(); });
      return button;
    }));
    say("");
  } catch (error) {
    say(error.message, true);
  }
})();
