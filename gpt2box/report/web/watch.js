// Poll for news and show it. Content of a run is set as text, never as HTML.
"use strict";
(function () {
  const at = (id) => document.getElementById(id);
  const plots = makePlots(at("plots"));
  const MOST = 4000; // points of a curve; beyond, request all curves anew, downsampled
  const empty = () => ({ curves: "", log: "", samples: "", sample: "" });
  let known = empty(); // the versions that this page has, as the server names them
  let run = chosen(); // chosen by the reader; "" leaves it to the server
  let charts = [];
  let timer = 0;
  let asked = 0;

  function chosen() {
    try {
      return decodeURIComponent(location.hash.slice(1));
    } catch {
      return "";
    }
  }

  function element(name, ...inside) {
    const made = document.createElement(name);
    made.append(...inside);
    return made;
  }

  function table(head, rows) {
    const line = (cells, name) => element("tr", ...cells.map((cell) => (cell instanceof Node ? cell : element(name, cell))));
    const top = element("thead", line(head, "th"));
    return element("table", top, element("tbody", ...rows.map((cells) => line(cells, "td"))));
  }

  // Replace content only when it changed, so that a selection or scroll position is not lost.
  const last = {};
  function put(id, content, make) {
    const key = JSON.stringify(content);
    if (last[id] === key) return;
    last[id] = key;
    at(id).replaceChildren(...make(content));
  }

  function tiles(figures) {
    return figures.map(([name, text]) => element("div", element("dt", name), element("dd", text)));
  }

  function ofCards({ fault, cards }) {
    if (!cards.length) return [element("p", fault ? `no GPU: ${fault}` : "no GPU")];
    return cards.flatMap((card) => {
      const meter = element("meter");
      meter.value = card.used;
      meter.setAttribute("aria-label", "memory in use");
      const figures = element("dl", ...tiles(card.figures));
      figures.className = "tiles";
      const held = card.processes.length
        ? table(["program", "process", "memory held"], card.processes)
        : element("p", "The driver reports no process that holds its memory.");
      const wide = element("div", held);
      wide.className = "wide";
      return [element("h3", card.name), meter, figures, wide];
    });
  }

  function ofChoice({ names, name }) {
    return [...(names.includes(name) ? [] : [name]), ...names].map((each) => new Option(each, each, false, each === name));
  }

  function ofRuns(content) {
    if (!content.runs.length) return [element("p", "None yet: gpt2box train demo makes one. This page will show it.")];
    const rows = content.runs.map(({ name, state, fault, cells }) => {
      const link = element("a", name);
      link.href = "#" + encodeURIComponent(name);
      const shown = element("td", cells[0]);
      shown.className = `state ${state}`;
      if (fault) shown.title = fault;
      return [element("th", link), shown, ...cells.slice(1)];
    });
    const made = table(["run", "state", "step", "best val_loss", "tokens", "time", "disk"], rows);
    const current = [...made.tBodies[0].rows].find((row) => row.cells[0].textContent === content.current);
    if (current) current.setAttribute("aria-current", "true");
    return [made];
  }

  function show(answer) {
    const now = answer.run;
    const name = now ? now.name : run;
    put("runs", { runs: answer.runs, current: name }, ofRuns);
    put("run", { names: answer.runs.map((each) => each.name), name }, ofChoice);
    put("cards", answer.cards, ofCards);
    at("name").textContent = name || "gpt2box";
    at("state").textContent = now ? now.cells[0] : name ? "not there (any more)" : "no run yet";
    at("state").className = now ? now.state : "stopped";
    at("progress").hidden = !now;
    put("figures", now ? now.figures : [], tiles);
    const said = now && now.fault ? `Damaged: ${now.fault}` : "";
    at("trouble").textContent = said;
    at("trouble").hidden = !said;
    document.title = now ? `${now.cells[1]} · ${name}` : name || "gpt2box";
    if (!now) {
      for (const id of ["of-curves", "of-samples", "of-log"]) at(id).hidden = true;
      known = empty();
      return;
    }
    at("progress").value = now.progress;
    showCurves(now.curves);
    if (now.samples) showSamples(now.samples);
    if (now.log) showLog(now.log);
  }

  function showCurves(news) {
    if (news.whole) charts = news.charts;
    else if (!added(news.charts)) return (known.curves = "");
    const most = Math.max(0, ...charts.flatMap((chart) => chart.lines.map((line) => line.step.length)));
    known.curves = most > MOST && news.read === 1 ? "" : news.version;
    at("of-curves").hidden = !charts.length;
    at("reading").hidden = news.read >= 1;
    at("reading").textContent = `reading metrics.jsonl: ${Math.round(news.read * 100)}%`;
    if (charts.length && (news.whole || news.charts.length)) plots.show(charts);
  }

  function added(more) {
    // Append points to the drawn curves; return false if one of them is new.
    for (const chart of more)
      for (const line of chart.lines) {
        const to = charts.find((each) => each.title === chart.title)?.lines.find((each) => each.label === line.label);
        if (!to) return false;
        line.step.forEach((step, i) => {
          to.step.push(step);
          to.hours.push(Math.max(to.hours[to.hours.length - 1], line.hours[i]));
          to.value.push(line.value[i]);
        });
      }
    return true;
  }

  function showSamples(news) {
    known.samples = news.version;
    at("of-samples").hidden = !news.names.length;
    const newest = new Option("the newest", "");
    at("sample").replaceChildren(newest, ...news.names.map(([name, title]) => new Option(title, name)));
    at("sample").value = news.names.some(([name]) => name === known.sample) ? known.sample : "";
    at("text").textContent = news.text;
    at("text").classList.toggle("columns", news.chosen === "before-after");
  }

  function showLog(news) {
    known.log = news.version;
    const log = at("log");
    at("of-log").hidden = !news.text;
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 8;
    log.textContent = news.text;
    if (atEnd) log.scrollTop = log.scrollHeight;
  }

  async function ask() {
    clearTimeout(timer);
    const mine = ++asked;
    let wait = 5000;
    try {
      const response = await fetch("api/now?" + new URLSearchParams({ run, ...known }), { signal: AbortSignal.timeout(30000) });
      if (mine !== asked) return; // the reader chose another run meanwhile
      if (!response.ok) throw new Error(await response.text());
      const answer = await response.json();
      if (mine !== asked) return;
      show(answer);
      if (answer.run && answer.run.curves.read < 1) wait = 50;
      else if (answer.run && answer.run.state === "training") wait = 2000;
    } catch (error) {
      if (mine !== asked) return;
      const lost = error instanceof TypeError || error.name === "TimeoutError";
      at("trouble").textContent = lost ? "gpt2box watch does not answer. Retrying." : error.message;
      at("trouble").hidden = false;
    }
    if (!document.hidden) timer = setTimeout(ask, wait);
  }

  addEventListener("hashchange", () => {
    run = chosen();
    known = empty();
    charts = [];
    ask();
    scrollTo(0, 0);
  });
  at("sample").addEventListener("change", () => {
    known.sample = at("sample").value;
    ask();
  });
  at("run").addEventListener("change", () => (location.hash = encodeURIComponent(at("run").value)));
  document.addEventListener("visibilitychange", () => !document.hidden && ask());
  ask();
})();
