// Runs before the first paint, so that a dark page never flashes white.
(() => {
  let theme = null;
  try { theme = localStorage.getItem("afterimage-theme"); } catch { /* storage is off for files in some browsers */ }
  if (theme !== "light" && theme !== "dark") {
    theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  }
  document.documentElement.dataset.theme = theme;
})();
