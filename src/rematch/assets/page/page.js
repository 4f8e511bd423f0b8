"use strict";
const $ = (id) => document.getElementById(id);
let picture = null; // the query's picture as a data URL
let latest = 0; // number of the newest search: answers of older ones are dropped
let asked = null; // the query of the results that are shown
const key = () => sessionStorage.getItem("key") || "";

async function call(path, body) {
  const headers = key() ? { Authorization: "Bearer " + key() } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method: body === undefined ? "GET" : "POST", headers, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch {
    throw new Error("The server cannot be reached. Is it still running?");
  }
  if (answer.status === 401) {
    const given = prompt("This server asks for an API key:");
    if (given) {
      sessionStorage.setItem("key", given);
      return call(path, body);
    }
  }
  if (!answer.ok) {
    let message = "The server answers " + answer.status + ".";
    try { message = (await answer.json()).error.message; } catch { /* no JSON: the status says it */ }
    throw new Error(message);
  }
  return answer;
}

function say(text, isError) {
  $("status").textContent = text;
  $("status").className = isError ? "error" : "";
}

function usePicture(file) {
  if (!file) return;
  if (!file.type.startsWith("image/")) { say("“" + file.name + "” is no picture.", true); return; }
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
  $("hint").textContent = "Drop, paste or choose a picture to search by it, alone or with text";
  $("clear").hidden = true;
}

async function search() {
  const text = $("text").value.trim();
  if (!text && !picture) { say("Type something, or give a picture."); return; }
  const mine = ++latest;
  const top = Number($("top").value);
  const body = { text, image: picture, top, filter: $("filter").value.trim(), rerank: $("rerank").checked ? "raw:" + top : "" };
  say("Searching…");
  $("results").classList.add("busy");
  try {
    const found = await (await call("v1/search", body)).json();
    if (mine !== latest) return;
    asked = { text, image: picture };
    show(found.hits);
    const moved = found.hits.filter((hit, i) => hit.nearest !== i + 1).length;
    let told = found.hits.length + (found.hits.length === 1 ? " result" : " results") + " in " + Math.round(found.milliseconds) + " ms";
    if (body.rerank) told += moved ? "; reranking moved " + moved + " of them" : "; reranking changed nothing";
    say(found.hits.length ? told + "." : "Nothing was found" + (body.filter ? " that meets the filter." : "."));
  } catch (error) {
    if (mine === latest) { show([]); say(error.message, true); }
  } finally {
    if (mine === latest) $("results").classList.remove("busy");
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
    const answer = await call("v1/documents/" + encodeURIComponent(id) + "/picture?edge=" + edge);
    const url = URL.createObjectURL(await answer.blob());
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
  const rows = [["score", hit.score.toFixed(4) + " (" + hit.by + ")"], ["place by cosine", hit.nearest], ...Object.entries(hit.metadata)];
  $("detail-metadata").replaceChildren(...rows.filter(([, value]) => value !== null).map(([name, value]) => {
    const row = document.createElement("tr"), head = document.createElement("th"), cell = document.createElement("td");
    head.textContent = name;
    cell.textContent = String(value);
    row.append(head, cell);
    return row;
  }));
  $("detail").showModal();
  const looks = [];
  if (hit.has_picture) {
    load($("detail-picture"), hit.id, 1024);
    looks.push(look("detail-map", { id: hit.id }, true));
  }
  if (asked && asked.image) looks.push(look("query-map", asked, false));
  $("detail-status").textContent = looks.length ? "Looking where the tokens look…" : "";
  const failed = (await Promise.allSettled(looks)).find((one) => one.status === "rejected");
  $("detail-status").textContent = failed ? failed.reason.message : "";
}

async function look(place, body, withTokens) {
  const maps = await (await call("v1/attention", body)).json();
  const figure = $(place);
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
for (const id of ["rerank", "top"]) $(id).addEventListener("change", () => { if (asked) search(); });

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
