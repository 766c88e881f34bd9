// Precision, objects found and operating points for the thresholds that the page has; the rules are
// those of ThresholdCurve.operating_point in msrcnn_d2/evaluation/operating_points.py.
"use strict";
(() => {
  const COLORS = { "0.50": "#0072B2", "0.75": "#D55E00", "0.90": "#000000" }; // Okabe and Ito's
  const OTHER_COLOR = "#CC79A7";
  const data = JSON.parse(document.getElementById("threshold-data").textContent);
  const panel = document.getElementById("try-thresholds");
  const [plot] = panel.getElementsByTagName("svg");
  const find = (selector) => panel.querySelector(selector);
  const input = (name) => find(`[name=${name}]`);
  const slider = input("threshold");
  let wanted = data.precision; // what is typed, if it is a precision

  const percent = (x) => (Number.isFinite(x) ? `${(100 * x).toFixed(1)} %` : "–");
  const interval = (curve, k) =>
    curve.low[k] === null ? "–" : `${percent(curve.low[k] / 1000)} to ${percent(curve.high[k] / 1000)}`;
  const precision = (curve, k) => curve.right[k] / curve.count[k];
  const score = () => data.scores[input("score").value];
  const minCount = () => Math.max(20, Math.ceil(1 / (1 - wanted) - 1e-6));
  const nameOf = (k) => String(+score().thresholds[k].toFixed(4));

  function operatingPoint(curve) {
    const last = curve.count.length - 1;
    let [accept, drop, best] = [null, null, null];
    for (let k = last; k >= 0; k--) {
      if (curve.count[k] < minCount()) continue;
      if (precision(curve, k) >= wanted) accept = k;
      if (best === null || precision(curve, k) >= precision(curve, best)) best = k;
    }
    for (let k = 0; k <= last; k++) {
      const below = curve.count[0] - curve.count[k];
      const wrong = below - (curve.right[0] - curve.right[k]);
      if (below >= minCount() && wrong / below >= wanted) drop = k;
    }
    if (accept !== null && drop !== null) drop = Math.min(accept, drop);
    if (drop !== null && curve.count[drop] === curve.count[0]) drop = null; // nothing is below it
    return { accept, drop, best };
  }

  function fill(row, texts) {
    texts.forEach((text, k) => (row.cells[k + 1].textContent = text));
  }

  function showAnswer() {
    const typed = input("precision").value / 100;
    if (typed > 0 && typed < 1) wanted = typed;
    const iou = input("iou").value;
    const curve = score().curves[iou];
    const { accept, drop, best } = operatingPoint(curve);
    const from = accept === null ? [0, 0] : [curve.count[accept], curve.right[accept]];
    const to = drop === null ? [0, 0] : [curve.count[0] - curve.count[drop], curve.right[0] - curve.right[drop]];
    const between = [curve.count[0] - from[0] - to[0], curve.right[0] - from[1] - to[1]];
    const rows = find(".groups").tBodies[0].rows;
    const numbers = ([count, right]) => [
      count.toLocaleString("en"),
      percent(right / count),
      percent(right / data.objects),
    ];
    fill(rows[0], [accept === null ? "never" : `≥ ${nameOf(accept)}`, ...numbers(from)]);
    fill(rows[1], ["between", ...numbers(between)]);
    fill(rows[2], [drop === null ? "never" : `< ${nameOf(drop)}`, ...numbers(to)]);
    const ask = `${+(100 * wanted).toPrecision(10)} % at IoU ${iou}`;
    find(".answer").textContent =
      accept !== null
        ? `For ${ask}, accept from ${nameOf(accept)} on: ${percent(precision(curve, accept))} are right ` +
          `(95 % interval ${interval(curve, accept)}).`
        : best !== null
          ? `No threshold reaches ${ask}. The highest is ${percent(precision(curve, best))}, from ${nameOf(best)} on.`
          : `There are fewer than ${minCount().toLocaleString("en")} detections, too few to tell.`;
    slider.max = curve.count.length - 1;
    slider.value = accept ?? best ?? 0;
    showThreshold();
  }

  function shownIous() {
    return [...new Set([...data.shown, input("iou").value])].sort();
  }

  function showThreshold() {
    const k = +slider.value;
    slider.setAttribute("aria-valuetext", nameOf(k));
    const count = score().curves[input("iou").value].count[k].toLocaleString("en");
    find("output").textContent = `${nameOf(k)}: ${count} detections`;
    const body = find(".readout").tBodies[0];
    body.replaceChildren();
    for (const iou of shownIous()) {
      const curve = score().curves[iou];
      const row = body.insertRow();
      const head = document.createElement("th");
      head.scope = "row";
      head.textContent = `IoU ${iou}`;
      head.style.borderLeft = `.7em solid ${COLORS[iou] || OTHER_COLOR}`;
      row.append(head);
      for (let c = 0; c < 3; c++) row.insertCell();
      fill(row, [percent(precision(curve, k)), interval(curve, k), percent(curve.right[k] / data.objects)]);
    }
    draw();
  }

  function draw() {
    const { thresholds, curves } = score();
    const { accept, drop } = operatingPoint(curves[input("iou").value]);
    const width = Math.max(plot.parentElement.clientWidth, 200);
    const height = Math.min(360, 0.8 * width);
    const [left, right, top, bottom] = [44, 12, 22, 40];
    const [first, last] = [thresholds[0], thresholds[thresholds.length - 1]];
    const x = (t) => left + ((t - first) / (last - first || 1)) * (width - left - right);
    const y = (share) => top + (1 - share) * (height - top - bottom);
    plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
    plot.style.height = `${height}px`;
    plot.replaceChildren();

    function add(name, attributes, text) {
      const element = document.createElementNS(plot.namespaceURI, name);
      for (const key in attributes) element.setAttribute(key, attributes[key]);
      if (text !== undefined) element.textContent = text;
      plot.append(element);
    }
    function line(values, attributes) {
      let [d, pen] = ["", "M"];
      values.forEach((value, k) => {
        if (Number.isFinite(value)) d += `${pen}${x(thresholds[k]).toFixed(1)} ${y(value).toFixed(1)}`;
        pen = Number.isFinite(value) ? "L" : "M";
      });
      add("path", { d, fill: "none", "stroke-width": 2, ...attributes });
    }
    function zone(name, from, to, color) {
      if (to <= from) return;
      add("rect", { x: from, y: top, width: to - from, height: y(0) - top, fill: color });
      if (to - from > 52) add("text", { x: (from + to) / 2, y: 15, "text-anchor": "middle" }, name);
    }

    const low = drop === null ? left : x(thresholds[drop]);
    const high = accept === null ? x(last) : x(thresholds[accept]);
    zone("drop", left, low, "#eee");
    zone("look at", low, high, "#fff");
    zone("accept", high, accept === null ? high : x(last), "#e3f0fa");
    for (const share of [0, 0.25, 0.5, 0.75, 1]) {
      add("path", { d: `M${left} ${y(share)}H${x(last)}`, stroke: "#ccc" });
      add("text", { x: left - 6, y: y(share) + 4, "text-anchor": "end" }, `${100 * share} %`);
      const t = first + share * (last - first);
      add("text", { x: x(t), y: y(0) + 17, "text-anchor": share === 1 ? "end" : "middle" }, `${+t.toFixed(2)}`);
    }
    add("text", { x: (left + x(last)) / 2, y: height - 6, "text-anchor": "middle" }, score().title);
    add("path", { d: `M${left} ${y(wanted)}H${x(last)}`, stroke: "#555", "stroke-dasharray": "2 3" });

    const k = +slider.value;
    for (const iou of shownIous()) {
      const curve = curves[iou];
      const stroke = COLORS[iou] || OTHER_COLOR;
      if (iou === input("iou").value) {
        const ends = thresholds.map((t, i) => [t, curve.low[i], curve.high[i]]).filter((e) => e[1] !== null);
        const points = [...ends.map((e) => [e[0], e[1]]), ...ends.reverse().map((e) => [e[0], e[2]])];
        const corners = points.map(([t, end]) => `${x(t).toFixed(1)},${y(end / 1000).toFixed(1)}`);
        add("polygon", { points: corners.join(" "), fill: stroke, "fill-opacity": 0.15 });
      }
      const shares = [curve.count.map((_, i) => precision(curve, i)), curve.right.map((r) => r / data.objects)];
      line(shares[0], { stroke });
      line(shares[1], { stroke, "stroke-dasharray": "5 4" });
      for (const share of shares) {
        if (Number.isFinite(share[k])) add("circle", { cx: x(thresholds[k]), cy: y(share[k]), r: 4, fill: stroke });
      }
    }
    add("path", { d: `M${x(thresholds[k])} ${top}V${y(0)}`, stroke: "#1c1c1c" });

    plot.onpointerdown = plot.onpointermove = (event) => {
      if (event.type === "pointermove" && !event.buttons) return;
      const box = plot.getBoundingClientRect();
      const t = first + ((event.clientX - box.left - left) / (width - left - right)) * (last - first);
      const away = thresholds.map((threshold) => Math.abs(threshold - t));
      slider.value = away.indexOf(Math.min(...away));
      showThreshold();
    };
  }

  panel.hidden = false;
  for (const name of ["score", "precision", "iou"]) input(name).addEventListener("input", showAnswer);
  slider.addEventListener("input", showThreshold);
  window.addEventListener("resize", draw);
  showAnswer();
})();
