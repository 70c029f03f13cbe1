// The page of `xfuser serve`. It asks the server's own API, and keeps this session's images in memory.

const PREVIEWS = 6;
const HEALTH_MS = 3000;
const MOST_IMAGES = 200;

const at = (id) => document.getElementById(id);
const form = at("form");
const field = (name) => form.elements[name];

let facts = null;
let running = null; // AbortController of the request under way
let images = []; // {url, values, seed, size, seconds}, the newest one first
let chosen = null;

// ---- the server ----------------------------------------------------------------------------------------------------

function headers() {
  const key = field("key").value;
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function watchHealth() {
  let state = "gone";
  let text = "the server does not answer";
  try {
    const answer = await (await fetch("health", { cache: "no-store" })).json();
    state = answer.status;
    const waiting = answer.waiting ? `, ${answer.waiting} in the queue` : "";
    text = state === "ok" ? `ready${waiting}` : `${state}${answer.reason ? `: ${answer.reason}` : ""}`;
    at("model").textContent = document.title = answer.model;
    if (state === "ok" && facts === null) await loadFacts();
  } catch { /* said by the text */ }
  at("health").dataset.state = state;
  if (at("health-text").textContent !== text) at("health-text").textContent = text;
  setTimeout(watchHealth, HEALTH_MS);
}

async function loadFacts() {
  const answer = await fetch("facts", { headers: headers() });
  at("key-field").hidden = answer.status !== 401;
  if (!answer.ok) return;
  facts = await answer.json();
  at("parallel").textContent = `${facts.pipeline}, ${facts.parallel}`;
  showShapes(facts.width, facts.height);
  for (const [name, value] of Object.entries({
    width: facts.width, height: facts.height, num_inference_steps: facts.steps, guidance_scale: facts.guidance_scale,
  })) {
    field(name).placeholder = value === null ? "model's" : "";
    if (field(name).value === "" && value !== null) field(name).value = value;
  }
  field("num_inference_steps").max = facts.max_steps;
  field("n").max = facts.max_images;
  field("scheduler").parentElement.hidden = !fillChoice("scheduler", "the model's", facts.schedulers);
  at("loras").hidden = !fillChoice("lora", "none", facts.loras);
}

/** Let a control offer these values beside its own; return how many there are. */
function fillChoice(name, own, values) {
  field(name).replaceChildren(new Option(own, ""), ...values.map((value) => new Option(value, value)));
  return values.length;
}

function showShapes(width, height) {
  const side = Math.sqrt(width * height) || 0;
  const scaled = (factor) => Math.round((side * factor) / 64) * 64;
  const shapes = [["model's", width, height], ["square", scaled(1), scaled(1)], ["landscape", scaled(1.2), scaled(0.82)],
    ["portrait", scaled(0.82), scaled(1.2)]];
  const seen = new Set();
  const options = shapes.filter(([, w, h]) => w && h && !seen.has(`${w}x${h}`) && seen.add(`${w}x${h}`));
  field("shape").replaceChildren(
    ...options.map(([name, w, h]) => new Option(name, `${w}x${h}`)),
    new Option("other", ""),
  );
}

// ---- the form ------------------------------------------------------------------------------------------------------

const TEXTS = ["prompt", "negative_prompt", "scheduler"];
const NUMBERS = ["num_inference_steps", "guidance_scale", "seed", "n"];
const WHERE = { size: "width", lora: "lora" }; // fields of the API whose control has another name

function bodyOfForm() {
  const body = { stream: true, partial_images: PREVIEWS };
  for (const name of TEXTS) if (field(name).value) body[name] = field(name).value;
  for (const name of NUMBERS) if (field(name).value !== "") body[name] = Number(field(name).value);
  const [width, height] = [field("width").value, field("height").value];
  if (width && height) body.size = `${width}x${height}`;
  if (field("lora").value) body.lora = { name: field("lora").value, weight: Number(field("lora_weight").value) };
  return body;
}

function showError(message, name) {
  at("error").hidden = !message;
  at("error").textContent = message;
  for (const control of form.elements) control.removeAttribute("aria-invalid");
  const wrong = name && field(WHERE[name] ?? name);
  if (!wrong) return;
  wrong.setAttribute("aria-invalid", "true");
  wrong.focus();
}

/** Return what is wrong before anything is sent, as [message, field]; null where nothing is. */
function wrongInForm() {
  if (!field("prompt").value.trim()) return ["Give a prompt.", "prompt"];
  for (const control of form.elements) {
    if (!control.willValidate || control.validity.valid || control.closest("[hidden]")) continue;
    return [`${control.parentElement.firstChild.textContent.trim()}: ${control.validationMessage}`, control.name];
  }
  if (!field("width").value !== !field("height").value) return ["Give width and height, or neither.", "width"];
  return null;
}

function reuse(image) {
  for (const name of [...TEXTS, ...NUMBERS]) field(name).value = image.values[name] ?? "";
  field("seed").value = image.seed;
  field("n").value = 1;
  [field("width").value, field("height").value] = image.size.split("x");
  field("lora").value = image.values.lora?.name ?? "";
  field("lora_weight").value = image.values.lora?.weight ?? 1;
  matchShape();
  field("prompt").focus();
}

function matchShape() {
  field("shape").value = `${field("width").value}x${field("height").value}`;
  if (field("shape").selectedIndex < 0) field("shape").value = "";
}

// ---- one request ---------------------------------------------------------------------------------------------------

async function generate() {
  if (running) return;
  const wrong = wrongInForm();
  showError(...(wrong ?? [""]));
  if (wrong) return;
  const values = bodyOfForm();
  const request = { values, count: values.n ?? 1, done: 0, begun: performance.now(), isAccepted: false };
  running = new AbortController();
  setBusy(true);
  show(null);
  if (matchMedia("(max-width: 52rem)").matches) at("stage").scrollIntoView({ block: "start" });
  at("status").textContent = "Sent";
  try {
    const answer = await fetch("v1/images/generations", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...headers() },
      body: JSON.stringify(values),
      signal: running.signal,
    });
    if (!answer.ok) throw await problemOf(answer);
    at("status").textContent = "In the queue";
    for await (const event of eventsOf(answer.body)) take(event, request);
    if (request.done < request.count) throw new Error("The server has closed the connection.");
  } catch (error) {
    if (error.name === "AbortError") at("status").textContent = "Cancelled";
    else {
      at("status").textContent = "";
      showError(error.name === "TypeError" ? "The server does not answer." : error.message, error.param);
    }
    show(request.done ? images[0] : chosen ?? images[0] ?? null);
  } finally {
    running = null;
    setBusy(false);
  }
}

