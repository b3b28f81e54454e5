"use strict";
(() => {
  const compared = charts.data("strategies");
  const searched = charts.data("grid");
  const count = (number) => Array.from({ length: number }, (_, i) => i + 1);

  function curves() {
    const measured = document.getElementById("measured");
    measured.add(new Option("on the tasks learned so far, mean", ""));
    for (const task of count(compared.tasks)) measured.add(new Option(`on task ${task}`, task));

    function draw() {
      const task = measured.value === "" ? null : Number(measured.value) - 1;
      const column = (matrix) => matrix && matrix.map((row) => row[task]);
      const traces = compared.series.map((one) => {
        const spread = task === null ? one.so_far_spread : column(one.matrix_spread);
        return {
          x: count(compared.tasks),
          y: task === null ? one.so_far : column(one.matrix),
          error_y: spread ? { type: "data", array: spread, thickness: 1, width: 3 } : undefined,
          name: one.title,
          mode: "lines+markers",
          line: { color: one.colour, dash: one.dash, width: 2 },
          hovertemplate: `<b>${one.title}</b><br>%{y:.1f} % after task %{x}<extra></extra>`,
        };
      });
      charts.draw("after-tasks", traces, {
        xaxis: charts.axis("tasks learned", { dtick: Math.ceil(compared.tasks / 10) }),
        yaxis: charts.axis("test accuracy [%]"),
        height: 396,
      });
    }
    measured.addEventListener("change", draw);
    draw();
  }

  function maps() {
    const place = document.getElementById("matrices");
    const tasks = count(compared.tasks).map(String);
    for (const one of compared.series) {
      const target = document.createElement("div");
      target.className = "map";
      place.append(target);
      const note = one.matrix.map((row, i) =>
        row.map((mean, j) => mean.toFixed(1) + (one.matrix_spread ? ` ± ${one.matrix_spread[i][j].toFixed(1)}` : "")),
      );
      const last = one.matrix[one.matrix.length - 1];
      const trace = {
        type: "heatmap",
        x: tasks,
        y: tasks,
        z: one.matrix,
        customdata: note,
        zmin: 0,
        zmax: 100,
        colorscale: "Viridis",
        showscale: false,
        xgap: 1,
        ygap: 1,
        texttemplate: compared.tasks <= 10 ? "%{z:.0f}" : "",
        hovertemplate: "task %{x} after task %{y}: %{customdata} %<extra></extra>",
      };
      charts.draw(target, [trace], {
        title: { text: `${one.title}: ${(last.reduce((a, b) => a + b) / last.length).toFixed(1)} %`, font: { size: 14 } },
        margin: { l: 50, r: 34, t: 40, b: 44 },
        xaxis: { title: { text: "task" }, type: "category", showgrid: false },
        yaxis: { title: { text: "after task" }, type: "category", showgrid: false, autorange: "reversed" },
        height: 316,
      });
    }
  }

  function scatter() {
    const traces = searched.series.map((one) => ({
      x: one.target,
      y: one.average,
      text: one.settings,
      name: one.title,
      mode: "markers",
      marker: {
        color: one.colour,
        symbol: one.symbol,
        size: one.chosen.map((chosen) => (chosen ? 14 : 8)),
        line: { color: "#1d2433", width: one.chosen.map((chosen) => (chosen ? 1.5 : 0)) },
      },
      hovertemplate:
        `<b>${one.title}</b><br>%{text}<br>target %{x:.1f} %, average %{y:.1f} %<extra></extra>`,
    }));
    charts.draw("scatter", traces, {
      xaxis: charts.axis("target accuracy [%]"),
      yaxis: charts.axis("average accuracy [%]"),
      height: 396,
    });
  }

  if (compared) {
    curves();
    maps();
  }
  if (searched) scatter();
})();
