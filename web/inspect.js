// Shows the table of Inspect Quantization on the node, above the picture, which ComfyUI shows itself.
// ComfyUI puts `ui.text` on a few nodes of its own only.
import { app } from "../../scripts/app.js";

const TYPE = "QDiff_InspectQuant";
const WIDGET = "table";
const CLASS = "qdiff-table";

function addTable(node) {
  const area = document.createElement("textarea");
  area.className = `comfy-multiline-input ${CLASS}`; // the first: the colours of ComfyUI's own texts, in every theme
  area.dataset.captureWheel = "true"; // Nodes 2.0: once clicked, it scrolls
  area.readOnly = true;
  area.placeholder = "Run the workflow to see how each component is stored.";
  // Columns are aligned with spaces, so a long line is scrolled and not wrapped.
  Object.assign(area.style, { fontFamily: "monospace", whiteSpace: "pre", overflow: "auto" });
  const widget = node.addDOMWidget(WIDGET, "qdiff_table", area, {
    serialize: false, // not an input of the prompt
    getMinHeight: () => 160,
    getMaxHeight: () => 240, // the rest is the picture's
    getValue: () => area.value,
    setValue: (text) => (area.value = text),
  });
  widget.serialize = false; // nor a value in the saved workflow
  // The wheel zooms the canvas also over the table, unless there is something to scroll.
  area.addEventListener("wheel", (event) => {
    const scrolls = area.scrollHeight > area.clientHeight || area.scrollWidth > area.clientWidth;
    if (event.ctrlKey || !scrolls) {
      event.preventDefault();
      app.canvas.processMouseWheel(event);
    }
    event.stopPropagation();
  });
  node.setSize([Math.max(node.size[0], 880), Math.max(node.size[1], 1200)]);
}

function show(node, output) {
  const widget = node.widgets?.find(({ name }) => name === WIDGET);
  if (!widget || !output?.text) return;
  widget.value = output.text.join("\n");
  // After an undo, Nodes 2.0 still shows the element of the node as it was before.
  if (!widget.element.isConnected && node.graph === app.canvas.graph) {
    document.querySelector(`[data-node-id="${node.id}"] .${CLASS}`)?.replaceWith(widget.element);
  }
}

app.registerExtension({
  name: "QuantizedDiffusers.Inspect",

  nodeCreated(node) {
    if (node.comfyClass !== TYPE) return;
    addTable(node);
    const onExecuted = node.onExecuted;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      show(this, output);
    };
  },

  // Outputs that come back without a run, as after an undo or on the way back to a workflow's tab.
  onNodeOutputsUpdated(outputs) {
    for (const [locator, output] of Object.entries(outputs)) {
      const [id, subgraph] = locator.split(":").reverse();
      const graph = subgraph ? app.rootGraph?.subgraphs.get(subgraph) : app.rootGraph;
      const node = graph?.getNodeById(id);
      if (node?.comfyClass === TYPE) show(node, output);
    }
  },
});
