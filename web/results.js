// Shows on a node of the pack the text that its run returned, or what went wrong with it. ComfyUI shows the text of a few
// nodes of its own only, and an error's sentence only behind two clicks.
import { app } from "../../scripts/app.js";

const PREFIX = "QDiff_";
const NAME = "result";
const CLASS = "qdiff-result";
const LINE = 12.5; // pixels, of a text of 10
const LETTER = 6;
const [LEAST, MOST] = [48, 240]; // of its height; the rest of the node is the picture's
const [WIDTH, WIDEST] = [480, 720];
const EMPTY = "Run the workflow to see the result here.";

const isOurs = (node) => node?.comfyClass?.startsWith(PREFIX);
const areaOf = (node) => node.widgets?.find(({ name }) => name === NAME);
const isTable = (line) => /\S {2,}\S/.test(line); // whose columns are aligned with spaces

// Lines of a table are scrolled and not wrapped, all others are wrapped.
function write(element, text, isError) {
  const lines = text.split("\n").map((line) => {
    const row = document.createElement("div");
    row.textContent = line || " ";
    row.style.whiteSpace = isTable(line) ? "pre" : "pre-wrap";
    return row;
  });
  element.replaceChildren(...lines);
  element.style.color = isError ? "var(--error-text, #ff6b6b)" : "";
  element.style.opacity = text === EMPTY ? 0.5 : 1;
}

function heightOf(text, width) {
  const letters = Math.max(20, (width - 40) / LETTER);
  const rows = text.split("\n").map((line) => (isTable(line) ? 1 : Math.ceil(line.length / letters) || 1));
  return Math.min(MOST, Math.max(LEAST, rows.reduce((sum, row) => sum + row, 2) * LINE));
}

function addArea(node) {
  const element = document.createElement("div");
  element.className = `comfy-multiline-input ${CLASS}`; // the first: the colours of ComfyUI's own texts, in every theme
  element.dataset.captureWheel = "true"; // Nodes 2.0: once clicked, it scrolls
  element.tabIndex = 0;
  Object.assign(element.style, { fontFamily: "monospace", overflow: "auto", userSelect: "text", cursor: "text" });
  element.style.overflowWrap = "anywhere"; // a plan is one long word
  let text = "";
  const widget = node.addDOMWidget(NAME, "qdiff_result", element, {
    serialize: false, // not an input of the prompt
    getMinHeight: () => heightOf(text, node.size[0]),
    getMaxHeight: () => MOST,
    getValue: () => text,
    setValue: (value) => write(element, (text = value), widget?.isError),
  });
  widget.serialize = false; // nor a value in the saved workflow
  // Nodes 2.0 would give it as much of the node as the picture below, whatever it needs.
  const { computeLayoutSize } = widget;
  Object.defineProperty(widget, "computeLayoutSize", { get: () => (LiteGraph.vueNodesMode ? undefined : computeLayoutSize) });
  Object.assign(element.style, { minHeight: `${LEAST - 20}px`, maxHeight: `${MOST}px` });
  // The wheel zooms the canvas also over the text, unless there is something to scroll.
  element.addEventListener("wheel", (event) => {
    const scrolls = element.scrollHeight > element.clientHeight || element.scrollWidth > element.clientWidth;
    if (event.ctrlKey || !scrolls) {
      event.preventDefault();
      app.canvas.processMouseWheel(event);
    }
    event.stopPropagation();
  });
  return widget;
}

function grow(node, text) {
  const columns = Math.max(0, ...text.split("\n").filter(isTable).map(({ length }) => length));
  const [width, height] = node.computeSize();
  const wide = Math.max(width, Math.min(WIDEST, columns * LETTER + 40));
  node.setSize([Math.max(node.size[0], wide), Math.max(node.size[1], height)]);
}

const running = new Set(); // nodes whose area is of an earlier run

function show(node, text, isError = false) {
  running.delete(node);
  const widget = areaOf(node) ?? Object.assign(addArea(node), { before: [...node.size] });
  widget.isError = isError;
  widget.value = text;
  const progress = node.widgets.find(({ type }) => type === "progressText"); // which stays beside the result otherwise
  if (progress && !widget.before && !isError) node.removeWidget(progress);
  grow(node, text);
  // After an undo, Nodes 2.0 still shows the element of the node as it was before.
  if (!widget.element.isConnected && node.graph === app.canvas.graph) {
    document.querySelector(`[data-node-id="${node.id}"] .${CLASS}`)?.replaceWith(widget.element);
  }
  app.canvas.setDirty(true, true);
}

// What was shown goes, and with it the area of a node that has a text only now and then.
function forget(node) {
  const widget = areaOf(node);
  if (!widget) return;
  widget.isError = false;
  if (!widget.before) {
    widget.value = EMPTY;
    return;
  }
  node.removeWidget(widget);
  node.setSize(widget.before);
}

function everyNode(graph, visit) {
  for (const node of graph?.nodes ?? []) {
    if (isOurs(node)) visit(node);
    if (node.subgraph) everyNode(node.subgraph, visit);
  }
}

// A node within subgraphs has the ids of these before its own, as in 12:5.
function nodeOf(id) {
  let node;
  let graph = app.rootGraph;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return node;
}

function sentence({ message, details, type, extra_info }) {
  if (type === "custom_validation_failed") return details.replace(`${extra_info?.input_name} - `, "");
  return details ? `${message}: ${details}` : message;
}

app.registerExtension({
  name: "QuantizedDiffusers.Results",

  setup() {
    app.api.addEventListener("executing", ({ detail }) => {
      const node = nodeOf(detail);
      if (isOurs(node) && areaOf(node)?.before) running.add(node);
    });
    app.api.addEventListener("execution_success", () => {
      running.forEach(forget);
      running.clear();
    });
    app.api.addEventListener("execution_error", ({ detail }) => {
      const node = nodeOf(detail.node_id);
      if (isOurs(node)) show(node, detail.exception_message.trim(), true);
    });
    const queuePrompt = app.queuePrompt;
    app.queuePrompt = async function () {
      everyNode(app.rootGraph, (node) => areaOf(node)?.isError && forget(node));
      try {
        return await queuePrompt.apply(this, arguments);
      } finally {
        for (const [id, { errors }] of Object.entries(app.lastNodeErrors ?? {})) {
          const node = nodeOf(id);
          if (isOurs(node)) show(node, [...new Set(errors.map(sentence))].join("\n"), true);
        }
      }
    };
  },

  nodeCreated(node) {
    if (!isOurs(node)) return;
    if (node.constructor.nodeData?.output_node) {
      addArea(node).value = EMPTY;
      node.setSize([Math.max(node.size[0], WIDTH), node.computeSize()[1]]);
    }
    const onExecuted = node.onExecuted;
    node.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      if (output?.text) show(this, output.text.join("\n"));
    };
  },

  // Outputs that come back without a run, as after an undo or on the way back to a workflow's tab.
  onNodeOutputsUpdated(outputs) {
    for (const [locator, output] of Object.entries(outputs)) {
      const [id, subgraph] = locator.split(":").reverse();
      const graph = subgraph ? app.rootGraph?.subgraphs.get(subgraph) : app.rootGraph;
      const node = graph?.getNodeById(id);
      if (isOurs(node) && output?.text) show(node, output.text.join("\n"));
    }
  },
});
