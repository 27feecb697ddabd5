"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const one = (selector, root = document) => root.querySelector(selector);
  for (const element of all(".js")) element.hidden = false;

  // ------------------------------------------------------------------ rows: sorting and filtering

  const keyOf = (row, column) => {
    const cell = row.cells[column];
    return cell ? (cell.dataset.key ?? cell.textContent.trim()) : "";
  };
  const compare = (a, b) => {
    if ((a === "") !== (b === "")) return a === "" ? 1 : -1; // nothing comes last, whichever way
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
  };
  const sort = (table, column, down) => {
    for (const body of table.tBodies) {
      const rows = [...body.rows].filter((row) => row.dataset.row);
      const keyed = rows.map((row, place) => ({ row, place, key: keyOf(row, column) }));
      keyed.sort((a, b) => {
        const order = compare(a.key, b.key);
        const last = a.key === "" || b.key === "";
        return (down && !last ? -order : order) || a.place - b.place;
      });
      body.append(...keyed.map((item) => item.row));
    }
  };
  for (const table of all("table.main")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const text = one(".head", head);
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = text.textContent;
      text.replaceWith(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        sort(table, column, down);
      });
    });
  }

  const lines = all("#table tr[data-row]");
  const facets = one("#facets");
  const chosen = {};
  for (const [key, title] of [["method", "Method"], ["source", "Source"], ["steps", "Steps"]]) {
    const values = [...new Set(lines.map((line) => line.dataset[key]).filter(Boolean))];
    if (values.length < 2 || !facets) continue;
    values.sort(compare);
    const label = document.createElement("label");
    const select = document.createElement("select");
    select.dataset.facet = key;
    for (const value of ["", ...values]) select.add(new Option(value || "all", value));
    label.append(title, " ", select);
    facets.append(label);
    chosen[key] = select;
  }
  const filter = () => {
    const words = one("#q").value.toLowerCase().split(/\s+/).filter(Boolean);
    const visible = new Set();
    for (const line of lines) {
      const fits =
        words.every((word) => line.dataset.words.includes(word)) &&
        Object.entries(chosen).every(([key, select]) => !select.value || line.dataset[key] === select.value) &&
        !(one("#clean").checked && "serious" in line.dataset);
      line.hidden = !fits;
      if (fits) visible.add(line.dataset.row);
    }
    for (const body of all("#table tbody")) body.hidden = ![...body.rows].some((row) => row.dataset.row && !row.hidden);
    for (const element of all("#cost tr[data-row], .card, details.row")) element.hidden = !visible.has(element.dataset.row);
    for (const point of all(".chart .point")) point.classList.toggle("filtered", !visible.has(point.dataset.row));
    for (const plot of all(".plot")) dim(plot);
    one("#shown").textContent = `${visible.size} of ${lines.length} rows`;
  };

  // ------------------------------------------------------------------------------------------ plots

  const hiddenLine = (plot, line) => {
    const button = one(`.legend [data-line="${line}"]`, plot);
    return button !== null && button.getAttribute("aria-pressed") === "false";
  };
  function dim(plot) {
    for (const group of all(".line", plot)) {
      const off = hiddenLine(plot, group.dataset.line);
      const points = all(".point", group);
      for (const point of points) point.classList.toggle("off", off || point.classList.contains("filtered"));
      const gone = points.every((point) => point.classList.contains("off"));
      for (const curve of all(".curve, .level", group)) curve.classList.toggle("off", gone);
      const label = one(`.label[data-line="${group.dataset.line}"]`, plot);
      if (label) label.classList.toggle("off", gone);
    }
  }
  for (const plot of all(".plot")) {
    const svg = one("svg", plot);
    const tip = one(".tip", plot);
    const points = all(".point", svg);
    let at = -1;
    tip.hidden = false;
    tip.textContent = "\u00a0";
    svg.setAttribute("tabindex", "0");
    const show = (point) => {
      for (const other of points) other.classList.toggle("on", other === point);
      for (const line of all("tr.here")) line.classList.remove("here");
      if (!point) return;
      at = points.indexOf(point);
      tip.textContent = point.getAttribute("aria-label");
      tip.classList.add("full");
      const line = one(`#table tr[data-row="${point.dataset.row}"]`);
      if (line) line.classList.add("here");
    };
    const open = (point) => {
      if (point.dataset.row) location.hash = point.dataset.row;
    };
    for (const point of points) {
      point.addEventListener("pointerenter", () => show(point));
      point.addEventListener("click", () => open(point));
    }
    svg.addEventListener("keydown", (event) => {
      const usable = points.filter((point) => !point.classList.contains("off"));
      if (!usable.length) return;
      const place = usable.indexOf(points[at]);
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (step) show(usable[(Math.max(place, step > 0 ? -1 : 0) + step + usable.length) % usable.length]);
      else if (event.key === "Home") show(usable[0]);
      else if (event.key === "End") show(usable[usable.length - 1]);
      else if (event.key === "Enter" && place >= 0) open(points[at]);
      else if (event.key === "Escape") show(null);
      else return;
      event.preventDefault();
    });
    for (const button of all(".legend button", plot)) {
      button.addEventListener("click", () => {
        button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") === "false"));
        dim(plot);
      });
    }
  }
  if (one(".filter")) {
    one(".filter").addEventListener("input", filter);
    one(".filter").addEventListener("submit", (event) => event.preventDefault());
    one(".filter").addEventListener("reset", () => setTimeout(filter));
    filter();
  }

  // ------------------------------------------------------------------------------ texts side by side

  // Words of `text` that are not in the longest common order with `other`: as the page's own marks are made.
  const split = (text) => text.match(/\s*\S+|\s+$/g) ?? [];
  const differing = (text, other) => {
    const words = split(text);
    const [a, b] = [words, split(other)].map((list) => list.slice(0, 1500).map((word) => word.trim()));
    const width = b.length + 1;
    const table = new Uint16Array((a.length + 1) * width);
    for (let i = a.length - 1; i >= 0; i--)
      for (let j = b.length - 1; j >= 0; j--)
        table[i * width + j] =
          a[i] === b[j]
            ? table[(i + 1) * width + j + 1] + 1
            : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
    const same = new Set();
    for (let i = 0, j = 0; i < a.length && j < b.length; )
      if (a[i] === b[j]) same.add(i++), j++;
      else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) i++;
      else j++;
    return words.map((word, i) => ({ word, differs: i < a.length && !same.has(i) && word.trim() !== "" }));
  };
  const written = (pieces) => {
    const target = document.createElement("p");
    target.className = "text";
    target.dir = "auto";
    for (const { word, differs } of pieces) {
      if (!differs) target.append(word);
      else {
        const mark = document.createElement("mark");
        const bare = word.trimStart();
        target.append(word.slice(0, word.length - bare.length));
        mark.textContent = bare;
        target.append(mark);
      }
    }
    return target;
  };
  const pair = one(".pair");
  if (pair) {
    const sequences = all("details.sequence");
    let number = 0;
    const fill = () => {
      const texts = ["left", "right"].map((side) => {
        const card = one(`.card[data-row="${one(`#${side}`).value}"]`, sequences[number]);
        return card ? one(".text", card).textContent : null;
      });
      ["left", "right"].forEach((side, k) => {
        const title = document.createElement("h4");
        title.textContent = one(`#${side}`).selectedOptions[0].textContent;
        const [mine, other] = [texts[k], texts[1 - k]];
        const plain = mine === null || other === null || !one("#mark").checked;
        const pieces = plain ? [{ word: mine ?? "(no text of this number)", differs: false }] : differing(mine, other);
        one(`#pair-${side}`).replaceChildren(title, written(pieces));
      });
      one("#number").textContent = `sequence ${sequences[number].dataset.sequence} of ${sequences.length}`;
    };
    const move = (step) => {
      number = (number + step + sequences.length) % sequences.length;
      fill();
    };
    one("#previous").addEventListener("click", () => move(-1));
    one("#next").addEventListener("click", () => move(1));
    for (const control of all("#left, #right, #mark")) control.addEventListener("change", fill);
    fill();
  }

  // ---------------------------------------------------------------------------- through the steps

  for (const trace of all("details.trace")) {
    const { pieces, first, steps, changes } = JSON.parse(trace.dataset.states);
    const slider = one("input", trace);
    const target = one(".player .text", trace);
    const told = one("output", trace);
    const button = one(".play", trace);
    let timer = 0;
    const stateAt = (k) => {
      const state = first.slice();
      for (let i = 0; i < k; i++) for (const [place, token] of changes[i]) state[place] = token;
      return state;
    };
    const draw = () => {
      const k = Number(slider.value);
      const fresh = new Set(k ? changes[k - 1].map(([place]) => place) : []);
      target.replaceChildren();
      let open = null;
      stateAt(k).forEach((token, place) => {
        const changed = fresh.has(place);
        if (!open || open.changed !== changed) {
          const node = document.createElement(changed ? "mark" : "span");
          if (changed) node.className = "new";
          target.append(node);
          open = { changed, node };
        }
        open.node.append(pieces[token]);
      });
      const words = `after step ${steps[k]}` + (k ? `: ${fresh.size} of ${first.length} tokens changed` : "");
      told.textContent = words;
      slider.setAttribute("aria-valuetext", words);
    };
    const stop = () => {
      clearInterval(timer);
      timer = 0;
      button.textContent = "Play";
      button.setAttribute("aria-pressed", "false");
    };
    button.addEventListener("click", () => {
      if (timer) return stop();
      if (Number(slider.value) >= steps.length - 1) slider.value = 0;
      button.textContent = "Stop";
      button.setAttribute("aria-pressed", "true");
      timer = setInterval(() => {
        slider.value = Number(slider.value) + 1;
        draw();
        if (Number(slider.value) >= steps.length - 1) stop();
      }, Math.max(60, Math.min(700, 8000 / steps.length)));
      draw();
    });
    slider.addEventListener("input", () => {
      stop();
      draw();
    });
    draw();
  }

  // ------------------------------------------------------------------------------------- commands

  for (const button of all(".copy")) {
    button.addEventListener("click", async () => {
      const code = one("code", button.parentElement);
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        button.textContent = "Selected";
      }
      setTimeout(() => (button.textContent = "Copy"), 1500);
    });
  }
})();
