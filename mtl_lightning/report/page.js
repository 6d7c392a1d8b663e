"use strict";
(() => {
  const run = JSON.parse(document.getElementById("run").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const { groups: GROUPS, preference: PREFERENCE, strength: STRENGTH } = run.palette;  // those of the figures
  const SERIES = 10;
  let ids = 0;

  // ------------------------------------------------------------------------------------------------------ elements

  // Text only ever enters the page through text nodes and attributes, never as markup.
  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name === "style") Object.assign(node.style, value);
      else node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return node;
  }
  const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
  const newId = (stem) => `${stem}-${++ids}`;

  function format(value, digits = 4) {
    if (value === null || value === undefined || !Number.isFinite(value)) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (Number.isInteger(value) && size < 1e9) return value.toLocaleString("en-US");
    if (size >= 1e6 || size < 1e-4) return value.toExponential(Math.max(0, digits - 2)).replace("e-", "e−").replace("e+", "e").replace(/^-/, "−");
    return String(Number(value.toPrecision(digits))).replace(/^-/, "−");
  }

  // Names break after underscores and slashes rather than anywhere.
  function broken(name) {
    return name.split(/(?<=[_/.])/).flatMap((part, index) => (index ? [el("wbr"), part] : [part]));
  }

  function ticks(low, high, count) {
    const rough = (high - low) / Math.max(1, count);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough * 0.999);
    const found = [];
    for (let place = Math.ceil(low / step - 1e-9); place * step <= high + step * 1e-9; place++) found.push(place * step);
    return found;
  }

  function padded(values, share = 0.07) {
    let low = Infinity, high = -Infinity;
    for (const value of values) {
      if (value === null || !Number.isFinite(value)) continue;
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
    if (low > high) return [0, 1];
    const margin = high > low ? share * (high - low) : Math.max(0.05 * Math.abs(low), 1e-3);
    return [low - margin, high + margin];
  }

  const scale = ([low, high], from, to) => (value) => from + ((value - low) / (high - low)) * (to - from);

  // A chart is drawn for the width that it has, so that its text keeps its size.
  function chart(draw) {
    const host = el("div", { class: "chart" });
    let width = 0;
    const redraw = () => { if (width) host.replaceChildren(draw(width)); };
    new ResizeObserver(([entry]) => {
      const found = Math.round(entry.contentRect.width);
      if (found && found !== width) { width = found; redraw(); }
    }).observe(host);
    return { host, redraw };
  }

  function frame(width, height, label) {
    return svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group", "aria-label": label });
  }

  function axes(picture, box, xDomain, yDomain, xName, yName, isCount = false) {
    const x = scale(xDomain, box.left, box.right), y = scale(yDomain, box.bottom, box.top);
    for (const value of ticks(...yDomain, (box.bottom - box.top) / 55)) {
      picture.append(svg("line", { class: "grid", x1: box.left, x2: box.right, y1: y(value), y2: y(value) }));
      picture.append(svg("text", { x: box.left - 8, y: y(value) + 4, "text-anchor": "end" }, format(value)));
    }
    for (const value of ticks(...xDomain, (box.right - box.left) / 85).filter((one) => !isCount || Number.isInteger(one))) {
      picture.append(svg("line", { class: "grid", x1: x(value), x2: x(value), y1: box.top, y2: box.bottom }));
      picture.append(svg("text", { x: x(value), y: box.bottom + 18, "text-anchor": "middle" }, format(value)));
    }
    picture.append(svg("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }));
    picture.append(svg("text", { class: "name", x: (box.left + box.right) / 2, y: box.bottom + 38, "text-anchor": "middle" }, cut(xName, (box.right - box.left) / 6.5)));
    const middle = (box.top + box.bottom) / 2;
    picture.append(svg("text", { class: "name", x: 14, y: middle, "text-anchor": "middle", transform: `rotate(-90 14 ${middle})` }, cut(yName, (box.bottom - box.top) / 6.5)));
    return { x, y };
  }

  function cut(text, length) {
    const most = Math.max(4, Math.floor(length));
    return text.length <= most ? text : `${text.slice(0, Math.ceil(most / 2) - 1)}…${text.slice(text.length - Math.floor(most / 2))}`;
  }

  // ------------------------------------------------------------------------------------------------------- tooltip

  const tooltip = document.getElementById("tooltip");
  function showTooltip(target, content) {
    tooltip.replaceChildren(...content);
    tooltip.hidden = false;
    const spot = target.getBoundingClientRect(), own = tooltip.getBoundingClientRect();
    const x = spot.left + Math.min(spot.width, 12) / 2, gap = 14;
    const left = Math.max(6, Math.min(x + gap, window.innerWidth - own.width - 6));
    const below = spot.bottom + gap, above = spot.top - own.height - gap;
    tooltip.style.transform = `translate(${left}px, ${below + own.height > window.innerHeight && above > 0 ? above : below}px)`;
  }
  function hideTooltip() { tooltip.hidden = true; }
  addEventListener("keydown", (event) => { if (event.key === "Escape") hideTooltip(); });
  addEventListener("scroll", hideTooltip, { passive: true });

  function hints(node, content) {
    fill(node, {
      onpointerenter: () => showTooltip(node, content()), onpointerleave: hideTooltip,
      onfocus: () => { if (node.matches(":focus-visible")) showTooltip(node, content()); }, onblur: hideTooltip,
    }, []);
    return node;
  }

  const table = (rows) => el("table", {}, el("tbody", {}, rows.map(([name, ...cells]) =>
    el("tr", {}, el("th", { scope: "row" }, ...broken(name)), cells.map((cell) => el("td", {}, cell))))));

  // ---------------------------------------------------------------------------------------------------------- code

  function codeBlock(text) {
    const pre = el("pre", {}, el("code", {}, text));
    const button = el("button", { type: "button", onclick: () => copy(pre, button) }, "Copy");
    return { host: el("div", { class: "code" }, pre, button), set: (next) => { pre.firstChild.textContent = next; button.hidden = !next; } };
  }

  async function copy(node, button) {
    try {
      await navigator.clipboard.writeText(node.textContent);
      button.textContent = "Copied";
    } catch {  // not allowed here: select it, so that the keyboard can copy
      getSelection().selectAllChildren(node);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }

  // --------------------------------------------------------------------------------------------------------- front

  function blend(weight) {
    const place = Math.max(0, Math.min(1, weight ?? 0.5)) * 2, from = Math.min(1, Math.floor(place));
    const mixed = PREFERENCE[from].map((value, index) => Math.round(value + (place - from) * (PREFERENCE[from + 1][index] - value)));
    return `rgb(${mixed.join(" ")})`;
  }

  const better = (objective) => `${objective.name} (${objective.direction === "min" ? "lower" : "higher"} is better)`;
  const arrow = (objective) => `${objective.name} ${objective.direction === "min" ? "↓" : "↑"}`;
  const isAt = (model, when) => model.epoch === when.epoch && model.step === when.step;
  const isSame = (one, other) => one.epoch === other.epoch && one.step === other.step && one.subproblem === other.subproblem;
  const nameOf = (front, model) => (front.preferences.length ? `Subproblem ${model.subproblem}` : "Model") + `, epoch ${model.epoch}, after ${format(model.step)} steps`;

  function describe(front, model) {
    const paths = run.checkpoints.filter((checkpoint) => isAt(model, checkpoint)).map((checkpoint) => checkpoint.path);
    return [
      el("strong", {}, nameOf(front, model)),
      table([
        ...front.preferences.map((name, index) => [`preference ${name}`, format(model.preference[index])]),
        ...front.objectives.map((objective, index) => [arrow(objective), format(model.objectives[index])]),
        ...front.metrics.map((name, index) => [name, format(model.metrics[index])]),
      ]),
      el("p", { class: "path" }, paths.length ? paths.join(", ") : "no checkpoint of this validation"),
    ];
  }

  function frontSection(front) {
    const many = front.objectives.length > 2;
    const weighs = front.preferences.length > 0;
    const state = { choice: 0, wanted: front.preferences.map(() => 1 / front.preferences.length), all: false, x: 0, y: 1 };
    const chosen = () => front.choices[state.choice];
    const candidates = () => front.models.filter((model) =>
      weighs ? isAt(model, chosen()) : front.choices.some((choice) => isAt(model, choice)));

    // The rule of `select`: the preference nearest to the wanted one, of equal ones the first.
    function pick() {
      const models = front.models.filter((model) => isAt(model, chosen()));
      const distance = (model) => Math.hypot(...model.preference.map((value, index) => value - state.wanted[index]));
      return models.reduce((best, model) => (distance(model) < distance(best) ? model : best), models[0]);
    }
    const colour = (model) => (weighs ? blend(model.preference[0]) : "var(--model)");

    function choose(model) {
      if (weighs) state.wanted = [...model.preference];
      else state.choice = Math.max(0, front.choices.findIndex((choice) => isAt(model, choice)));
      update();
    }
    function clickable(node, model) {
      fill(node, {
        tabindex: 0, role: "button", "aria-label": `Pick ${nameOf(front, model)}`,
        "data-subproblem": model.subproblem,
        onclick: () => choose(model),
        onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(model); } },
      }, []);
      return hints(node, () => describe(front, model));
    }

    let markScatter = () => {}, markTracks = () => {};
    const scatter = chart((width) => {
      const height = Math.round(Math.min(460, Math.max(280, width * 0.68)));
      const [first, second] = [front.objectives[state.x], front.objectives[state.y]];
      const picture = frame(width, height, `Validated models: ${first.name} and ${second.name}`);
      const box = { left: 66, right: width - 12, top: 14, bottom: height - 48 };
      const models = candidates(), others = front.models.filter((model) => !models.includes(model));
      const limiting = state.all ? front.models : [...models, ...front.models.filter((model) => model.nondominated)];
      const of = (index) => [...limiting.map((model) => model.objectives[index]), ...(state.all ? front.earlier.map((values) => values[index]) : [])];
      const domains = [padded(of(state.x)), padded(of(state.y))];
      const inside = (values) => [state.x, state.y].every((index, place) => values[index] >= domains[place][0] && values[index] <= domains[place][1]);
      const { x, y } = axes(picture, box, ...domains, better(first), better(second));
      const at = (values) => [x(values[state.x]), y(values[state.y])];
      const dots = front.earlier.filter(inside).map((values) => { const [cx, cy] = at(values); return `M${cx.toFixed(1)} ${cy.toFixed(1)}h0`; });
      picture.append(svg("path", { class: "earlier", d: dots.join("") }));
      if (!many) picture.append(svg("path", { class: "stairs", d: stairs(front, at) }));
      for (const model of others.filter((other) => inside(other.objectives))) {
        const [cx, cy] = at(model.objectives);
        picture.append(hints(svg("circle", { class: model.nondominated ? "other front" : "other", cx, cy, r: model.nondominated ? 3 : 2 }), () => describe(front, model)));
      }
      for (const model of models) {
        const [cx, cy] = at(model.objectives);
        const dot = svg("circle", { class: "model", cx, cy, r: 7, style: { fill: colour(model) } });
        picture.append(clickable(dot, model));
      }
      const halo = svg("circle", { class: "ring-halo", r: 11 }), ring = svg("circle", { class: "ring", r: 11 });
      const text = svg("text", { class: "name", "font-weight": 650 }, "pick");
      picture.append(halo, ring, text);
      markScatter = () => {
        const model = pick();
        if (!model) return;
        const [cx, cy] = at(model.objectives);
        for (const circle of [halo, ring]) { circle.setAttribute("cx", cx); circle.setAttribute("cy", cy); }
        const flip = cx > box.right - 50;
        fill(text, { x: cx + (flip ? -16 : 16), y: cy + (cy < box.top + 24 ? 18 : -10), "text-anchor": flip ? "end" : "start" }, []);
      };
      markScatter();
      return picture;
    });

    const tracks = many && chart((width) => {
      const height = 320, names = front.objectives;
      const picture = frame(width, height, "Validated models over all objectives, the better end of each axis on top");
      const box = { left: 46, right: width - 46, top: 46, bottom: height - 30 };
      const models = candidates();
      const faint = front.models.filter((model) => model.nondominated && !models.includes(model)).slice(-200);
      const x = (index) => box.left + (index / (names.length - 1)) * (box.right - box.left);
      const scales = names.map((objective, index) => {
        const domain = padded([...models, ...faint].map((model) => model.objectives[index]), 0.02);
        const [low, high] = objective.direction === "min" ? [domain[1], domain[0]] : domain;
        picture.append(svg("line", { class: "axis", x1: x(index), x2: x(index), y1: box.top, y2: box.bottom }));
        const [place, anchor] = index === 0 ? [4, "start"] : index === names.length - 1 ? [width - 4, "end"] : [x(index), "middle"];
        const room = (box.right - box.left) / (names.length - 1) / 7;
        picture.append(svg("text", { class: "name", x: place, y: box.top - 24, "text-anchor": anchor }, cut(arrow(objective), room), svg("title", {}, better(objective))));
        picture.append(svg("text", { x: x(index), y: box.top - 8, "text-anchor": "middle" }, format(high, 3)));
        picture.append(svg("text", { x: x(index), y: box.bottom + 18, "text-anchor": "middle" }, format(low, 3)));
        return scale([low, high], box.bottom, box.top);
      });
      const path = (model) => model.objectives.map((value, index) => `${index ? "L" : "M"}${x(index).toFixed(1)} ${scales[index](value).toFixed(1)}`).join("");
      for (const model of faint) picture.append(svg("path", { class: "track faint", d: path(model) }));
      const lines = models.map((model) => [model, svg("path", { class: "track", d: path(model), style: { stroke: colour(model) } })]);
      picture.append(...lines.map(([, line]) => line));
      for (const model of models) picture.append(clickable(svg("path", { class: "hit", d: path(model) }), model));
      markTracks = () => {
        const picked = pick();
        for (const [model, line] of lines) {
          const is = Boolean(picked) && isSame(model, picked);
          line.classList.toggle("picked", is);
          line.style.opacity = is ? 1 : 0.55;
        }
      };
      markTracks();
      return picture;
    });

    const card = el("div", { class: "pick", "aria-live": "polite" });
    const code = codeBlock("");
    const sliders = weighs ? preferenceSliders(front, state, () => update()) : null;

    function update() {
      const model = pick();
      sliders?.show();
      if (select) select.value = String(state.choice);
      markScatter();
      markTracks();
      if (!model) return;
      const choice = chosen();
      card.replaceChildren(...[
        el("h3", {}, nameOf(front, model)),
        table([
          ...front.preferences.map((name, index) => [`preference ${name}`, format(model.preference[index])]),
          ...front.objectives.map((objective, index) => [arrow(objective), format(model.objectives[index], 5)]),
          ...front.metrics.map((name, index) => [name, format(model.metrics[index], 5)]),
        ]),
        el("p", { class: "path" }, choice.path ?? "no checkpoint"),
        choice.volume === null ? null : el("p", { class: "soft" }, `Hypervolume of this validation: ${format(choice.volume)}`),
      ].filter(Boolean));
      card.dataset.subproblem = model.subproblem;
      const checkpoint = run.checkpoints.find((one) => one.path === choice.path);
      code.set(checkpoint ? checkpoint.code + model.code : "");
      code.host.hidden = !checkpoint;
    }
    const redraw = () => { scatter.redraw(); if (tracks) tracks.redraw(); update(); };

    const label = (choice) => `${choice.path ?? "latest validation"} (epoch ${choice.epoch})`;
    const select = front.choices.length > 1
      ? selectField("Checkpoint", front.choices.map(label), (index) => { state.choice = index; redraw(); }) : null;
    const panel = el("div", {},
      select ? select.parentNode : el("p", { class: "soft" }, label(chosen())),
      sliders ? sliders.host : null,
      card,
      chosen()?.path ? null : el("p", { class: "soft" }, "No checkpoint of a validation was found in the folder of the run, so there is no line that loads the pick: ModelCheckpoint writes them."),
    );
    const pair = many ? el("div", { class: "split" },
      ...["x", "y"].map((axis) => { const field = selectField(`Objective on the ${axis} axis`, front.objectives.map((one) => one.name), (index) => { state[axis] = index; scatter.redraw(); }); field.value = String(state[axis]); return field.parentNode; })) : null;
    const shows = el("label", { class: "check" }, el("input", { type: "checkbox", onchange: (event) => { state.all = event.target.checked; scatter.redraw(); } }), "make room for all validations");
    const legend = el("div", { class: "legend" },
      weighs
        ? el("span", {}, el("span", { class: "gradient", style: { background: `linear-gradient(90deg, ${[0, 0.5, 1].map(blend).join(", ")})` } }), `preference for ${front.preferences[0]}, 0 to 1`)
        : el("span", {}, el("span", { class: "swatch", style: { background: "var(--model)" } }), "with a checkpoint"),
      el("span", {}, el("span", { class: "swatch", style: { background: "var(--front)", width: ".5rem", height: ".5rem" } }), "non-dominated so far"),
      el("span", {}, el("span", { class: "swatch", style: { background: "var(--earlier)", width: ".5rem", height: ".5rem" } }), "other validations"),
    );
    const nondominated = front.models.filter((model) => model.nondominated).length;
    const intro = weighs
      ? "Say how much each task counts: the model whose preference is nearest is the pick. Points can be picked as well."
      : "Each point is a validation of the one model that was trained. Those with a checkpoint can be picked.";
    const section = el("section", { id: newId("front"), "data-name": "Pareto front" },
      el("h2", {}, run.fronts.length > 1 ? `Pareto front: ${front.name}` : "Pareto front"),
      el("p", { class: "soft" }, `${intro} ${format(nondominated)} of ${format(front.number)} validated models are non-dominated.`),
      front.choices.length === 0 ? el("p", {}, "No validation is in the table yet.") : el("div", { class: "split" },
        el("div", {}, tracks ? el("h3", {}, "All objectives: on each axis, up is better") : null, tracks ? tracks.host : null,
          many ? el("h3", {}, "Two objectives") : null, pair, scatter.host, legend, shows),
        panel),
      code.host,
    );
    if (front.choices.length) update();
    return section;
  }

  function stairs(front, at) {
    const signs = front.objectives.map((objective) => (objective.direction === "min" ? 1 : -1));
    const points = front.models.filter((model) => model.nondominated).map((model) => model.objectives);
    points.sort((one, other) => signs[0] * (one[0] - other[0]));
    return points.map((point, index) => {
      const [x, y] = at(point).map((value) => value.toFixed(1));
      return index ? `H${x}V${y}` : `M${x} ${y}`;
    }).join("");
  }

  function selectField(name, options, onchange) {
    const id = newId("select");
    const select = el("select", { id, onchange: () => onchange(Number(select.value)) },
      options.map((text, index) => el("option", { value: index }, text)));
    el("div", { class: "field" }, el("label", { for: id }, name), select);
    return select;
  }

  function preferenceSliders(front, state, changed) {
    const names = front.preferences;
    const host = el("div", { class: "field", role: "group", "aria-label": "Preference" });
    const text = () => names.map((name, index) => `${name} ${state.wanted[index].toFixed(2)}`).join(", ");
    // Of two tasks, one weight says all; of more, the others keep their ratio and the sum stays one.
    const set = (index, value) => {
      const rest = state.wanted.reduce((sum, weight, other) => (other === index ? sum : sum + weight), 0);
      state.wanted = state.wanted.map((weight, other) =>
        other === index ? value : rest > 1e-9 ? (weight / rest) * (1 - value) : (1 - value) / (names.length - 1));
      changed();
    };
    const inputs = [];
    const add = (index, head) => {
      const id = newId("preference");
      const input = el("input", { id, type: "range", min: 0, max: 1, step: 0.01, oninput: () => set(index, Number(input.value)) });
      inputs.push([index, input]);
      host.append(el("div", {}, head(id), input));
    };
    const outputs = [];
    const out = (index) => { const output = el("output", {}); outputs.push([index, output]); return output; };
    if (names.length === 2) {
      add(1, (id) => el("div", {}, el("label", { for: id }, "Preference"),
        el("div", { class: "slider-head" }, el("span", {}, `${names[0]} `, out(0)), el("span", {}, `${names[1]} `, out(1)))));
    } else {
      host.append(el("div", { class: "label" }, "Preference"));
      names.forEach((name, index) => add(index, (id) => el("div", { class: "slider-head" }, el("label", { for: id }, name), out(index))));
    }
    const show = () => {
      for (const [index, input] of inputs) {
        input.value = state.wanted[index];
        input.setAttribute("aria-valuetext", text());
      }
      for (const [index, output] of outputs) output.textContent = state.wanted[index].toFixed(2);
    };
    return { host, show };
  }

  // --------------------------------------------------------------------------------------------------------- lines

  function lineChart({ series, x: xName, y: yName, label, height: wanted = 300 }) {
    const kept = series.filter((one) => one.points.length);
    const readout = el("p", { class: "readout", "aria-live": "polite" });
    const steps = [...new Set(kept.flatMap((one) => one.points.map(([x]) => x)))].sort((a, b) => a - b);
    let place = steps.length - 1, cursor = null, x = null;
    const dash = (index) => kept[index].dash ?? (index >= SERIES ? "6 3" : null);
    const colourOf = (index) => kept[index].colour ?? `var(--series-${index % SERIES})`;
    const show = () => {
      const step = steps[place];
      const values = kept.map((one) => [one.name, one.points.find(([at]) => at === step)]).filter(([, point]) => point);
      readout.textContent = `${xName} ${format(step)}: ` + values.map(([name, point]) => `${name} ${format(point[1])}`).join(", ");
      fill(cursor, { x1: x(step), x2: x(step) }, []);
    };
    const { host } = chart((width) => {
      const height = Math.min(wanted, Math.max(220, width * 0.55));
      const picture = frame(width, height, `${label}. Arrow keys move along it.`);
      const box = { left: 66, right: width - 12, top: 12, bottom: height - 48 };
      const xs = steps.length > 1 ? [steps[0], steps[steps.length - 1]] : padded(steps);
      const scales = axes(picture, box, xs, padded(kept.flatMap((one) => one.points.map(([, y]) => y))), xName, yName, true);
      x = scales.x;
      cursor = svg("line", { class: "cursor", y1: box.top, y2: box.bottom });
      picture.append(cursor);
      kept.forEach((one, index) => {
        const d = one.points.map(([at, value], order) => `${order ? "L" : "M"}${x(at).toFixed(1)} ${scales.y(value).toFixed(1)}`).join("");
        picture.append(svg("path", { class: "line", d, "stroke-dasharray": dash(index), style: { stroke: colourOf(index) } }));
        if (one.points.length <= 40) {
          for (const [at, value] of one.points) picture.append(svg("circle", { cx: x(at), cy: scales.y(value), r: 3, style: { fill: colourOf(index) } }));
        }
      });
      const nearest = (event) => {
        const at = ((event.clientX - picture.getBoundingClientRect().left) / picture.getBoundingClientRect().width) * width;
        place = steps.reduce((best, step, index) => (Math.abs(x(step) - at) < Math.abs(x(steps[best]) - at) ? index : best), 0);
        show();
      };
      fill(picture, {
        tabindex: 0, onpointermove: nearest, onpointerdown: nearest,
        onkeydown: (event) => {
          const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
          if (!move) return;
          event.preventDefault();
          place = Math.max(0, Math.min(steps.length - 1, place + move));
          show();
        },
      }, []);
      show();
      return picture;
    });
    const legend = kept.length > 1 ? el("div", { class: "legend" }, kept.map((one, index) =>
      el("span", {}, el("span", { class: dash(index) ? "swatch bar dashed" : "swatch bar", style: { borderColor: colourOf(index) } }), one.name))) : null;
    return el("div", {}, legend, host, readout);
  }

  function curveSection(curve) {
    const columns = ["points of the validation", "all points so far"];
    const point = curve.reference.map((one) => `${one.name} ${format(one.value)}`).join(", ");
    const last = curve.rows[curve.rows.length - 1];
    return el("section", { id: newId("hypervolume"), "data-name": "Hypervolume" },
      el("h2", {}, curve.name === "hypervolume" ? "Hypervolume" : `Hypervolume: ${curve.name}`),
      el("p", { class: "soft" }, "The volume of objective space that the models dominate, up to the reference point; larger is better. ",
        point ? `Reference point: ${point}.` : "The reference point is not known: HypervolumeCallback writes it beside the table.",
        last ? ` At the end: ${format(last[2])}, over all validations ${format(last[3])}.` : ""),
      lineChart({
        series: columns.map((name, index) => ({ name, dash: index ? "7 5" : null, colour: `var(--${["model", "front"][index]})`, points: curve.rows.filter((row) => row[2 + index] !== null).map((row) => [row[1], row[2 + index]]) })),
        x: "step", y: curve.name, label: `${curve.name} over the steps`,
      }));
  }

  // ----------------------------------------------------------------------------------------------------- heat maps

  function heatTable(tasks, { caption, corner, onpick }) {
    const cells = tasks.map((from) => tasks.map((to) => onpick
      ? el("button", { type: "button", tabindex: -1, "aria-pressed": "false" }) : el("span", {})));
    const numbers = tasks.length <= 9;
    if (onpick) {
      cells.forEach((row, r) => row.forEach((cell, c) => fill(cell, {
        onclick: () => onpick(r, c),
        onkeydown: (event) => {
          const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
          const next = move && cells[r + move[0]]?.[c + move[1]];
          if (!next) return;
          event.preventDefault();
          onpick(r + move[0], c + move[1]);
          next.focus();
        },
      }, [])));
    }
    const host = el("div", { class: "scroll" }, el("table", { class: numbers ? "heat numbers" : "heat", "aria-label": caption },
      el("thead", {}, el("tr", {}, el("th", {}, corner), tasks.map((name) => el("th", { scope: "col" }, ...broken(name))))),
      el("tbody", {}, tasks.map((name, r) => el("tr", {}, el("th", { scope: "row" }, name), cells[r].map((cell) => el("td", {}, cell)))))));
    const show = (matrix, limit, digits) => cells.forEach((row, r) => row.forEach((cell, c) => {
      const value = matrix[r][c];
      const strength = limit ? Math.min(1, Math.abs(value) / limit) * STRENGTH : 0;
      cell.style.background = value === null ? "var(--grid)" : `rgb(var(${value > 0 ? "--helps" : "--hurts"}) / ${strength.toFixed(3)})`;
      if (numbers) cell.textContent = format(value, digits);
      cell.title = `${tasks[r]} → ${tasks[c]}: ${format(value)}`;
      if (onpick) cell.setAttribute("aria-label", `${tasks[r]} to ${tasks[c]}: ${format(value)}`);
    }));
    return { host, cells, show };
  }

  function affinitySection(affinity) {
    const { tasks, rows } = affinity;
    const state = { time: rows.length - 1, pair: tasks.length > 1 ? [0, 1] : [0, 0] };
    // One scale for all times. Single large values would bleach the rest, as would the diagonal.
    const sizes = rows.flatMap((row) => row.matrix.flatMap((values, r) => values.filter((value, c) => r !== c && value !== null).map(Math.abs))).sort((a, b) => a - b);
    const limit = sizes[Math.floor(0.98 * (sizes.length - 1))] || 0;
    const heat = heatTable(tasks, { caption: "Affinity from row to column", corner: "from ↓ to →", onpick: (r, c) => { state.pair = [r, c]; showPair(); } });
    const id = newId("time"), when = el("output", { for: id });
    const slider = el("input", { id, type: "range", min: 0, max: Math.max(0, rows.length - 1), step: 1, value: state.time, oninput: () => { state.time = Number(slider.value); showTime(); } });
    const pairHost = el("div", {});
    function showTime() {
      const row = rows[state.time], text = `epoch ${row.epoch}, after ${format(row.batch)} batches`;
      when.textContent = text;
      slider.setAttribute("aria-valuetext", text);
      heat.show(row.matrix, limit, 2);
    }
    function showPair() {
      const [r, c] = state.pair;
      heat.cells.forEach((row, i) => row.forEach((cell, j) => {
        const is = i === r && j === c;
        cell.setAttribute("aria-pressed", String(is));
        cell.tabIndex = is ? 0 : -1;
      }));
      pairHost.replaceChildren(
        el("h3", {}, `From ${tasks[r]} to ${tasks[c]}, over the run`),
        lineChart({
          series: [{ name: "affinity", points: rows.filter((row) => row.matrix[r][c] !== null).map((row) => [row.batch, row.matrix[r][c]]) }],
          x: "batch", y: "affinity", label: `Affinity from ${tasks[r]} to ${tasks[c]}`, height: 240,
        }));
    }
    showTime();
    showPair();
    return el("section", { id: newId("affinity"), "data-name": "Affinity" },
      el("h2", {}, affinity.name === "affinity" ? "Affinity" : `Affinity: ${affinity.name}`),
      el("p", { class: "soft" }, "What a step for the task of the row does to the loss of the task of the column, as a share of that loss. Positive (blue) helps, negative (orange) hurts. A cell shows its course over the run below.",
        affinity.number > rows.length ? ` Shown are ${rows.length} of ${format(affinity.number)} measurements.` : ""),
      el("div", { class: "field" }, el("div", { class: "slider-head" }, el("label", { for: id }, "Time"), when), slider),
      heat.host,
      el("div", { class: "legend" },
        el("span", {}, `−${format(limit, 2)}`, el("span", { class: "gradient", style: { background: `linear-gradient(90deg, rgb(var(--hurts) / ${STRENGTH}), var(--card), rgb(var(--helps) / ${STRENGTH}))` } }), `${format(limit, 2)}; larger ones, such as those of a task with itself, in the same colour`)),
      pairHost);
  }

  // -------------------------------------------------------------------------------------------------------- groups

  function groupSection(timeline) {
    const { tasks, stretches } = timeline;
    const end = stretches[stretches.length - 1][1] + 1;
    const sizeOf = (labels, label) => labels.filter((one) => one === label).length;
    const colourOf = (labels, task) => (sizeOf(labels, labels[task]) < 2 ? "var(--alone)" : GROUPS[labels[task] % GROUPS.length]);
    const find = (batch) => {
      let low = 0, high = stretches.length - 1;
      while (low < high) {
        const middle = (low + high + 1) >> 1;
        if (stretches[middle][0] <= batch) low = middle; else high = middle - 1;
      }
      return stretches[low];
    };
    const id = newId("batch"), when = el("output", { for: id }), list = el("ul", { class: "groups", "aria-live": "polite" });
    let cursor = null, x = null;
    const slider = el("input", { id, type: "range", min: 0, max: end - 1, step: 1, value: end - 1, oninput: () => show() });
    function show() {
      const batch = Number(slider.value), [first, last, labels] = find(batch);
      const text = `batch ${format(batch)}; these groups from ${format(first)} to ${format(last)}`;
      when.textContent = text;
      slider.setAttribute("aria-valuetext", text);
      const present = [...new Set(labels.filter((label) => label >= 0))];
      list.replaceChildren(...present.map((label) => {
        const members = tasks.filter((_, task) => labels[task] === label);
        return el("li", {}, el("span", { class: "swatch block", style: { background: colourOf(labels, labels.indexOf(label)) } }), members.join(", "));
      }));
      if (cursor) fill(cursor, { x1: x(batch + 0.5), x2: x(batch + 0.5) }, []);
    }
    const { host } = chart((width) => {
      const row = tasks.length > 24 ? 16 : 24;
      const longest = Math.max(...tasks.map((name) => name.length));
      const left = Math.min(longest * 7 + 14, width * 0.36);
      const box = { left, right: width - 12, top: 6, bottom: 6 + row * tasks.length };
      const picture = frame(width, box.bottom + 46, "Groups over the batches: tasks of one colour are updated together, grey ones alone");
      x = scale([0, end], box.left, box.right);
      // As many columns as there are pixels, and one path for each colour.
      const columns = Math.min(end, Math.ceil(box.right - box.left)), paths = new Map();
      tasks.forEach((name, task) => {
        const y = box.top + task * row;
        picture.append(svg("text", { class: "name", x: box.left - 8, y: y + row / 2 + 4, "text-anchor": "end" }, cut(name, (left - 14) / 6.6), svg("title", {}, name)));
        let start = 0, colour = null;
        for (let column = 0; column <= columns; column++) {
          const labels = column < columns ? find(Math.floor((column / columns) * end))[2] : null;
          const next = labels && labels[task] >= 0 ? colourOf(labels, task) : null;
          if (next === colour && column < columns) continue;
          if (colour) paths.set(colour, `${paths.get(colour) ?? ""}M${x((start / columns) * end).toFixed(2)} ${y + 1}H${x((column / columns) * end).toFixed(2)}V${y + row - 1}H${x((start / columns) * end).toFixed(2)}Z`);
          start = column;
          colour = next;
        }
      });
      for (const [colour, d] of paths) picture.append(svg("path", { d, style: { fill: colour } }));
      for (const value of ticks(0, end, (box.right - box.left) / 90).filter(Number.isInteger)) {
        picture.append(svg("text", { x: x(value), y: box.bottom + 18, "text-anchor": "middle" }, format(value)));
      }
      picture.append(svg("text", { class: "name", x: (box.left + box.right) / 2, y: box.bottom + 38, "text-anchor": "middle" }, "batch"));
      cursor = svg("line", { class: "cursor", y1: box.top, y2: box.bottom, style: { stroke: "var(--ink)" } });
      picture.append(cursor);
      const move = (event) => {
        const spot = picture.getBoundingClientRect();
        const at = ((event.clientX - spot.left) / spot.width) * width;
        slider.value = Math.max(0, Math.min(end - 1, Math.floor(((at - box.left) / (box.right - box.left)) * end)));
        show();
      };
      fill(picture, { onpointermove: move, onpointerdown: move }, []);
      show();
      return picture;
    });
    let together = null;
    if (timeline.together.length) {
      together = heatTable(tasks, { caption: "Share of batches in which two tasks were in one group", corner: "" });
      together.show(timeline.together, 1, 2);
    }
    show();
    return el("section", { id: newId("groups"), "data-name": "Task groups" },
      el("h2", {}, "Task groups"),
      el("p", { class: "soft" }, "In each batch, tasks of one colour are updated together, grey ones alone."),
      host,
      el("div", { class: "field" }, el("div", { class: "slider-head" }, el("label", { for: id }, "Batch"), when), slider),
      list,
      together ? el("h3", {}, "Share of batches in which two tasks were in one group") : null,
      together ? together.host : null);
  }

  // --------------------------------------------------------------------------------------------------- cost and co

  const COSTS = {
    forwards: "forward passes", backwards: "backward passes", optimizer_steps: "optimiser steps", batches: "batches",
    samples: "samples", seconds: "seconds in training batches", peak_memory_mib: "peak memory (MiB)",
  };

  function costSection(costs) {
    const last = costs[costs.length - 1];
    const perBatch = (name) => (name === "batches" || name === "peak_memory_mib" ? "" : format(last[name] / last.batches));
    const head = (names) => el("thead", {}, el("tr", {}, names.map((name) => el("th", { scope: "col" }, name))));
    const row = (name, cells) => el("tr", {}, el("th", { scope: "row" }, name), cells.map((cell) => el("td", {}, cell)));
    return el("section", { id: newId("cost"), "data-name": "Cost" },
      el("h2", {}, "Cost"),
      el("p", { class: "soft" }, `Of one process, up to the end of epoch ${format(last.epoch)}; seconds and memory are the largest of all processes. Validation, data loading and measurements do not count.`),
      el("div", { class: "scroll" }, el("table", {}, head(["", "total", "per batch"]),
        el("tbody", {}, Object.entries(COSTS).map(([key, name]) => row(name, [last[key] === null ? "not known" : format(last[key], 6), last[key] === null ? "" : perBatch(key)]))))),
      costs.length > 1 ? el("details", {}, el("summary", {}, "Since the start, after each epoch"), el("div", { class: "scroll" }, el("table", {},
        head(["epoch", ...Object.values(COSTS)]),
        el("tbody", {}, costs.map((one) => row(format(one.epoch), Object.keys(COSTS).map((key) => format(one[key], 6)))))))) : null);
  }

  function metricSection(metrics) {
    const shown = (name) => !/^(affinity|groups|cost|hypervolume|gradient_cosine)(\/|$)|_seconds$/.test(name);
    const groups = new Map();
    for (const name of Object.keys(metrics).filter(shown)) {
      const [stem] = name.split("/", 1);
      groups.set(stem, [...(groups.get(stem) ?? []), name]);
    }
    if (groups.size === 0) return null;
    const rank = (name) => ["val_loss", "val", "test", "train"].findIndex((start) => name.startsWith(start)) >>> 0;
    const names = [...groups.keys()].sort((one, other) => rank(one) - rank(other) || (one < other ? -1 : 1));
    const host = el("div", {});
    const show = (index) => {
      const stem = names[index];
      host.replaceChildren(lineChart({
        series: groups.get(stem).map((name) => ({ name: name === stem ? (groups.get(stem).length > 1 ? "all tasks" : stem) : name.slice(stem.length + 1), points: metrics[name] })),
        x: "step", y: stem, label: `${stem} over the steps`,
      }));
    };
    const select = selectField("Metric", names, show);
    show(0);
    return el("section", { id: newId("metrics"), "data-name": "Metrics" },
      el("h2", {}, "Metrics"),
      el("p", { class: "soft" }, `As the module logged them${run.fronts.some((front) => front.preferences.length) ? ", means over the models of the population" : ""}. Steps are counted from 1, as in the names of checkpoints; metrics.csv counts them from 0, and batches where a module accumulates their gradients.`),
      select.parentNode, host);
  }

  function checkpointSection(checkpoints) {
    return el("section", { id: newId("checkpoints"), "data-name": "Checkpoints" },
      el("h2", {}, "Checkpoints"),
      checkpoints.map((one) => el("div", {},
        el("h3", {}, one.path),
        one.problem ? el("p", {}, one.problem) : el("p", { class: "soft" }, `Epoch ${format(one.epoch)}, after ${format(one.step)} steps.`),
        one.code ? codeBlock(one.code).host : null)));
  }

  // ---------------------------------------------------------------------------------------------------------- page

  const sections = [
    ...run.fronts.map(frontSection),
    ...run.curves.filter((curve) => curve.rows.length).map(curveSection),
    ...run.affinities.filter((affinity) => affinity.rows.length).map(affinitySection),
    run.timeline && run.timeline.stretches.length ? groupSection(run.timeline) : null,
    run.costs.length ? costSection(run.costs) : null,
    Object.keys(run.metrics).length ? metricSection(run.metrics) : null,
    run.checkpoints.length ? checkpointSection(run.checkpoints) : null,
    run.missing.length ? el("section", { id: newId("missing"), "data-name": "Not in this run" },
      el("h2", {}, "Not in this run"), el("ul", { class: "missing" }, run.missing.map((text) => el("li", {}, text)))) : null,
  ].filter(Boolean);
  const facts = Object.entries(run.facts);
  document.getElementById("page").append(
    el("header", {},
      el("h1", {}, run.title),
      el("p", { class: "path" }, run.folder),
      facts.length ? el("dl", { class: "facts" }, facts.map(([name, text]) => el("div", {}, el("dt", {}, name), el("dd", { title: text }, ...broken(text.split(".").slice(-1)[0]))))) : null,
      el("nav", { "aria-label": "Sections" }, sections.map((section) => el("a", { href: `#${section.id}` }, section.querySelector("h2").textContent)))),
    ...sections,
    el("footer", {}, `Written by mtl_lightning ${run.release}.`));
})();
