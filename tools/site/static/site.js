// The theme at once, so that no page flashes; the rest when the page is there.
const root = document.documentElement, here = document.currentScript.src;
if (localStorage.theme) root.dataset.theme = localStorage.theme;
addEventListener("DOMContentLoaded", () => {
  const [theme, find, dialog, query, hits] = ["theme", "find", "search", "query", "hits"].map(id => document.getElementById(id));
  theme.onclick = () => {
    const now = root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    root.dataset.theme = localStorage.theme = now === "dark" ? "light" : "dark";
  };
  find.onclick = () => { dialog.showModal(); query.select(); };
  addEventListener("keydown", event => { if (event.key === "/" && !dialog.open) { event.preventDefault(); find.click(); } });
  query.oninput = async () => {
    const pagefind = await import(new URL("pagefind/pagefind.js", here)).catch(() => hits.textContent = "Search needs a web server.");
    const search = await pagefind.debouncedSearch(query.value, {}, 120);
    const pages = await Promise.all(search?.results.slice(0, 8).map(result => result.data()) ?? []);
    if (search) hits.innerHTML = pages.map(page => `<li><a href="${page.url}">${page.meta.title}</a><p>${page.excerpt}</p></li>`).join("") || "<li>Nothing found</li>";
  };
});
