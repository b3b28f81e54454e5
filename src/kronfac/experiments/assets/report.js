"use strict";
(() => {
  const data = charts.data("curves");
  const metric = document.getElementById("metric");
  const progress = document.getElementById("progress");
  const logarithmic = document.getElementById("logarithmic");
  const labels = { step: "steps", epoch: "epochs", seconds: "seconds of training" };

  for (const name of data.metrics) {
    metric.add(new Option(name.replaceAll("_", " "), name, name === data.metric, name === data.metric));
  }

  // The first evaluations often dwarf all others; a double click on a chart shows them too.
  function range() {
    const later = data.runs.map((run) => run.columns[metric.value].slice(Math.floor(0.03 * run.columns.step.length))).flat();
    const [low, high] = [Math.min(...later), Math.max(...later)];
    if (!logarithmic.checked) return [low - 0.05 * (high - low), high + 0.05 * (high - low)];
    return low > 0 ? [Math.log10(low) - 0.03 * Math.log10(high / low), Math.log10(high * 1.02)] : null;
  }

  function draw(target, x) {
    const seen = new Set();
    const traces = data.runs.map((run) => {
      const first = !seen.has(run.optimizer);
      seen.add(run.optimizer);
      return {
        x: run.columns[x],
        y: run.columns[metric.value],
        customdata: run.columns.step.map((step, i) => [step, run.columns.epoch[i], run.columns.seconds[i]]),
        name: run.optimizer,
        legendgroup: run.optimizer,
        showlegend: first,
        mode: "lines",
        line: { color: run.colour, width: data.seeds > 1 ? 1.3 : 2 },
        opacity: data.seeds > 1 ? 0.75 : 1,
        hovertemplate:
          `<b>${run.optimizer}</b>, seed ${run.seed}<br>%{y:.5g}<br>step %{customdata[0]}, ` +
          "epoch %{customdata[1]:.2f}, %{customdata[2]:.2f} s<extra></extra>",
      };
    });
    charts.draw(target, traces, {
      xaxis: charts.axis(labels[x], { rangemode: "tozero" }),
      yaxis: charts.axis(metric.value.replaceAll("_", " "), {
        type: logarithmic.checked ? "log" : "linear",
        ...(range() ? { range: range() } : { autorange: true }),
      }),
      height: 396,
      legend: { x: 1, xanchor: "right", y: 1 },
    });
  }

  function redraw() {
    draw("by-progress", progress.value);
    draw("by-seconds", "seconds");
  }
  for (const control of [metric, progress, logarithmic]) control.addEventListener("change", redraw);
  redraw();
})();
