// The theme at once, so that no page flashes; the rest when the page is there.
const root = document.documentElement, here = document.currentScript.src;
if (localStorage.theme) root.dataset.theme = localStorage.theme;
// Python's parts, coloured by CSS.highlights: ranges over the text, so that the pages carry no markup for them.
const python = [/(?<comment>#.*)/, /(?<string>(?<!\w)[rbfu]{0,2}(?<quote>"""|'''|["'])(?:\\[^]|(?!\k<quote>)[^])*\k<quote>)/, /(?<=\b(?:def|class) )(?<name>\w+)/, /\b(?<number>\d[\w.]*)/,
  /\b(?<word>False|None|True|and|as|assert|async|await|break|class|continue|def|del|elif|else|except|finally|for|from|global|if|import|in|is|lambda|nonlocal|not|or|pass|raise|return|try|while|with|yield)\b/];
addEventListener("DOMContentLoaded", () => {
  const [theme, find, dialog, query, hits] = ["theme", "find", "search", "query", "hits"].map(id => document.getElementById(id));
  const now = () => root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  theme.onclick = () => root.dataset.theme = localStorage.theme = now() === "dark" ? "light" : "dark";
  find.onclick = () => { dialog.showModal(); query.select(); }, hits.onclick = () => dialog.close();  // a hit may stand on this very page
  addEventListener("keydown", event => { if (event.key === "/" && !dialog.open) { event.preventDefault(); find.click(); } });
  query.oninput = async () => {
    const pagefind = await import(new URL("pagefind/pagefind.js", here)).catch(() => hits.textContent = "Search needs a web server.");
    const search = await pagefind.debouncedSearch(query.value, {}, 120), pages = await Promise.all(search?.results.slice(0, 8).map(result => result.data()) ?? []);
    const found = pages.flatMap(page => page.sub_results.slice(0, 3).map(part => ({...part, title: [...new Set([page.meta.title, part.title])].join(" › ")})));
    if (search) hits.innerHTML = found.map(part => `<li><a href="${part.url}">${part.title}</a><p>${part.excerpt}</p></li>`).join("") || "<li>Nothing found</li>";
  };
  for (const code of CSS.highlights ? document.querySelectorAll("pre.python > code") : [])
    for (const {index, 0: text, groups} of code.textContent.matchAll(RegExp(python.map(part => part.source).join("|"), "g"))) {
      const range = new Range(), kind = Object.keys(groups).find(name => groups[name]);
      range.setStart(code.firstChild, index), range.setEnd(code.firstChild, index + text.length);
      CSS.highlights.set(kind, (CSS.highlights.get(kind) ?? new Highlight()).add(range));
    }
});
