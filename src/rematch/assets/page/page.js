"use strict";
const $ = (id) => document.getElementById(id);
const STEP = 12, MOST = 200;
const RERANKED = Math.min(48, Number($("rerank").dataset.most)); // the server may allow fewer
const MODES = { vector: "vectors", text: "words", hybrid: "words and vectors" };
const SCORES = { cosine: "cosine", bm25: "BM25", rrf: "RRF", maxsim: "MaxSim" };
let picture = null; // the query's picture as a data URL
let like = null; // id of the document to which similar ones are searched for
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
    like = null;
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

// What is searched for; everything but the picture is in the page's address.
function query() {
  const text = $("text").value.trim();
  const values = { like, text: like ? "" : text, mode: $("mode").value, filter: $("filter").value.trim(), rerank: $("rerank").checked };
  for (const select of $("facets").querySelectorAll("select")) if (select.value) values["facet:" + select.name] = select.value;
  return values;
}

function condition(values) {
  const parts = values.filter ? ["(" + values.filter + ")"] : [];
  for (const [name, value] of Object.entries(values)) if (name.startsWith("facet:")) parts.push("`" + name.slice(6) + "` = " + value);
  return parts.length === 1 && values.filter ? values.filter : parts.join(" AND ");
}

function remember(values) {
  const address = new URLSearchParams();
  for (const [name, value] of Object.entries(values)) if (value && !(name === "mode" && value === "auto")) address.set(name === "text" ? "q" : name, value === true ? "1" : value);
  const search = address.size ? "?" + address : location.pathname;
  if (search !== location.search) history.pushState(null, "", search);
}

function restore() {
  const address = new URLSearchParams(location.search);
  $("text").value = address.get("q") || "";
  $("mode").value = ["hybrid", "vector", "text"].includes(address.get("mode")) ? address.get("mode") : "auto";
  $("filter").value = address.get("filter") || "";
  $("rerank").checked = address.has("rerank");
  for (const select of $("facets").querySelectorAll("select")) select.value = address.get("facet:" + select.name) || "";
  like = address.get("like");
  if (picture) removePicture();
  if ($("text").value || like) search({ isNew: false });
  else { show([]); say(""); }
}

async function search({ isNew = true, count = STEP } = {}) {
  const values = query();
  if (!values.text && !picture && !like) { say("Type a query or add a picture."); return; }
  const number = ++latestSearch;
  const body = { text: values.text, top: count, filter: condition(values) };
  if (like) body.like = like;
  else Object.assign(body, { image: picture, mode: values.mode, rerank: values.rerank && RERANKED ? "raw:" + Math.min(count, RERANKED) : "" });
  if (isNew) remember(values);
  say("Searching…");
  $("results").classList.add("busy");
  try {
    const response = await (await call("v1/search", body)).json();
    if (number !== latestSearch) return;
    shownQuery = { text: values.text, image: like ? null : picture };
    const hits = response.hits;
    show(hits, response.warnings);
    $("more").hidden = hits.length < count || count >= MOST;
    $("more").onclick = () => search({ isNew: false, count: Math.min(MOST, count + STEP) });
    const moved = hits.filter((hit, i) => hit.first_rank !== i + 1).length;
    let message = hits.length + (hits.length === 1 ? " result" : " results") + (like ? " like " + like : "") + " by " + MODES[response.mode] + " in " + Math.round(response.milliseconds) + " ms";
    if (body.rerank) message += moved ? "; reranking moved " + moved + " of them" : "; reranking did not change the order";
    if (!hits.length) message = body.filter ? "No document meets the conditions" : response.mode === "text" ? "No document has these words" : "The index has no documents";
    say(message + ".");
    if (response.instruction) $("status").title = "Instruction before the query: " + response.instruction;
    else $("status").removeAttribute("title");
  } catch (error) {
    if (number === latestSearch) { show([]); say(error.message, true); }
  } finally {
    if (number === latestSearch) $("results").classList.remove("busy");
  }
}

function element(kind, className, text) {
  const result = document.createElement(kind);
  result.className = className;
  if (text !== undefined) result.textContent = text;
  return result;
}

