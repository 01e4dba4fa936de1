// After the first visit, the page comes from this machine. What is kept is listed in engine.json,
// with a version that changes with any of it; a newer version is taken with the next visit.
const PREFIX = "tensormoe-explorer-";

async function versions() {
  return (await caches.keys()).filter((name) => name.startsWith(PREFIX));
}

async function keep() {
  const { version, files } = await fetch("engine.json", { cache: "no-cache" }).then((response) => response.json());
  const name = PREFIX + version;
  if (await caches.has(name)) return;
  const cache = await caches.open(name);
  try {
    await cache.addAll(files);
  } catch (error) {
    // all files or none
    await caches.delete(name);
    throw error;
  }
}

self.addEventListener("install", (event) => event.waitUntil(keep().then(() => self.skipWaiting())));
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

self.addEventListener("fetch", (event) => {
  if (event.request.method !== "GET") return;
  event.respondWith(answer(event.request));
  // without a network, what is kept stays
  if (event.request.mode === "navigate") event.waitUntil(keep().catch(() => {}));
});

async function answer(request) {
  const names = await versions();
  if (request.mode === "navigate") await Promise.all(names.slice(0, -1).map((name) => caches.delete(name)));
  if (names.length) {
    const cache = await caches.open(names.at(-1));
    const found = await cache.match(request, { ignoreSearch: true });
    if (found) return found;
  }
  return fetch(request);
}
