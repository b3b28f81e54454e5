"use strict";
// What the charts of all reports have in common. The numbers are in the page; everything else is drawing.
const charts = {
  data: (id) => JSON.parse(document.getElementById(id).textContent),
  axis: (title, more) => ({ title: { text: title }, gridcolor: "#e6e9ef", zeroline: false, ...more }),
  draw(target, traces, layout) {
    const look = {
      margin: { l: 64, r: 16, t: 16, b: 60 },
      font: { family: "system-ui, sans-serif", size: 13, color: "#1d2433" },
      hovermode: "closest",
    };
    Plotly.react(target, traces, { ...look, ...layout }, { responsive: true, displaylogo: false });
  },
};
