"use strict";
// What the charts of all reports have in common. The numbers are in the page; everything else is drawing.
const charts = {
  data: (id) => JSON.parse(document.getElementById(id).textContent),
  axis: (title, more) => ({ title: { text: title, standoff: 10 }, gridcolor: "#e6e9ef", zeroline: false, ...more }),
  // Numbers written out, few enough to stand apart: by default plotly leaves only the first digit of most of them.
  logarithmic: (low, high) => ({ type: "log", tickformat: "~g", nticks: high > 10 * low && high < 1000 * low ? 4 : 0 }),
  draw(target, traces, layout) {
    const look = {
      margin: { l: 64, r: 36, t: 16, b: 56 },
      modebar: { orientation: "v" }, // beside the lines, and not over the legend
      font: { family: "system-ui, sans-serif", size: 13, color: "#1d2433" },
      hovermode: "closest",
      showlegend: true,
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1.01, yanchor: "bottom" }, // where it hides no line
    };
    // The button that sends the numbers to plotly's servers stays away: what is in the page stays in the page.
    const config = {
      responsive: true,
      displaylogo: false,
      showSendToCloud: false,
      plotlyServerURL: "",
      modeBarButtonsToRemove: ["select2d", "lasso2d"], // select points for a program that is not there
    };
    Plotly.react(target, traces, { ...look, ...layout }, config);
  },
};
