(query) => {
  // Put the settings into the address bar and return the whole link; Gradio's own parameters (`__theme`) stay.
  const url = new URL(window.location), mine = new URLSearchParams(query);
  for (const [key, value] of url.searchParams) if (key.startsWith("__")) mine.append(key, value);
  url.search = mine;
  window.history.replaceState(null, "", url);
  return url.href;
}
