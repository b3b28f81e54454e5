"use strict";
(() => {
  const data = charts.data("curves");
  const metric = document.getElementById("metric");
  const progress = document.getElementById("progress");
  const logarithmic = document.getElementById("logarithmic");
  const labels = { step: "steps", epoch: "epochs", seconds: "seconds of training" };

  for (const name of data.metrics) {
    metric.add(new Option(data.labels[name], name, name === data.metric, name === data.metric));
  }

  // The first evaluations often dwarf all others; a double click on a chart shows them too.
  function vertical() {
    const later = data.runs.flatMap((run) => run.columns[metric.value].slice(Math.floor(0.03 * run.columns.step.length)));
    const title = data.labels[metric.value];
    if (!later.length) return charts.axis(title);
    const low = later.reduce((a, b) => Math.min(a, b));
    const high = later.reduce((a, b) => Math.max(a, b));
    if (logarithmic.checked && low > 0) {
      const ends = [Math.log10(low) - 0.03 * Math.log10(high / low), Math.log10(high * 1.02)];
      return charts.axis(title, { ...charts.logarithmic(low, high), range: ends });
    }
    const space = 0.05 * (high - low) || 0.05 * Math.abs(high) || 1;
    return charts.axis(title, { range: [low - space, high + space] });
  }

  function draw(target, x) {
    const seen = new Set();
    const traces = data.runs.map((run) => {
      const first = !seen.has(run.optimizer);
      seen.add(run.optimizer);
      const last = run.columns.step.length - 1;
      return {
        x: run.columns[x],
        y: run.columns[metric.value],
        customdata: run.columns.step.map((step, i) => [step, run.columns.epoch[i], run.columns.seconds[i]]),
        name: run.optimizer,
        legendgroup: run.optimizer,
        showlegend: first,
        mode: run.diverged || last === 0 ? "lines+markers" : "lines", // a single point makes no line
        marker: { symbol: run.diverged ? "x" : "circle", size: run.columns.step.map((_, i) => (i === last ? 8 : 0)) },
        line: { color: run.colour, dash: run.dash, width: data.seeds > 1 ? 1.3 : 2 },
        opacity: data.seeds > 1 ? 0.75 : 1,
        hovertemplate:
          `<b>${run.optimizer}</b>, seed ${run.seed}<br>%{y:.5g}<br>step %{customdata[0]}, ` +
          `epoch %{customdata[1]:.2f}, %{customdata[2]:.2f} s${run.diverged ? "<br>diverged later" : ""}<extra></extra>`,
      };
    });
    charts.draw(target, traces, {
      xaxis: charts.axis(labels[x], { rangemode: "tozero" }),
      yaxis: vertical(),
    });
  }

  function redraw() {
    draw("by-progress", progress.value);
    draw("by-seconds", "seconds");
  }
  for (const control of [metric, progress, logarithmic]) control.addEventListener("change", redraw);
  redraw();
})();