async function problemOf(answer) {
  let problem = {};
  try {
    problem = (await answer.json()).error ?? {};
  } catch { /* an answer of something between, a proxy */ }
  const error = new Error(problem.message ?? `The server answers ${answer.status}.`);
  const wait = answer.headers.get("Retry-After");
  if (wait) error.message += ` (try again in ${wait} s)`;
  if (answer.status === 401) {
    at("key-field").hidden = false;
    problem.param = "key";
  }
  error.param = problem.param;
  return error;
}

async function* eventsOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "))?.slice(6);
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function take(event, request) {
  if (event.error) throw Object.assign(new Error(event.error.message), { param: event.error.param });
  const which = request.count > 1 ? `Image ${event.image_index + 1} of ${request.count}, ` : "";
  if (event.type.endsWith(".completed")) {
    const seconds = (performance.now() - request.begun) / 1000;
    request.done += 1;
    request.begun = performance.now();
    addImage({ url: urlOf(event), values: request.values, seed: event.seed, size: event.size, seconds });
    at("status").textContent = `${which || "Image "}done in ${seconds.toFixed(1)} s`;
    return;
  }
  at("bar").value = event.step / event.steps;
  at("status").textContent = `${which}${which ? "s" : "S"}tep ${event.step} of ${event.steps}`;
  if (event.b64_json) showPicture(`data:image/png;base64,${event.b64_json}`, `Preview after step ${event.step}`, true);
}

function urlOf(event) {
  const bytes = Uint8Array.from(atob(event.b64_json), (letter) => letter.charCodeAt(0));
  return URL.createObjectURL(new Blob([bytes], { type: `image/${event.output_format}` }));
}

function setBusy(busy) {
  at("generate").setAttribute("aria-disabled", String(busy)); // which keeps the focus there
  if (!busy && document.activeElement === at("cancel")) at("generate").focus();
  at("work").hidden = !busy;
  at("bar").value = 0;
  at("stage").setAttribute("aria-busy", String(busy));
}

// ---- what is shown -------------------------------------------------------------------------------------------------

function showPicture(address, text, isPreview) {
  const shown = at("shown");
  shown.hidden = !address;
  at("empty").hidden = Boolean(address);
  if (address) shown.src = address;
  else shown.removeAttribute("src");
  shown.alt = text;
  shown.classList.toggle("preview", isPreview);
}

/** Show an image of the session, or nothing. */
function show(image) {
  if (image) chosen = image;
  showPicture(image?.url, image ? image.values.prompt : "", false);
  at("caption").hidden = !image;
  for (const button of at("gallery").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(image !== null && button.dataset.url === image.url));
  }
  if (!image) return;
  const { values, seed, size, seconds } = image;
  const more = [values.scheduler, values.lora && `LoRA ${values.lora.name} ${values.lora.weight}`].filter(Boolean);
  const steps = values.num_inference_steps ? `${values.num_inference_steps} steps, ` : "";
  const details = [`${size.replace("x", " × ")}, ${steps}seed ${seed}`, ...more, `${seconds.toFixed(1)} s`];
  at("caption-text").textContent = `${values.prompt} · ${details.join(", ")}`;
  at("download").href = image.url;
  at("download").download = `${seed}.png`;
}

function addImage(image) {
  images.unshift(image);
  for (const old of images.splice(MOST_IMAGES)) {
    at("gallery").querySelector(`[data-url="${old.url}"]`).parentElement.remove();
    URL.revokeObjectURL(old.url);
  }
  const button = document.createElement("button");
  button.type = "button";
  button.dataset.url = image.url;
  button.title = `${image.values.prompt} (seed ${image.seed})`;
  const small = document.createElement("img");
  small.src = image.url;
  small.alt = button.title;
  button.append(small);
  button.addEventListener("click", () => !running && show(image));
  const item = document.createElement("li");
  item.append(button);
  at("gallery").prepend(item);
  at("session").hidden = false;
  show(image);
}

// ---- what people do ------------------------------------------------------------------------------------------------

form.addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
at("cancel").addEventListener("click", () => running?.abort());
at("reuse").addEventListener("click", () => chosen && reuse(chosen));
field("shape").addEventListener("change", () => {
  if (field("shape").value) [field("width").value, field("height").value] = field("shape").value.split("x");
  else field("width").focus();
});
for (const name of ["width", "height"]) field(name).addEventListener("input", matchShape);
field("key").addEventListener("change", loadFacts);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    generate();
  }
});
watchHealth();