function place(hit) {
  if (hit.page) return "page " + hit.page;
  if (hit.start !== null) return "video" + (hit.start ? " from " + clock(hit.start) : "");
  return "";
}

function clock(seconds) {
  return Math.floor(seconds / 60) + ":" + String(Math.floor(seconds % 60)).padStart(2, "0");
}

function title(hit) {
  return hit.page ? hit.metadata.title || hit.id.replace(/#page=.*/, "") : hit.text || hit.id;
}

function show(hits, warnings = []) {
  $("more").hidden = true;
  $("warnings").replaceChildren(...warnings.map((text) => element("li", "", text)));
  $("warnings").hidden = !warnings.length;
  $("results").replaceChildren(...hits.map((hit, i) => {
    const card = element("button", "card");
    card.type = "button";
    card.setAttribute("aria-label", (i + 1) + ": " + title(hit) + (place(hit) ? ", " + place(hit) : ""));
    if (hit.has_picture) {
      const image = document.createElement("img");
      image.alt = "";
      load(image, hit.id, 320);
      card.append(image);
    }
    const words = element("span", "words");
    const score = element("span", "score");
    score.append(element("span", "", (SCORES[hit.by] || "P(yes)") + " " + hit.score.toFixed(3)));
    if (place(hit)) score.append(element("span", "", place(hit)));
    if (hit.first_rank !== i + 1 && !like) score.append(element("span", "moved", (hit.first_rank > i + 1 ? "▲" : "▼") + " was " + hit.first_rank));
    words.append(element("span", "name", title(hit)), score);
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
  const rows = [["score", hit.score.toFixed(4) + " (" + hit.by + ")"], ["rank by vectors", hit.vector_rank || null], ["rank by words", hit.text_rank || null], ...Object.entries(hit.metadata)];
  $("like").onclick = () => { $("detail").close(); removePicture(); $("text").value = ""; like = hit.id; search(); };
  showSource(hit);
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

// The link to a page of a PDF file or into a video. With an API key, which no link can send, the
// file is fetched first.
function showSource(hit) {
  const link = $("source"), fragment = hit.page ? "#page=" + hit.page : hit.start ? "#t=" + hit.start : "";
  link.hidden = !place(hit);
  if (link.hidden) return;
  const address = "v1/documents/" + encodeURIComponent(hit.id) + "/file";
  link.textContent = hit.page ? "Open the file at page " + hit.page : "Play the video" + (hit.start ? " from " + clock(hit.start) : "");
  link.href = address + fragment;
  link.onclick = !apiKey() ? null : async (event) => {
    event.preventDefault();
    try { window.open(URL.createObjectURL(await (await call(address)).blob()) + fragment, "_blank"); } catch (error) { $("detail-status").textContent = error.message; }
  };
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

$("form").addEventListener("submit", (event) => { event.preventDefault(); like = null; search(); });
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
$("rerank").closest("label").hidden = !RERANKED;
for (const id of ["rerank", "mode", "facets"]) $(id).addEventListener("change", () => { if (shownQuery) search(); });
window.addEventListener("popstate", restore);

function addFacets(facets) {
  $("facets").replaceChildren(...Object.entries(facets).map(([name, values]) => {
    const label = element("label", "", name + " "), select = document.createElement("select");
    select.name = name;
    select.append(new Option("any", ""), ...values.map((value) => new Option(value, typeof value === "string" ? "'" + value.replaceAll("'", "''") + "'" : String(value).toUpperCase())));
    label.append(select);
    return label;
  }));
}

(async () => {
  try {
    const [models, examples, facets] = await Promise.all([call("v1/models"), call("v1/examples"), call("v1/facets")]);
    const model = (await models.json()).data[0];
    addFacets(await facets.json());
    $("about").textContent = model.documents.toLocaleString() + " documents, encoded by " + model.id;
    $("examples").replaceChildren(...(await examples.json()).map((text) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "plain";
      button.textContent = text;
      button.addEventListener("click", () => { $("text").value = text; like = null; search(); });
      return button;
    }));
    say("");
    if (location.search) restore();
  } catch (error) {
    say(error.message, true);
  }
})();
