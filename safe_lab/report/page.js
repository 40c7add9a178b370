"use strict";
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Colours of the page, which follow the reader's theme, and paper when it is printed.
const themed = (layout) => {
  const axis = { gridcolor: style("--line"), zerolinecolor: style("--line"), linecolor: style("--line"), automargin: true };
  const axes = {};
  for (const key of Object.keys(layout).concat(["xaxis", "yaxis"])) {
    if (/^[xy]axis\d*$/.test(key)) axes[key] = Object.assign({}, layout[key], axis);
  }
  return Object.assign({}, layout, axes, {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: style("--ink"), size: 13 },
    margin: { l: 60, r: 20, t: 20, b: 50 },
    legend: Object.assign({ orientation: "h", y: -0.2 }, layout.legend),
  });
};

const drawn = new Map();
const draw = (place) => {
  if (drawn.has(place)) return;
  const figure = JSON.parse(document.getElementById(place.dataset.figure).textContent);
  drawn.set(place, figure.layout);
  Plotly.newPlot(place, figure.data, themed(figure.layout), { responsive: true, displaylogo: false });
};
const drawIn = (part) => part.querySelectorAll(".chart").forEach(draw);
const paint = () => drawn.forEach((layout, place) => Plotly.relayout(place, themed(layout)));

document.querySelectorAll(".chart").forEach((place) => {
  if (!place.closest("details:not([open])")) draw(place);
});
document.querySelectorAll("details").forEach((part) =>
  part.addEventListener("toggle", () => {
    if (part.open) drawIn(part);
  })
);
for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", paint);
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; drawIn(part); }));

document.querySelectorAll("table.sortable th button").forEach((button) =>
  button.addEventListener("click", () => {
    const heading = button.closest("th");
    const body = heading.closest("table").tBodies[0];
    const up = heading.getAttribute("aria-sort") !== "ascending";
    const value = (row) => row.cells[heading.cellIndex].dataset.value;
    const rows = [...body.rows].sort((one, other) => {
      const [a, b] = [value(one), value(other)];
      // What has no figure stands last, whichever way is sorted.
      if (a === "" || b === "") return (a === "") - (b === "");
      const [x, y] = [Number(a), Number(b)];
      const order = Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
      return up ? order : -order;
    });
    heading.parentElement.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...rows);
  })
);
