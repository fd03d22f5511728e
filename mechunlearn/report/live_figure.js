// plotly.js comes with one figure of several and is loaded once a page
const page = (globalThis.mechunlearnPlotly ??= {});
page.ready ??= new Promise((resolve) => (page.resolve = resolve));

function load(code) {
  const url = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
  import(url).then(() => page.resolve(window.Plotly));
}

async function render({ model, el }) {
  const plot = document.createElement("div");
  const note = document.createElement("div");
  el.append(note, plot);
  el.style.position = "relative";

  const say = () => {
    const said = model.get("note");
    note.innerHTML = said;
    const over = said && plot.data;
    note.style.cssText = over ? "position: absolute; z-index: 1; top: 44px; left: 8px; right: 8px" : "padding: 8px";
    note.hidden = !said;
    plot.style.opacity = said ? 0.25 : 1;
  };
  say();
  model.on("change:note", say);

  const outline = ({ x, y, pointNumber: [row, column], xaxis, yaxis }) => {
    // a layer is a number on its axis; a category (a token, a component) stands at its number in the map
    const [across, up] = [typeof x === "number" ? x : column, typeof y === "number" ? y : row];
    const around = { x0: across - 0.5, x1: across + 0.5, y0: up - 0.5, y1: up + 0.5 };
    const shape = { name: "clicked", type: "rect", xref: xaxis._id, yref: yaxis._id, ...around, line: { width: 2 } };
    const others = (plot.layout.shapes ?? []).filter(({ name }) => name !== "clicked");
    globalThis.Plotly.relayout(plot, { shapes: [...others, shape] });
  };

  if (model.get("plotlyjs")) load(model.get("plotlyjs"));
  const Plotly = await page.ready;
  let width = 0;
  const draw = async () => {
    const { data, layout } = structuredClone(model.get("figure")); // plotly writes into both
    if (!width) return;
    if (!data) return Plotly.purge(plot);
    const narrow = width < 440;
    if (narrow && layout.title) {
      layout.title.font = { size: 13 };
      layout.title.subtitle = { ...layout.title.subtitle, font: { size: 10 } };
    }
    // react() would keep the last map's colours where a map has another kind of colour scale
    const buttons = { displayModeBar: !narrow, displaylogo: false, modeBarButtons: [["toImage", "resetScale2d"]] };
    await Plotly.newPlot(plot, data, { ...layout, width }, buttons);
    plot.removeAllListeners("plotly_click");
    plot.on("plotly_click", ({ points: [point] }) => {
      if (!point.customdata) return;
      outline(point);
      model.send({ component: point.customdata, column: point.pointNumber[1] });
    });
    say();
  };
  model.on("change:figure", draw);
  // a figure is not in the page when it is made, and a notebook's column may change its width
  const fit = new ResizeObserver(() =>
    requestAnimationFrame(() => {
      if (!el.clientWidth || el.clientWidth === width) return;
      width = el.clientWidth;
      draw();
    }),
  );
  fit.observe(el);
  return () => {
    fit.disconnect();
    Plotly.purge(plot);
  };
}

export default { render };
