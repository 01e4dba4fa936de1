// What answers the page: a server on this machine, or Python in a worker of the browser.

/** The engine that belongs to where the page is from; `report` is told how far it has come. */
export async function openEngine(report) {
  const found = await fetch("engine.json").then((response) => {
    if (!response.ok) throw new Error(`engine.json: ${response.status}`);
    return response.json();
  });
  if (found.engine === "server") return { ...found, explore: askServer };
  if (found.engine === "pyodide") return { ...found, ...(await openWorker(found, report)) };
  throw new Error(found.reason);
}

async function askServer(question, signal) {
  const response = await fetch("explore", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(question),
    signal,
  });
  if (!response.ok) throw new Error((await response.text()).trim() || String(response.status));
  return response.json();
}

/** Python in a worker. It answers in the order of the questions, and cannot be interrupted. */
async function openWorker(found, report) {
  const worker = new Worker("worker.js", { type: "module" });
  const waiting = new Map();
  let last = 0;
  const factorizations = await new Promise((resolve, reject) => {
    worker.onerror = (event) => reject(new Error(event.message || "the worker did not start"));
    worker.onmessage = ({ data }) => {
      if (data.progress) report(data.progress);
      if (data.ready) resolve(data.factorizations);
      if (data.failed) reject(new Error(data.failed));
      const asked = waiting.get(data.id);
      if (!asked) return;
      waiting.delete(data.id);
      if (data.error) asked.reject(new Error(data.error));
      else asked.resolve(JSON.parse(data.answer));
    };
    worker.postMessage({ core: found.core });
  });
  const explore = (question) =>
    new Promise((resolve, reject) => {
      waiting.set(++last, { resolve, reject });
      worker.postMessage({ id: last, question: JSON.stringify(question) });
    });
  return { explore, factorizations };
}
