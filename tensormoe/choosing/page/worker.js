// The core itself, in Python: nothing is computed anywhere else.
import { loadPyodide } from "./pyodide/pyodide.mjs";

const FOLDER = "/tensormoe";
const START = `
import json
import sys

sys.path.insert(0, "${FOLDER}")

from tensormoe.choosing import Session
from tensormoe.factorizations import FACTORIZATIONS

session = Session()


def answer(question):
    return json.dumps(session.explore(json.loads(question)))


answer, list(FACTORIZATIONS)
`;

let answer = null;
let names = [];

async function start(core) {
  // both are on their way at once
  const archive = fetch(core).then((response) => {
    if (!response.ok) throw new Error(`${core}: ${response.status}`);
    return response.arrayBuffer();
  });
  postMessage({ progress: "Loading Python" });
  const [python, bytes] = await Promise.all([loadPyodide(), archive]);
  postMessage({ progress: "Loading tensormoe" });
  python.unpackArchive(bytes, "zip", { extractDir: FOLDER });
  [answer, names] = python.runPython(START).toJs();
}

onmessage = async ({ data }) => {
  if (data.core) {
    try {
      await start(data.core);
      postMessage({ ready: true, factorizations: names });
    } catch (error) {
      postMessage({ failed: String(error.message ?? error) });
    }
    return;
  }
  try {
    postMessage({ id: data.id, answer: answer(data.question) });
  } catch (error) {
    postMessage({ id: data.id, error: String(error.message ?? error) });
  }
};
