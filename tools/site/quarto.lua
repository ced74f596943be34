-- What Quarto adds to pandoc's Markdown: numbers and references, callouts, tabsets. Runs before citeproc.
local names = {fig = "Figure", tbl = "Table", eq = "Equation"}
local counts, labels, tabsets = {}, {}, 0

-- A label's name and number; nil if the identifier is no label.
local function number(id)
  local kind = id:match("^(%a+)%-")
  if not names[kind] then return elseif labels[id] then error("the label " .. id .. " is used twice") end
  counts[kind] = (counts[kind] or 0) + 1
  labels[id] = {name = names[kind] .. "\u{a0}", number = tostring(counts[kind])}
  return labels[id]
end

local function caption(element)
  local text, label = element.caption.long, number(element.identifier)
  if label and text[1] then
    text[1].content = pandoc.Inlines{pandoc.Strong(label.name .. label.number .. ":"), pandoc.Space()} .. text[1].content
    element.caption.long = text
  end
  return element
end

-- ::: {#fig-name} anything, then its caption :::
local function float(div)
  for name in pairs(div.attributes) do if name:match("^layout") or name:match("subcap$") then error(name .. ": draw the panels in one figure") end end
  if not names[div.identifier:match("^(%a+)%-")] then return end
  local text = pandoc.Plain(div.content:remove().content)
  return caption(pandoc.Figure(div.content, {long = {text}}, div.attr))
end

-- $$ ... $$ {#eq-name}: formula and number in a span that carries the name.
local function equations(inlines)
  local i = 3
  while inlines[i] do
    local id, rest = (inlines[i].text or ""):match("^{#(eq%-[^}]+)}(.*)$")
    if id and inlines[i - 2].t == "Math" then
      inlines[i - 2] = pandoc.Span({inlines[i - 2], pandoc.Span("(" .. number(id).number .. ")")}, {id = id, class = "equation"})
      inlines[i - 1] = pandoc.Str(rest)
      inlines:remove(i)
    else i = i + 1 end
  end
  return inlines
end

-- @fig-name, [-@eq-name]; citeproc gets the other keys and warns of what it does not know.
local function reference(cite)
  local links = pandoc.Inlines{}
  for _, citation in ipairs(cite.citations) do
    local label = labels[citation.id]
    if not label then return end
    if links[1] then links:extend{pandoc.Str(","), pandoc.Space()} end
    links:insert(pandoc.Link((citation.mode == "SuppressAuthor" and "" or label.name) .. label.number, "#" .. citation.id))
  end
  return links
end

local function details(attributes, title, blocks)
  local function html(text) return pandoc.RawBlock("html", text) end
  return pandoc.Blocks{html("<details " .. attributes .. "><summary>"), pandoc.Plain(title), html("</summary>")} .. blocks .. {html("</details>")}
end

-- The title is an attribute, the first heading, or the kind of callout.
local function callout(div, kind)
  local title, first = pandoc.Inlines(kind:gsub("^%l", string.upper)), div.content[1]
  if div.attributes.title then title = pandoc.read(div.attributes.title).blocks[1].content
  elseif first and first.t == "Header" then title = div.content:remove(1).content end
  return details(('class="callout %s"%s'):format(kind, div.attributes.collapse == "true" and "" or " open"), title, div.content)
end

-- Disclosures of one name: opening one closes the others, without a script.
local function tabset(div)
  local result, level = pandoc.Blocks{}, div.content[1].level
  tabsets = tabsets + 1
  while div.content[1] do
    local title, blocks = div.content:remove(1).content, pandoc.Blocks{}
    while div.content[1] and div.content[1].level ~= level do blocks:insert(div.content:remove(1)) end
    result:extend(details(('name="tabs-%d"%s'):format(tabsets, result[1] and "" or " open"), title, blocks))
  end
  return pandoc.Div(result, {class = "tabset"})
end

local function quarto(div)
  if div.classes:includes("panel-tabset") then return tabset(div) end
  local kind = (div.classes[1] or ""):match("^callout%-(%a+)$")
  if kind then return callout(div, kind) end
end

local function image(element)
  element.attributes.alt, element.attributes["fig-alt"] = element.attributes["fig-alt"] or element.attributes.alt, nil
  if not (element.attributes.alt or element.caption[1]) then error(element.src .. " has no alternative text") end
  return element
end

return {{traverse = "topdown", Div = float, Figure = caption, Table = caption, Inlines = equations, Image = image}, {Cite = reference, Div = quarto}}
