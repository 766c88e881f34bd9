// Sends a dropped, pasted or chosen image to the server, which answers with the key of its analysis.
// Gradio runs this when the page is loaded; "element", "props" and "trigger" are Gradio's
const drop = element.querySelector(".drop");
const input = element.querySelector("input");
const status = element.querySelector(".status");
let request = null;

function say(text, isError) {
  status.textContent = text;
  status.classList.toggle("error", Boolean(isError));
}

function send(file) {
  request?.abort();
  if (file.size > props.max_bytes) {
    say(`This file has ${(file.size / 1e6).toFixed(1)} MB, and this page takes up to ${props.max_mb} MB.`, true);
    return;
  }
  const current = new XMLHttpRequest();
  request = current;
  current.open("POST", "images");
  current.responseType = "json";
  current.setRequestHeader("X-File-Name", encodeURIComponent(file.name || "image"));
  current.upload.onprogress = (e) => say(`Sending ${file.name}: ${Math.round((100 * e.loaded) / e.total)} %`);
  current.upload.onload = () => say("The model looks at the image ...");
  current.onload = () => {
    if (current.status === 200) {
      say("");
      trigger("uploaded", { key: current.response.key });
    } else {
      say(current.response?.message || `The server answered with error ${current.status}.`, true);
    }
  };
  current.onerror = () => say("The server does not answer: is it still running?", true);
  current.send(file);
}

input.addEventListener("change", () => {
  if (input.files.length) send(input.files[0]);
  input.value = ""; // so that the same file can be chosen again
});
// A file is taken wherever it is dropped: elsewhere the browser would leave the page to show it
const isMeant = (e) => e.dataTransfer.types.includes("Files") || drop.contains(e.target);
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (e) => {
    if (!isMeant(e)) return;
    e.preventDefault();
    drop.classList.add("over");
  });
}
for (const name of ["dragleave", "drop"]) {
  document.addEventListener(name, () => drop.classList.remove("over"));
}
document.addEventListener("drop", (e) => {
  if (!isMeant(e)) return;
  e.preventDefault();
  if (e.dataTransfer.files.length) send(e.dataTransfer.files[0]);
  else say("This is not a file: save the image first, then drop its file.", true);
});
document.addEventListener("paste", (e) => {
  if (e.clipboardData?.files.length) send(e.clipboardData.files[0]);
});
element.addEventListener("click", (e) => {
  const button = e.target.closest("[data-example]");
  if (!button) return;
  request?.abort();
  say("");
  trigger("example", { number: Number(button.dataset.example) });
});
